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
        low, high = clopper_pearson(int(hit.sum()), len(hit), certainty)
        return Share(float(hit.mean()), low, high, len(hit), True)
    value = float(np.average(hit, weights=weights))
    return Share(value, *wilson(value, effective(weights), certainty), len(hit), False)


def equal(weights: Floats) -> bool:
    """Whether all weights are the same, up to rounding."""
    return bool(np.ptp(weights) <= 1e-9 * weights.max())


def effective(weights: Floats) -> float:
    """Kish's effective number of labels: so many of equal weight would tell as much. (Σw)²/Σw²."""
    scaled = weights / weights.max()
    return float(scaled.sum() ** 2 / (scaled @ scaled))


def wilson(value: float, trials: float, certainty: float = CERTAINTY) -> tuple[float, float]:
    """Wilson's score interval of a share `value` among `trials` > 0, which needn't be whole."""
    z = NormalDist().inv_cdf(0.5 + certainty / 2.0)
    middle = (value + z * z / (2.0 * trials)) / (1.0 + z * z / trials)
    half = z * math.sqrt(value * (1.0 - value) / trials + (z / (2.0 * trials)) ** 2) / (1.0 + z * z / trials)
    return (
        0.0 if value <= 0.0 else max(middle - half, 0.0),
        1.0 if value >= 1.0 else min(middle + half, 1.0),
    )


def clopper_pearson(hits: int, trials: int, certainty: float = CERTAINTY) -> tuple[float, float]:
    """The exact interval of `hits` among `trials` ≥ 1.

    Its ends are quantiles of beta distributions: of Beta(k, n−k+1) at (1−certainty)/2, of Beta(k+1, n−k) at the other.
    """
    tail = (1.0 - certainty) / 2.0
    low = _beta_quantile(hits, trials - hits + 1.0, tail) if hits > 0 else 0.0
    high = _beta_quantile(hits + 1.0, trials - hits, 1.0 - tail) if hits < trials else 1.0
    return low, high


def at_least(hits: int, trials: int, certainty: float) -> float:
    """Clopper and Pearson's one-sided lower bound of a share: the truth lies below it with 1 − `certainty` at most."""
    return clopper_pearson(hits, trials, 2.0 * certainty - 1.0)[0]


def _beta_quantile(a: float, b: float, probability: float) -> float:
    """The x at which the distribution function of Beta(a, b) reaches `probability`, by bisection."""
    log_beta = math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
    low, high = 0.0, 1.0
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2.0
        if _beta_distribution(middle, a, b, log_beta) < probability:
            low = middle
        else:
            high = middle
    return (low + high) / 2.0


def _beta_distribution(x: float, a: float, b: float, log_beta: float) -> float:
    """I_x(a, b), the regularised incomplete beta function, by its continued fraction (DLMF 8.17.22).

    `log_beta` is ln B(a, b), the same for both orders of a and b.
    """
    if x > (a + 1.0) / (a + b + 2.0):  # it converges fast below the mean only
        return 1.0 - _beta_distribution(1.0 - x, b, a, log_beta)
    if x <= 0.0:
        return 0.0
    return math.exp(a * math.log(x) + b * math.log1p(-x) - log_beta) / a / _continued(x, a, b)


def _continued(x: float, a: float, b: float) -> float:
    """1 + d₁/(1 + d₂/(1 + …)) of DLMF 8.17.22, evaluated forwards (Lentz, 1976) until nothing moves any more."""
    value, numerator, denominator = 1.0, 1.0, 0.0
    for step in range(1, 20 + int(10.0 * math.sqrt(a + b))):
        half = step // 2
        if step % 2:
            d = -(a + half) * (a + b + half) * x / ((a + step - 1.0) * (a + step))
        else:
            d = half * (b - half) * x / ((a + step - 1.0) * (a + step))
        denominator = 1.0 / (1.0 + d * denominator or _LEAST)
        numerator = 1.0 + d / numerator or _LEAST
        value *= numerator * denominator
        if abs(numerator * denominator - 1.0) < _CLOSE:
            break
    return value
