"""From a score to a probability people can read: Platt scaling (Platt, 1999), in scikit-learn's manner.

Strictly increasing, so it never changes who is accepted; the threshold is tested on the untied score.
"""

from __future__ import annotations

from typing import Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from routers.logistic import fit_logistic

_LEAST_SLOPE = 1e-6


class PlattCalibrator:
    """P(agreement | score) = 1/(1+exp(−(slope_·score+offset_))).

    Two pseudo-labels, one agreeing at the highest score and one disagreeing at the lowest, keep it finite when all
    labels agree or none does.
    """

    slope_: float
    offset_: float

    def fit(self, score: ArrayLike, agreed: ArrayLike, sample_weight: ArrayLike | None = None) -> Self:
        """Fit to `score` float[n] and `agreed` bool[n], each weighted by `sample_weight` float[n] (None: equally)."""
        scores = np.asarray(score, dtype=np.float64)
        agreeing = np.asarray(agreed, dtype=np.bool_)
        weights = (
            np.ones(len(scores)) if sample_weight is None else np.asarray(sample_weight, dtype=np.float64)
        )
        usable = np.isfinite(scores)
        if not usable.any():
            raise ValueError("no finite score to calibrate on")
        scores, agreeing, weights = scores[usable], agreeing[usable], weights[usable]
        scale = float(scores.std()) or 1.0
        fitted = fit_logistic(
            np.concatenate([scores, [scores.max(), scores.min()]])[:, None] / scale,
            np.concatenate([agreeing, [True, False]]).astype(np.int64),
            inverse_penalty=1e3,
            sample_weight=np.concatenate([weights, [weights.mean(), weights.mean()]]),
        )
        # Two classes as two columns of log-odds, the second of agreement.
        self.slope_ = max(float(fitted.weights[0, 1] - fitted.weights[0, 0]) / scale, _LEAST_SLOPE)
        self.offset_ = float(fitted.intercept[1] - fitted.intercept[0])
        return self

    def predict(self, score: ArrayLike) -> NDArray[np.float64]:
        """The probability of agreement for each score, float[n]."""
        z = self.slope_ * np.asarray(score, dtype=np.float64) + self.offset_
        return np.where(
            z >= 0, 1.0 / (1.0 + np.exp(-np.abs(z))), np.exp(-np.abs(z)) / (1.0 + np.exp(-np.abs(z)))
        )
