"""From a score to a probability people can read: Platt scaling (Platt, 1999), in scikit-learn's manner.

Strictly increasing, so it never changes who is accepted; the threshold is tested on the untied score.
"""

from __future__ import annotations

from typing import Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from routers.confidence import SCORE
from routers.confidence_fit import ConfidenceEstimator
from routers.newton import sigmoid


class PlattCalibrator:
    """P(agreement | score) = 1/(1+exp(−(slope_·score+offset_))), slope_ > 0.

    The labels are drawn in as Platt does: n of which all agree say (n+1)/(n+2), not certainty.
    """

    slope_: float
    offset_: float

    def fit(self, score: ArrayLike, agreed: ArrayLike, sample_weight: ArrayLike | None = None) -> Self:
        """Fit to `score` float[n] and `agreed` bool[n], each weighted by `sample_weight` float[n] (None: equally)."""
        scores = np.asarray(score, dtype=np.float64)
        if not np.isfinite(scores).any():
            raise ValueError("no finite score to calibrate on")
        fitted = ConfidenceEstimator([SCORE]).fit(scores, {}, [None] * len(scores), agreed, sample_weight)
        (self.slope_,) = fitted.confidence_.terms[0].slopes
        self.offset_ = fitted.confidence_.offset
        return self

    def predict(self, score: ArrayLike) -> NDArray[np.float64]:
        """The probability of agreement for each score, float[n]."""
        return sigmoid(self.slope_ * np.asarray(score, dtype=np.float64) + self.offset_)
