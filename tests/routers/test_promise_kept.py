"""Whether promises are kept: many draws from traffic whose disagreement is known, counted against δ."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import binomtest

from routers.promise import Promise
from routers.propensity import Period, pooled_propensity

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

ALPHA = DELTA = 0.1
DRAWS = 1000


@dataclass(frozen=True)
class Traffic:
    """Scores are uniform on [0, 1]; bands of `(lowest score, disagreement)`, highest first."""

    bands: tuple[tuple[float, float], ...]

    def disagreement(self, scores: Floats) -> Floats:
        lows = [low for low, _ in reversed(self.bands)]
        rates = np.array([rate for _, rate in reversed(self.bands)])
        return rates[np.searchsorted(lows, scores, side="right") - 1]

    def of_accepted(self, threshold: float) -> float:
        """The true disagreement of what scores at least `threshold`."""
        high, wrong = 1.0, 0.0
        for low, rate in self.bands:
            wrong += max(0.0, high - max(low, threshold)) * rate
            high = min(high, low)
        return wrong / (1.0 - threshold)


AT_ALPHA = Traffic(((0.0, ALPHA),))
"""Exactly α at every threshold: whatever is admitted is wrong to be."""

GOOD_THEN_AT_ALPHA = Traffic(((0.6, 0.05), (0.56, 0.6005), (0.0, ALPHA + 1e-3)))
"""40 % may be accepted; from 45 % on disagreement is α and a hair at every level of the grid."""

FALLING = Traffic(tuple((1 - c / 40, 0.45 * (c / 40) ** 2) for c in range(1, 41)))
"""Surer is better; more than about 80 % must not be accepted."""

Draw = Callable[[np.random.Generator], tuple[Floats, Floats | None]]


def simple(labels: int) -> Draw:
    """Only coin-selected exchanges: the reference test."""
    return lambda rng: (rng.random(labels), None)


def raw(traffic: int, cut: float, rate: float = 0.05) -> Draw:
    """One release that accepts from `cut` on, no day 0; each label has its own propensity, 1 or the audit rate."""

    def draw(rng: np.random.Generator) -> tuple[Floats, Floats]:
        scores = rng.random(traffic)
        chances = np.where(scores >= cut, rate, 1.0)
        labelled = rng.random(traffic) < chances
        return scores[labelled], chances[labelled]

    return draw


def pooled(*periods: tuple[int, float | None, float]) -> Draw:
    """Periods of `(traffic, cut or None for day 0, audit rate)`, pooled."""

    def draw(rng: np.random.Generator) -> tuple[Floats, Floats]:
        labelled = []
        for traffic, cut, rate in periods:
            scores = rng.random(traffic)
            accepted = scores >= (np.inf if cut is None else cut)
            labelled.append(scores[~accepted | (rng.random(traffic) < rate)])
        scores = np.concatenate(labelled)
        chances = pooled_propensity(
            [
                Period(traffic, rate, scores >= (np.inf if cut is None else cut))
                for traffic, cut, rate in periods
            ]
        )
        return scores, chances

    return draw


DRAWN: dict[str, Draw] = {
    "reference": simple(600),
    "weighted": raw(6000, cut=0.5),
    "pooled": pooled((150, None, 0.05), (3000, 0.6, 0.05), (3000, 0.45, 0.02)),
}


def thresholds(traffic: Traffic, draw: Draw, draws: int = DRAWS) -> list[float | None]:
    rng = np.random.default_rng(20)
    found = []
    for seed in range(draws):
        scores, chances = draw(rng)
        agreed = rng.random(len(scores)) >= traffic.disagreement(scores)
        found.append(Promise(ALPHA, 1 - DELTA, seed=seed).threshold(scores, agreed, propensity=chances))
    return found


def broken(traffic: Traffic, found: list[float | None]) -> int:
    return sum(t is not None and traffic.of_accepted(t) >= ALPHA - 1e-12 for t in found)


@pytest.mark.parametrize("labels", DRAWN)
@pytest.mark.parametrize(
    "traffic", [AT_ALPHA, GOOD_THEN_AT_ALPHA, FALLING], ids=["at_alpha", "good_then_at_alpha", "falling"]
)
def test_promises_are_kept(traffic: Traffic, labels: str) -> None:
    count = broken(traffic, thresholds(traffic, DRAWN[labels]))
    assert binomtest(count, DRAWS, DELTA, alternative="greater").pvalue > 1e-3, f"{count} of {DRAWS} broken"


@pytest.mark.parametrize("labels", DRAWN)
def test_a_good_student_is_admitted(labels: str) -> None:
    found = thresholds(FALLING, DRAWN[labels], 200)
    assert sum(t is not None and t <= 0.5 for t in found) >= 160


def test_the_test_is_nearly_exact_where_the_student_sits_at_alpha() -> None:
    # Not just safe: a test that never admits would be too.
    assert broken(AT_ALPHA, thresholds(AT_ALPHA, DRAWN["reference"])) > DRAWS * DELTA * 0.4


def test_pooling_admits_more_than_own_propensities() -> None:
    """The same labels, weighted by the pooled propensity and by their own."""
    rng = np.random.default_rng(3)
    admitted = {"pooled": 0, "own": 0}
    for seed in range(200):
        scores = rng.random(2000)
        early = np.arange(2000) < 300
        own = np.where(~early & (scores >= 0.5), 0.05, 1.0)
        labelled = rng.random(2000) < own
        scores, own = scores[labelled], own[labelled]
        agreed = rng.random(len(scores)) >= FALLING.disagreement(scores)
        together = pooled_propensity(
            [Period(300, 0.05, np.zeros(len(scores), bool)), Period(1700, 0.05, scores >= 0.5)]
        )
        promise = Promise(ALPHA, 1 - DELTA, seed=seed)
        for name, chances in (("pooled", together), ("own", own)):
            found = promise.threshold(scores, agreed, propensity=chances)
            admitted[name] += found is not None and found <= 0.45
    assert admitted["pooled"] > 2 * admitted["own"]
