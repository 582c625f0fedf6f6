"""Multinomial logistic regression: the one module that imports scikit-learn, which has no types of its own.

Imported only where something is fitted: scikit-learn takes 1.6 s to import, and a gateway needs none of it.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression

_TOLERANCE = 2e-3
_MAX_ITERATIONS = 300


@dataclass(frozen=True, slots=True)
class Logistic:
    """A fitted model: log-odds = X·weights + intercept. `classes` int[K], `weights` [F, K], `intercept` [K]."""

    classes: NDArray[np.int64]
    weights: NDArray[np.float64]
    intercept: NDArray[np.float64]


def fit_logistic(
    features: Any,
    classes: NDArray[np.int64],
    *,
    inverse_penalty: float,
    sample_weight: NDArray[np.float64] | None = None,
) -> Logistic:
    """Fit to `features` [n, F] (dense, or a SciPy sparse matrix) and `classes` int[n] with an L2 penalty of 1/(2C).

    C is `inverse_penalty`. Two classes become two columns, the first all zeros; a single class becomes a model that
    always gives it.
    """
    known = np.unique(classes)
    if len(known) == 1:
        return Logistic(known, np.zeros((features.shape[1], 1)), np.zeros(1))
    model = LogisticRegression(C=inverse_penalty, tol=_TOLERANCE, max_iter=_MAX_ITERATIONS)
    with warnings.catch_warnings():
        # Many answers seen once or twice are what a young log looks like, not a regression problem.
        warnings.filterwarnings("ignore", message="The number of unique classes is greater than 50%")
        model.fit(features, classes, sample_weight=sample_weight)
    weights = np.asarray(model.coef_, dtype=np.float64).T
    intercept = np.asarray(model.intercept_, dtype=np.float64)
    if len(known) == 2:
        weights = np.concatenate([np.zeros_like(weights), weights], axis=1)
        intercept = np.concatenate([[0.0], intercept])
    return Logistic(known, weights, intercept)
