"""The terms of a text as columns of a vocabulary, counted: what a linear student multiplies."""

from __future__ import annotations

from collections import Counter
from functools import lru_cache
from itertools import chain

from serving.text_terms import pieces, split_text, word_terms

_REMEMBERED = 4096
_LONGEST_REMEMBERED = 32
"""A word of so many characters has 100 pieces at most: what is remembered takes a few megabytes a student."""


class TermColumns:
    """A vocabulary of distinct terms, the `words` word terms before those of characters.

    Words repeat from text to text (Zipf's law), and their pieces with them: the columns of those seen lately are
    remembered, which takes two thirds off the time a text takes.
    """

    def __init__(self, vocabulary: list[str], words: int) -> None:
        self._words = {term: column for column, term in enumerate(vocabulary[:words])}
        self._pieces = {term: words + column for column, term in enumerate(vocabulary[words:])}
        self._remembered = lru_cache(_REMEMBERED)(self._columns_of)

    def count(self, text: str) -> tuple[dict[int, int], int]:
        """How often each column occurs in `text`, and how many of these columns, which come first, are of words.

        The same as counting `text_terms.terms` and looking the terms up, in the order in which they first occur. Terms
        that aren't in the vocabulary are left out.
        """
        words, chunks = split_text(text)
        counted: dict[int | None, int] = Counter(map(self._words.get, word_terms(words)))
        counted.pop(None, None)
        of_words = len(counted)
        known: Counter[int] = counted  # type: ignore[assignment]
        recall, work_out = self._remembered, self._columns_of
        known.update(
            chain.from_iterable(
                [recall(chunk) if len(chunk) <= _LONGEST_REMEMBERED else work_out(chunk) for chunk in chunks]
            )
        )
        return known, of_words

    def _columns_of(self, chunk: str) -> tuple[int, ...]:
        found = map(self._pieces.get, pieces(chunk))
        return tuple([column for column in found if column is not None])
