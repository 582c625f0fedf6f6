"""Intervals for a share: how far the truth may lie from what was counted. For reports; promises are tested elsewhere.

- *Clopper–Pearson* (1934), for labels of equal weight: exact, it covers at least as often as it says.
- *Wilson* (1927) at Kish's effective number of labels (1965), (Σw)²/Σw², for weighted ones: an approximation. No exact
  interval is known for them; the promise's test thins them to equal weights instead (`routers.promise`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

CERTAINTY = 0.95
"""How often an interval of a report contains the truth."""

_BISECTIONS = 50
_LEAST = 1e-300
_CLOSE = 1e-13


@dataclass(frozen=True, slots=True)
class Share:
    """A share of labels with its interval.

    `value` is weighted, None where there are no labels (the interval is then 0 to 1: nothing is known). `count` is how
    many labels there are, whatever they weigh. `exact` says whether the interval is Clopper–Pearson's or Wilson's.
    """

    value: float | None
    low: float
    high: float
    count: int
    exact: bool


def share(hits: ArrayLike, weight: ArrayLike | None = None, *, certainty: float = CERTAINTY) -> Share:
    """The share of `hits` bool[n] in labels that weigh `weight` float[n] > 0 (None: all the same)."""
    hit = np.asarray(hits, dtype=np.bool_)
    if len(hit) == 0:
        return Share(None, 0.0, 1.0, 0, True)
    if weight is None or equal(weights := np.asarray(weight, dtype=np.float64)):
        low, high = clopper_pearson(hit.sum(), len(hit), certainty)
        return Share(float(hit.mean()), float(low), float(high), len(hit), True)
    value = float(np.average(hit, weights=weights))
    low, high = wilson(value, effective(weights), certainty)
    return Share(value, float(low), float(high), len(hit), False)


def equal(weights: Floats) -> bool:
    """Whether all weights are the same, up to rounding."""
    return bool(np.ptp(weights) <= 1e-9 * weights.max())


def effective(weights: Floats) -> float:
    """Kish's effective number of labels: so many of equal weight would tell as much. (Σw)²/Σw²."""
    scaled = weights / weights.max()
    return float(scaled.sum() ** 2 / (scaled @ scaled))


def wilson(value: ArrayLike, trials: ArrayLike, certainty: float = CERTAINTY) -> tuple[Floats, Floats]:
    """Wilson's score interval of shares `value` among `trials` > 0, which needn't be whole."""
    p, n = np.asarray(value, dtype=np.float64), np.asarray(trials, dtype=np.float64)
    z = NormalDist().inv_cdf(0.5 + certainty / 2.0)
    middle = (p + z * z / (2.0 * n)) / (1.0 + z * z / n)
    half = z / (1.0 + z * z / n) * np.sqrt(p * (1.0 - p) / n + z * z / (4.0 * n * n))
    low = np.where(p == 0.0, 0.0, np.maximum(middle - half, 0.0))
    return low, np.where(p == 1.0, 1.0, np.minimum(middle + half, 1.0))


def clopper_pearson(
    hits: ArrayLike, trials: ArrayLike, certainty: float = CERTAINTY
) -> tuple[Floats, Floats]:
    """The exact interval of `hits` among `trials` ≥ 1, elementwise.

    Its ends are quantiles of beta distributions: of Beta(k, n−k+1) at (1−certainty)/2, of Beta(k+1, n−k) at the other.
    """
    k, n = np.broadcast_arrays(np.asarray(hits, dtype=np.float64), np.asarray(trials, dtype=np.float64))
    tail = (1.0 - certainty) / 2.0
    low = np.where(k > 0, _beta_quantile(np.maximum(k, 1.0), n - k + 1.0, tail), 0.0)
    high = np.where(k < n, _beta_quantile(k + 1.0, np.maximum(n - k, 1.0), 1.0 - tail), 1.0)
    return low, high


def _beta_quantile(a: Floats, b: Floats, probability: float) -> Floats:
    """The x at which the distribution function of Beta(a, b) reaches `probability`, by bisection."""
    log_gamma = np.vectorize(math.lgamma, otypes=[np.float64])
    log_beta = log_gamma(a) + log_gamma(b) - log_gamma(a + b)
    low, high = np.zeros_like(a), np.ones_like(a)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2.0
        below = _beta_distribution(middle, a, b, log_beta) < probability
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    return np.asarray((low + high) / 2.0)


def _beta_distribution(x: Floats, a: Floats, b: Floats, log_beta: Floats) -> Floats:
    """I_x(a, b), the regularised incomplete beta function, by its continued fraction (DLMF 8.17.22).

    `log_beta` is ln B(a, b), the same for both orders of a and b.
    """
    # It converges fast below the mean only; above, I_x(a, b) = 1 − I_{1−x}(b, a).
    mirrored = x > (a + 1.0) / (a + b + 2.0)
    x, a, b = np.where(mirrored, 1.0 - x, x), np.where(mirrored, b, a), np.where(mirrored, a, b)
    with np.errstate(divide="ignore", under="ignore"):
        front = np.exp(a * np.log(x) + b * np.log1p(-x) - log_beta) / a
        result = front / _continued(x, a, b)
    return np.asarray(np.where(mirrored, 1.0 - result, result))


def _continued(x: Floats, a: Floats, b: Floats) -> Floats:
    """1 + d₁/(1 + d₂/(1 + …)) of DLMF 8.17.22, evaluated forwards (Lentz, 1976) until nothing moves any more."""
    value = np.ones_like(x)
    numerator, denominator = np.ones_like(x), np.zeros_like(x)
    steps = 20 + int(10.0 * math.sqrt(float(np.max(a + b, initial=1.0))))
    for step in range(1, steps):
        half = step // 2
        if step % 2:
            d = -(a + half) * (a + b + half) * x / ((a + 2 * half) * (a + 2 * half + 1.0))
        else:
            d = half * (b - half) * x / ((a + 2 * half - 1.0) * (a + 2 * half))
        denominator = 1.0 / _nonzero(1.0 + d * denominator)
        numerator = _nonzero(1.0 + d / numerator)
        value = value * numerator * denominator
        if (np.abs(numerator * denominator - 1.0) < _CLOSE).all():
            break
    return value


def _nonzero(value: Floats) -> Floats:
    return np.asarray(np.where(np.abs(value) < _LEAST, _LEAST, value))
