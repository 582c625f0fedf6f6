"""A text as the terms a linear student counts: words, pairs of words, and character n-grams inside words.

Training and serving both call `terms`, so a served text is cut up exactly as the training texts were. The scheme is
the usual one for short texts (scikit-learn's `word` 1-2 and `char_wb` 2-4 analysers).
"""

from __future__ import annotations

import re
import unicodedata
from itertools import pairwise

_WORD = re.compile(r"\w+")
MAX_CHARACTERS = 4000
"""Longer texts are cut here: the time of an answer is bounded whatever the client sends."""


def terms(text: str) -> tuple[list[str], list[str]]:
    """The word terms and the character terms of `text`, repeated as often as they occur.

    Words are of any script; a pair is two neighbouring words joined by a space. A character term is a run of 2 to 4
    characters of one word padded by a space on either side.
    """
    folded = unicodedata.normalize("NFKC", text[:MAX_CHARACTERS]).lower()
    words = _WORD.findall(folded)
    word_terms = words + [f"{a} {b}" for a, b in pairwise(words)]
    character_terms: list[str] = []
    for word in folded.split() or [""]:  # an empty text has a term too: two spaces
        padded = f" {word} "
        size = len(padded)
        # Spelled out: this is half of the time a student takes.
        character_terms += [padded[i : i + 2] for i in range(size - 1)]
        character_terms += [padded[i : i + 3] for i in range(size - 2)]
        character_terms += [padded[i : i + 4] for i in range(size - 3)]
    return word_terms, character_terms
