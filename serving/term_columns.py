"""The terms of a text as columns of a vocabulary, counted: what a linear student multiplies."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping
from functools import lru_cache, partial

import numpy as np
from numpy.typing import NDArray

from serving.text_terms import pieces, split_text, word_terms

_REMEMBERED = 4096
_LONGEST_REMEMBERED = 32
"""A word of so many characters has 100 pieces at most: what is remembered takes a few megabytes a student."""

Columns = NDArray[np.intc]

_PLACES: Columns = np.arange(4096, dtype=np.intc)
"""0, 1, 2, …: enough for most texts, and made once. `arange` takes as long as all the counting."""
_PLACES.setflags(write=False)


class TermColumns:
    """A vocabulary of distinct terms, the `words` word terms before those of characters.

    Words repeat from text to text (Zipf's law), and their pieces with them: the columns of those seen lately are
    remembered, as bytes that lie side by side and not as numbers all over the memory.
    """

    def __init__(self, vocabulary: list[str], words: int) -> None:
        self._size = len(vocabulary)
        self._words = {term: column for column, term in enumerate(vocabulary[:words])}
        pieces_at = {term: words + column for column, term in enumerate(vocabulary[words:])}
        # No method: what remembers would hold itself, with its vocabulary, long after its release was replaced.
        self._columns_of = partial(_columns_of, pieces_at)
        self._remembered = lru_cache(_REMEMBERED)(self._columns_of)

    def count(self, text: str) -> tuple[Columns, NDArray[np.intp], int]:
        """The columns that occur in `text`, how often each does, and how many of them, which come first, are of words.

        The same as counting `text_terms.terms` and looking the terms up, in the order in which they first occur. Terms
        that aren't in the vocabulary are left out.
        """
        words, chunks = split_text(text)
        of_words = _found(map(self._words.get, word_terms(words)))
        recall, work_out = self._remembered, self._columns_of
        of_pieces = [
            recall(chunk) if len(chunk) <= _LONGEST_REMEMBERED else work_out(chunk) for chunk in chunks
        ]
        occurring = np.frombuffer(b"".join([of_words.tobytes(), *of_pieces]), dtype=np.intc)
        size = len(occurring)
        place = _PLACES[:size] if size <= len(_PLACES) else np.arange(size, dtype=np.intc)
        # Of a column that is set several times the last one stays: backwards, that is where it occurs first.
        first_of = np.empty(self._size, dtype=np.intc)
        first_of[occurring[::-1]] = place[::-1]
        first = first_of.take(occurring)
        kept = (first == place).nonzero()[0]
        times = np.bincount(first, minlength=size)
        return occurring.take(kept), times.take(kept), len(set(of_words))


def _columns_of(pieces_at: Mapping[str, int], chunk: str) -> bytes:
    return _found(map(pieces_at.get, pieces(chunk))).tobytes()


def _found(columns: Iterable[int | None]) -> array[int]:
    return array("i", [column for column in columns if column is not None])
