"""What students of kind `linear` are fitted to: features of texts, made once for all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from serving.closed_answers import ClosedStudent, KnownAnswer, TokenEstimate
from serving.sight import Sees

Ints = NDArray[np.int64]


class Features(Protocol):
    """The features of n texts, numbered from 0."""

    @property
    def readable(self) -> NDArray[np.bool_]:
        """bool[n]: whether a text has features at all. One hasn't, if it is longer than what reads it can take."""
        ...

    def fit(
        self, rows: Ints, answers: Ints, known: Sequence[KnownAnswer], tokens: TokenEstimate, sees: Sees
    ) -> ClosedStudent:
        """Fit a student to the texts numbered `rows` int[m], whose answers are `known[answers[i]]`, int[m].

        The student knows only the answers among `answers`, and sees of requests what `sees` says. Takes one core: the
        others are the gateway's.
        """
        ...


FeaturesOf = Callable[[Sequence[str]], Features]
"""Makes the features of texts."""
