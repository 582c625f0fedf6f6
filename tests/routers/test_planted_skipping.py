"""What skipping may not do to the promise, planted: with each rule off promises break, with it they don't."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import binomtest

from routers.foresight_fit import Skipping, Stakes, choose_skipping
from routers.promise import Promise

ALPHA = DELTA = 0.1
SEEDS = 100
LOST = 0.2
"""How much of what would be accepted skipping may lose here: plenty, so that what goes wrong is seen."""

FREE = Stakes(student_s=1.0, student_usd=1.0, teacher_s=0.0, teacher_usd=0.0, waiting_usd_per_s=0.0)
"""Losing costs nothing: as much is skipped as may be."""

Rng = np.random.Generator
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


def broken(life: Callable[[Rng], bool]) -> int:
    return sum(life(np.random.default_rng(seed)) for seed in range(SEEDS))


def kept(count: int) -> bool:
    """Whether `count` broken promises of `SEEDS` are compatible with δ."""
    return bool(binomtest(count, SEEDS, DELTA, alternative="greater").pvalue > 1e-3)


def chosen(foreseen: Floats, accepted: Bools) -> Skipping | None:
    everyone = np.ones(len(foreseen))
    return choose_skipping(
        foreseen, accepted, everyone == 1, everyone, at_most=LOST, certainty=1 - DELTA, stakes=FREE
    )


@pytest.mark.parametrize("tested", [False, True])
def test_what_is_left_after_skipping_is_tested(tested: bool) -> None:
    """A topic that always agrees is foreseen worst: without it what is left disagrees more than α, with it less."""
    share = 0.15
    rest = ALPHA + 0.002

    def life(rng: Rng) -> bool:
        labels = 400
        skippable = rng.random(labels) < share
        foreseen = np.where(skippable, 0.0, 1.0) + rng.random(labels) / 10
        scores = rng.random(labels)
        agreed = np.where(skippable, True, rng.random(labels) >= rest)

        def shown(considered: Bools) -> Bools:
            skipping = chosen(foreseen, considered)
            return np.ones(labels, bool) if skipping is None else foreseen >= skipping.below

        admission = Promise(ALPHA, 1 - DELTA).admit(
            scores, agreed, grid=[0.8, 1.0], shown=shown if tested else None
        )
        if admission.threshold is None:
            return False
        skipping = chosen(foreseen, scores >= admission.threshold)
        return (
            skipping is not None and skipping.below >= 0.1
        )  # then all of the topic is skipped: `rest` > α is left

    count = broken(life)
    assert kept(count) is tested
    assert count > 0, "a rule under which nothing ever passes would be safe too"


@pytest.mark.parametrize("kept_in", [False, True])
def test_what_was_skipped_is_a_label(kept_in: bool) -> None:
    """The last release skipped a topic the next student ranks like the rest, and gets wrong: its rows must count."""

    def life(rng: Rng) -> bool:
        labels = 500
        hard = rng.random(labels) < 0.3
        scores = rng.random(labels)
        agreed = rng.random(labels) >= np.where(hard, 0.4, 0.04)  # 14.8 % of all: above α
        counted = np.ones(labels, bool) if kept_in else ~hard
        return Promise(ALPHA, 1 - DELTA).threshold(scores[counted], agreed[counted]) is not None

    count = broken(life)
    assert kept(count) is kept_in
    if not kept_in:
        assert count > 0.9 * SEEDS
