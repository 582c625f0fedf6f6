"""The regression of a student of kind `linear`: from features to a logit for each answer it knows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from serving.errors import DamagedRelease

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Regression:
    """Logits = features · `weights` + `intercept`: float32[F, K] and float32[K]."""

    weights: Floats
    intercept: Floats

    def logits(self, features: Floats) -> Floats:
        """The logits, float32[K], of a text's features, float32[F]."""
        made: Floats = features @ self.weights
        made += self.intercept
        return made

    def check(self, features: int, answers: int, what: str) -> None:
        """Raise DamagedRelease unless it is one from so many features to so many answers."""
        if self.weights.shape != (features, answers) or self.intercept.shape != (answers,):
            raise DamagedRelease(
                f"the linear student's arrays don't fit together: {features} {what}, {answers} answers, "
                f"weights {self.weights.shape}, intercept {self.intercept.shape}"
            )
        check_floats(self.weights, self.intercept)


def check_floats(*arrays: Floats) -> None:
    """Raise DamagedRelease for anything but finite 32-bit floats."""
    if not all(array.dtype == np.float32 and np.isfinite(array).all() for array in arrays):
        raise DamagedRelease("the linear student's arrays should hold finite 32-bit floats only")
