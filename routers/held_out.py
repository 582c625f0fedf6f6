"""Ranks that no label of their own had a hand in: the confidences of all folds as one (STATISTICS.md §3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from routers.confidence import Confidence
from routers.confidence_fit import FOLDS, MODELS, ConfidenceEstimator

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class _Fold:
    """One fold's answers, bool[n], the confidence chosen and fitted without them, and its line to the common scale.

    A rank r becomes `to + (r − at)·stretch`.
    """

    answers: NDArray[np.bool_]
    confidence: Confidence
    at: float
    to: float
    stretch: float


class HeldOutConfidence:
    """Ranks n labelled answers, each by a confidence that was chosen and fitted without its fold.

    `estimator_`, fitted to all labels, holds the confidence to be released. Confidences of different folds differ by
    chance, and a fold whose labels are worse than the others' would get the higher ranks for it. So each is brought to
    the mean and spread that the released one has on the same answers, which takes no labels: a threshold on these ranks
    is one on its own. Deterministic; `seed` deals the folds.
    """

    estimator_: ConfidenceEstimator

    def __init__(self, models: Sequence[str] = MODELS, *, seed: int = 0) -> None:
        self.models = models
        self.seed = seed

    def fit(
        self,
        score: ArrayLike,
        signals: Mapping[str, ArrayLike],
        answer_keys: Sequence[str | None],
        agreed: ArrayLike,
        sample_weight: ArrayLike | None = None,
    ) -> Self:
        """As `ConfidenceEstimator.fit`, once for all and once without each fold."""
        scores = np.asarray(score, dtype=np.float64)
        agreeing = np.asarray(agreed, dtype=np.bool_)
        weights = (
            np.ones(len(scores)) if sample_weight is None else np.asarray(sample_weight, dtype=np.float64)
        )
        columns = {name: np.asarray(column, dtype=np.float64) for name, column in signals.items()}
        self.estimator_ = ConfidenceEstimator(self.models, seed=self.seed)
        self.estimator_.fit(scores, columns, answer_keys, agreeing, weights)
        own = self.estimator_.confidence_.ranks(scores, columns, answer_keys)
        folds = np.random.default_rng(self.seed + 1).permutation(len(scores)) % FOLDS
        self._folds = []
        for fold in range(FOLDS):
            others = folds != fold
            fitted = (
                ConfidenceEstimator(self.models, seed=self.seed)
                .fit(
                    scores[others],
                    {name: column[others] for name, column in columns.items()},
                    [key for key, kept in zip(answer_keys, others, strict=True) if kept],
                    agreeing[others],
                    weights[others],
                )
                .confidence_
            )
            line = _line(fitted.ranks(scores, columns, answer_keys), own, weights)
            self._folds.append(_Fold(~others, fitted, *line))
        return self

    def ranks(
        self, score: ArrayLike, signals: Mapping[str, ArrayLike], answer_keys: Sequence[str | None]
    ) -> Floats:
        """The ranks of the n answers `fit` was given, in its order; −∞ for what can't be ranked.

        What is known of them may be another state of theirs, say that at a checkpoint: its ranks are on the same scale.
        """
        own = self.estimator_.confidence_.ranks(score, signals, answer_keys)
        ranks = np.full(len(own), -np.inf)
        for fold in self._folds:
            found = fold.confidence.ranks(score, signals, answer_keys)
            known = np.isfinite(found) & fold.answers
            ranks[known] = fold.to + (found[known] - fold.at) * fold.stretch
        # What differs by rounding alone ties here as it will when it is served.
        with np.errstate(invalid="ignore"):
            alike = np.isclose(ranks, own, rtol=1e-9, atol=1e-9)
        return np.where(alike, own, ranks)


def _line(ranks: Floats, own: Floats, weights: Floats) -> tuple[float, float, float]:
    """(at, to, stretch) that bring `ranks` to the mean and spread of `own`, where both are finite."""
    both = np.isfinite(ranks) & np.isfinite(own)
    if not both.any():
        return 0.0, 0.0, 1.0
    at, to = (float(np.average(values[both], weights=weights[both])) for values in (ranks, own))
    spread, wanted = (
        float(np.sqrt(np.average((values[both] - middle) ** 2, weights=weights[both])))
        for values, middle in ((ranks, at), (own, to))
    )
    return at, to, wanted / spread if spread > 0.0 and wanted > 0.0 else 1.0
