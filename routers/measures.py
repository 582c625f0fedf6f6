"""How well a ranking separates answers that agree from answers that don't. For reports: nothing is decided by these.

Everywhere `confidence` float[n] ranks n labelled exchanges and must not have been fitted on them; what isn't finite
ranks below everything, as in the router. `agreed` bool[n] says which student answers agreed; a label that is missing
is False (STATISTICS.md §2). `weight` float[n] is 1/propensity, None where all labels had the same chance to be.
Equal confidences count as one level: in what order they come changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from routers.intervals import CERTAINTY, Share, share

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

BINS = 10
BinKind = Literal["equal_mass", "equal_width"]


@dataclass(frozen=True, slots=True)
class Curve:
    """Risk by coverage, strict to loose: one entry for each distinct finite confidence, float[k].

    Accepting what is at least `threshold` answers the share `coverage` of the traffic, and of those answers the share
    `risk` disagrees.
    """

    threshold: Floats
    coverage: Floats
    risk: Floats


@dataclass(frozen=True, slots=True)
class Selected:
    """What one threshold accepts: the share of the traffic, and of that the share that disagrees."""

    threshold: float
    coverage: Share
    risk: Share


@dataclass(frozen=True, slots=True)
class Bin:
    """Exchanges of like confidence: from `low` to `high`, the `mass` they have of all traffic, and what agreed."""

    low: float
    high: float
    mass: float
    confidence: float
    agreement: Share


@dataclass(frozen=True, slots=True)
class Slice:
    """Exchanges the student gave the same answer to, and the share of them that disagrees."""

    key: str
    risk: Share


def risk_coverage(confidence: ArrayLike, agreed: ArrayLike, weight: ArrayLike | None = None) -> Curve:
    """The curve of selective risk (El-Yaniv & Wiener, 2010). Empty without a finite confidence."""
    scores, agreeing, weights = _checked(confidence, agreed, weight)
    levels, mass, wrong = _by_level(scores, agreeing, weights)
    finite = np.isfinite(levels)
    accepted = np.cumsum(mass)
    if len(mass) == 0:
        return Curve(levels, mass, wrong)
    return Curve(levels[finite], (accepted / accepted[-1])[finite], (np.cumsum(wrong) / accepted)[finite])


def aurc(confidence: ArrayLike, agreed: ArrayLike, weight: ArrayLike | None = None) -> float | None:
    """The area under the risk–coverage curve: the mean over i of the risk among the i most confident.

    Geifman & El-Yaniv (arXiv 1705.08500); a rank counts as much as its exchange weighs. Disagreements within equal
    confidences are spread evenly, which is what a random order of them gives on average. Lower is better; None without
    labels. The best that can be had with these answers is `aurc(agreed, agreed, weight)`.
    """
    scores, agreeing, weights = _checked(confidence, agreed, weight)
    if len(scores) == 0:
        return None
    order = np.lexsort((weights, -scores))
    levels, mass, wrong = _by_level(scores, agreeing, weights)
    level = np.searchsorted(-levels, -scores[order])
    risk = np.cumsum(weights[order] * (wrong / mass)[level]) / np.cumsum(weights[order])
    return float(np.average(risk, weights=weights[order]))


def select(
    confidence: ArrayLike,
    agreed: ArrayLike,
    threshold: float,
    weight: ArrayLike | None = None,
    *,
    certainty: float = CERTAINTY,
) -> Selected:
    """What `threshold` accepts, with intervals. Each is for one threshold that was chosen without these labels."""
    scores, agreeing, weights = _checked(confidence, agreed, weight)
    accepted = np.isfinite(scores) & (scores >= threshold)
    return accept(accepted, agreeing, weights, threshold=threshold, certainty=certainty)


def accept(
    accepted: ArrayLike,
    agreed: ArrayLike,
    weight: ArrayLike | None = None,
    *,
    threshold: float = float("nan"),
    certainty: float = CERTAINTY,
) -> Selected:
    """As `select`, for decisions `accepted` bool[n] that are known (a router has more rules than its threshold)."""
    taken = np.asarray(accepted, dtype=np.bool_)
    _, agreeing, weights = _checked(taken, agreed, weight)
    return Selected(
        threshold,
        share(taken, weights, certainty=certainty),
        share(~agreeing[taken], weights[taken], certainty=certainty),
    )


def reliability(
    confidence: ArrayLike,
    agreed: ArrayLike,
    weight: ArrayLike | None = None,
    *,
    bins: int = BINS,
    kind: BinKind = "equal_mass",
    certainty: float = CERTAINTY,
) -> list[Bin]:
    """Whether what is said with confidence p agrees in a share p of cases, by bins; empty ones are left out.

    `equal_mass`: each has about the same share of the traffic (equal confidences stay together). `equal_width`: 0 to
    1 in equal steps. Raises ValueError where a confidence is no probability.
    """
    scores, agreeing, weights = _checked(confidence, agreed, weight)
    if not ((scores >= 0.0) & (scores <= 1.0)).all():
        raise ValueError("for reliability each confidence must be a probability, from 0 to 1")
    if len(scores) == 0:
        return []
    if kind == "equal_width":
        place = np.minimum((scores * bins).astype(np.intp), bins - 1)
    else:
        levels, mass, _ = _by_level(scores, agreeing, weights)
        middle = (np.cumsum(mass) - mass / 2.0) / mass.sum()
        place = (bins - 1 - (middle * bins).astype(np.intp))[np.searchsorted(-levels, -scores)]
    found = []
    for number in np.unique(place):
        inside = place == number
        low, high = float(scores[inside].min()), float(scores[inside].max())
        if kind == "equal_width":
            low, high = float(number) / bins, float(number + 1) / bins
        found.append(
            Bin(
                low=low,
                high=high,
                mass=float(weights[inside].sum() / weights.sum()),
                confidence=float(np.average(scores[inside], weights=weights[inside])),
                agreement=share(agreeing[inside], weights[inside], certainty=certainty),
            )
        )
    return found


def expected_calibration_error(bins: Sequence[Bin]) -> float | None:
    """ECE: the mean of |agreement − confidence| over bins, by their mass (Naeini et al., 2015). None without bins.

    It depends on the kind and number of the bins: state them beside it.
    """
    if not bins:
        return None
    return float(sum(b.mass * abs((b.agreement.value or 0.0) - b.confidence) for b in bins))


def worst_slices(
    keys: Sequence[str],
    agreed: ArrayLike,
    weight: ArrayLike | None = None,
    *,
    least: int = 5,
    most: int | None = 10,
    certainty: float = CERTAINTY,
) -> list[Slice]:
    """Exchanges by the answer the student gave, at least `least` each, the one most surely bad first.

    In the order of the lower ends of their intervals: 1 of 5 is less telling than 20 of 100. The worst of many look
    bad by chance too: nothing here corrects for that.
    """
    _, agreeing, weights = _checked(np.zeros(len(keys)), agreed, weight)
    members: dict[str, list[int]] = {}
    for index, key in enumerate(keys):
        members.setdefault(key, []).append(index)
    slices = [
        Slice(key, share(~agreeing[index], weights[index], certainty=certainty))
        for key, index in members.items()
        if len(index) >= least
    ]
    slices.sort(key=lambda one: (-one.risk.low, -(one.risk.value or 0.0), -one.risk.count, one.key))
    return slices[:most]


def _by_level(scores: Floats, agreeing: Bools, weights: Floats) -> tuple[Floats, Floats, Floats]:
    """The distinct confidences, highest first, the weight at each, and that of what disagrees there."""
    negated, level = np.unique(-scores, return_inverse=True)
    mass: Floats = np.zeros(len(negated))
    wrong: Floats = np.zeros(len(negated))
    np.add.at(mass, level, weights)
    np.add.at(wrong, level, weights * ~agreeing)
    return -negated, mass, wrong


def _checked(
    confidence: ArrayLike, agreed: ArrayLike, weight: ArrayLike | None
) -> tuple[Floats, Bools, Floats]:
    scores, given = np.asarray(confidence, dtype=np.float64), np.asarray(agreed)
    weights = np.ones(scores.shape) if weight is None else np.asarray(weight, dtype=np.float64)
    if not scores.ndim == given.ndim == weights.ndim == 1 or not len(scores) == len(given) == len(weights):
        raise ValueError(
            "confidence, agreed and weight must be one-dimensional and equally long, "
            f"got shapes {scores.shape}, {given.shape} and {weights.shape}"
        )
    # NaN is truthy: a label that is missing in a table would count as agreement.
    if given.dtype != np.bool_ and not np.isin(given, (0, 1)).all():
        raise ValueError(
            "agreed must hold booleans (a label that is missing is False: it counts as disagreement)"
        )
    if not ((weights > 0.0) & np.isfinite(weights)).all():
        raise ValueError("every weight must be above 0 and finite: it is 1/propensity")
    return np.where(np.isfinite(scores), scores, -np.inf), given.astype(np.bool_), weights
