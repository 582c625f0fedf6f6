"""A text as the terms a linear student counts: words, pairs of words, and character n-grams inside words.

Training (`terms`) and serving (`serving.term_columns`) cut a text up by the same functions. The scheme is
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
    """The word terms and the character terms of `text`, repeated as often as they occur."""
    words, chunks = split_text(text)
    return word_terms(words), [piece for chunk in chunks for piece in pieces(chunk)]


def split_text(text: str) -> tuple[list[str], list[str]]:
    """The words of `text`, of any script, and what stands between white space; folded, and cut if it is too long."""
    folded = unicodedata.normalize("NFKC", text[:MAX_CHARACTERS]).lower()
    return _WORD.findall(folded), folded.split() or [""]  # an empty text has a character term too: two spaces


def word_terms(words: list[str]) -> list[str]:
    """The words, and each two neighbours joined by a space."""
    return words + [f"{a} {b}" for a, b in pairwise(words)]


def pieces(chunk: str) -> list[str]:
    """The character terms of what stands between white space: runs of 2 to 4 of its characters, padded by a space."""
    padded = f" {chunk} "
    size = len(padded)
    # Spelled out: for words never seen this is most of the time a student takes.
    return (
        [padded[i : i + 2] for i in range(size - 1)]
        + [padded[i : i + 3] for i in range(size - 2)]
        + [padded[i : i + 4] for i in range(size - 3)]
    )
