"""Fitting the student `linear` over embeddings: multinomial logistic regression on a frozen sentence encoder's output.

Embeddings are made once for all texts, one text at a time and by the code that serves them, so that a student is tested
on the very numbers it will see. They are unit vectors and go in as they are: standardising each of their numbers
changed nothing beyond chance (docs/lab-notes.md).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from distillation.features import Ints
from routers.logistic import fit_logistic
from serving.closed_answers import AnswerSpace, KnownAnswer, TextTooLong, TokenEstimate
from serving.embedded import EmbeddedLinear, Embedder, unit
from serving.regression import Regression
from serving.sight import Sees

INVERSE_PENALTY = 10.0
_SAY_EVERY_S = 2.0


class Embeddings:
    """The embeddings of n texts by `embedder`, which was made of the files `encoder`.

    It should remember them: students ask for the same ones again.
    """

    def __init__(
        self,
        texts: Sequence[str],
        embedder: Embedder,
        encoder: Mapping[str, bytes],
        progress: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._embedder = embedder
        self._encoder = encoder
        self._vectors = np.full((len(texts), embedder.width), np.nan, dtype=np.float32)
        said = time.monotonic()
        for number, text in enumerate(texts):
            try:
                self._vectors[number] = unit(embedder.numbers(text))
            except TextTooLong:
                continue
            if time.monotonic() - said > _SAY_EVERY_S:
                said = time.monotonic()
                progress(f"embedding texts, {number + 1:,} of {len(texts):,}")

    @property
    def readable(self) -> NDArray[np.bool_]:
        """bool[n]: not those that are longer than the encoder reads."""
        return ~np.isnan(self._vectors[:, 0])

    def fit(
        self,
        rows: Ints,
        answers: Ints,
        known: Sequence[KnownAnswer],
        tokens: TokenEstimate,
        sees: Sees = "message",
    ) -> EmbeddedLinear:
        """Fit a student to the texts numbered `rows`; see `distillation.features.Features`."""
        with threadpool_limits(1):
            fitted = fit_logistic(self._vectors[rows], answers, inverse_penalty=INVERSE_PENALTY)
        space = AnswerSpace(
            [replace(known[c], seen=int((answers == c).sum())) for c in fitted.classes], tokens, sees
        )
        regression = Regression(
            np.ascontiguousarray(fitted.weights, dtype=np.float32), fitted.intercept.astype(np.float32)
        )
        return EmbeddedLinear(space, regression, self._embedder, self._encoder)
