"""Bets on the promise: fair whatever comes, allowed to be looked at after every label, and what that costs."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from routers.evalues import BettingPromise, betting_tail, log_evidence
from routers.promise import Promise, binomial_tail

ALPHA = DELTA = 0.1


@settings(deadline=None, max_examples=25)
@given(
    st.floats(0.01, 0.6),
    st.lists(st.sampled_from([1.0, 0.5, 0.05]), min_size=1, max_size=7),
    st.floats(0.02, 0.9),
)
def test_the_stake_is_fair_and_seldom_large(alpha: float, chances: list[float], delta: float) -> None:
    """All ways a few labels at exactly α can come: the stake's mean is 1, and 1/δ is ever reached with δ at most."""
    weights = 1.0 / np.array(chances)
    floors = np.minimum.accumulate(chances)  # the least so far is one way to know a bound beforehand
    mean = reached = 0.0
    for disagrees in itertools.product([False, True], repeat=len(chances)):
        gain = weights * np.where(disagrees, alpha - 1.0, alpha)
        evidence = log_evidence(gain, (1.0 - alpha) / floors)
        chance = math.prod(alpha if one else 1.0 - alpha for one in disagrees)
        mean += chance * math.exp(evidence[-1])
        reached += chance * bool((np.exp(evidence) >= 1.0 / delta).any())
    assert mean == pytest.approx(1.0, rel=1e-9)
    assert reached <= delta + 1e-9


@given(st.integers(0, 60), st.integers(0, 60), st.floats(0.01, 0.5), st.integers(0, 10**6))
def test_bets_on_labels_that_count_alike_dont_care_for_their_order(
    agreed: int, wrong: int, alpha: float, seed: int
) -> None:
    disagrees = np.random.default_rng(seed).permutation(np.arange(agreed + wrong) < wrong)
    evidence = log_evidence(np.where(disagrees, alpha - 1.0, alpha), np.full(len(disagrees), 1.0 - alpha))
    last = float(evidence[-1]) if len(evidence) else 0.0
    assert betting_tail(wrong, agreed + wrong, alpha) == pytest.approx(math.exp(-max(0.0, last)), rel=1e-6)


@given(st.integers(0, 300), st.integers(0, 300), st.floats(0.01, 0.5))
def test_peeking_is_paid_for(agreed: int, wrong: int, alpha: float) -> None:
    assert betting_tail(wrong, agreed + wrong, alpha) >= binomial_tail(wrong, agreed + wrong, alpha) * (
        1 - 1e-9
    )


@pytest.mark.parametrize(
    ("alpha", "certainty", "labels"), [(0.1, 0.9, 34), (0.05, 0.94, 82), (0.01, 0.9, 359)]
)
def test_so_many_clean_labels_are_needed(alpha: float, certainty: float, labels: int) -> None:
    promise = BettingPromise(alpha, certainty)
    assert promise.least_accepted == labels
    for count in (labels - 1, labels):
        found = promise.admit(np.zeros(count), np.ones(count, bool), [0.0])
        assert (found.threshold is not None) is (count == labels)


def lives(kind: str, rate: float, count: int = 400, length: int = 1500) -> int:
    """Of lives of so many exchanges at one true disagreement everywhere, those that are ever admitted.

    `reference`: every label counts alike. `weighted`: a release answers half of the traffic, of which one in twenty is
    audited. Asked after every label: a level passes if its evidence was ever enough.
    """
    admitted = 0
    for seed in range(count):
        rng = np.random.default_rng(seed)
        rank, agreed = rng.random(length), rng.random(length) >= rate
        chances = np.where(rank >= 0.5, 0.05, 1.0) if kind == "weighted" else np.ones(length)
        seen = rng.random(length) < chances
        floors = np.full(int(seen.sum()), chances.min())
        found = BettingPromise(ALPHA, 1 - DELTA).admit(
            rank[seen], agreed[seen], [0.6, 0.3, 0.0], propensity=chances[seen], least=floors
        )
        admitted += found.threshold is not None
    return admitted


@pytest.mark.parametrize("kind", ["reference", "weighted"])
def test_promises_are_kept_however_often_one_looks(kind: str) -> None:
    broken = lives(kind, ALPHA)
    assert binomtest(broken, 400, DELTA, alternative="greater").pvalue > 1e-3, f"{broken} of 400"


def test_they_are_not_kept_by_never_admitting_anything() -> None:
    assert lives("reference", ALPHA) > 0.3 * DELTA * 400
    assert lives("reference", 0.05, 100) >= 90
    assert lives("weighted", 0.0, 100, length=4000) >= 90


def test_looking_after_every_label_breaks_what_the_exact_test_promises() -> None:
    broken = 0
    for seed in range(200):
        agreed = np.random.default_rng(seed).random(400) >= ALPHA
        wrong = np.cumsum(~agreed)
        broken += any(binomial_tail(int(wrong[n - 1]), n, ALPHA) <= DELTA for n in range(22, 401))
    assert broken > 3 * DELTA * 200


def test_bets_without_weights_break_the_promise_where_hard_requests_are_labelled_less() -> None:
    """What the live release answers is worse and rarely labelled: taken as they come, labels look good."""
    broken = {True: 0, False: 0}
    for seed in range(100):
        rng = np.random.default_rng(seed)
        served = rng.random(4000) < 0.5
        agreed = rng.random(4000) >= np.where(served, 0.21, 0.02)
        chances = np.where(served, 0.05, 1.0)
        seen = rng.random(4000) < chances
        zeros, floors = np.zeros(int(seen.sum())), np.full(int(seen.sum()), 0.05)
        for weighted in broken:
            found = BettingPromise(ALPHA, 1 - DELTA).admit(
                zeros,
                agreed[seen],
                [0.0],
                propensity=chances[seen] if weighted else None,
                least=floors if weighted else None,
            )
            broken[weighted] += found.threshold is not None
    assert broken[False] == 100
    assert binomtest(broken[True], 100, DELTA, alternative="greater").pvalue > 1e-3


def test_levels_pass_from_strict_to_loose_and_stay_passed() -> None:
    rng = np.random.default_rng(1)
    rank = rng.random(3000)
    agreed = rng.random(3000) >= np.where(rank >= 0.5, 0.02, 0.4)
    promise = BettingPromise(ALPHA, 1 - DELTA)
    found = promise.admit(rank, agreed, [0.8, 0.5, 0.2, 0.0])
    assert [level.passed for level in found.levels] == [True, True, False]
    assert found.threshold == 0.5
    assert found.coverage == pytest.approx(0.5, abs=0.03)
    passed = [promise.admit(rank[:n], agreed[:n], [0.8, 0.5]).threshold for n in range(0, 3000, 100)]
    cuts = [math.inf if cut is None else cut for cut in passed]
    assert cuts == sorted(cuts, reverse=True), "evidence that was there once counts"
    late = np.concatenate([agreed, np.zeros(500, bool)])
    assert promise.admit(np.append(rank, np.ones(500)), late, [0.8]).threshold == 0.8


def test_what_is_refused_or_has_no_rank_is_not_bet_on() -> None:
    agreed = np.arange(200) % 2 == 0
    promise = BettingPromise(ALPHA, 1 - DELTA)
    assert promise.admit(np.zeros(200), agreed, [0.0], refused=[~agreed]).threshold == 0.0
    ranks = np.where(agreed, 0.0, np.nan)
    assert promise.admit(ranks, agreed, [-1.0]).levels[0].accepted == 100


@pytest.mark.parametrize("labels", [0, 1, 10])
def test_a_handful_of_labels_proves_nothing(labels: int) -> None:
    assert (
        BettingPromise(ALPHA, 1 - DELTA).admit(np.zeros(labels), np.ones(labels, bool), [0.0]).threshold
        is None
    )
    assert Promise(ALPHA, 1 - DELTA).threshold(np.zeros(labels), np.ones(labels, bool)) is None


def test_all_disagree() -> None:
    (level,) = BettingPromise(ALPHA, 1 - DELTA).admit(np.zeros(50), np.zeros(50, bool), [0.0]).levels
    assert (level.passed, level.p_value, level.disagreements) == (False, 1.0, 50)


@pytest.mark.parametrize(
    ("gain", "worst"), [([0.1], [0.0]), ([-2.0], [1.0]), ([math.nan], [1.0]), ([math.inf], [1.0])]
)
def test_a_gain_below_what_could_be_lost_is_refused(gain: list[float], worst: list[float]) -> None:
    with pytest.raises(ValueError, match="no gain may be below"):
        log_evidence(gain, worst)


def test_arrays_that_dont_fit_are_refused() -> None:
    promise = BettingPromise(0.1, 0.9)
    with pytest.raises(ValueError, match="equally long"):
        promise.admit(np.zeros(3), np.ones(2, bool), [0.0])
    with pytest.raises(ValueError, match="equally long"):
        log_evidence([0.1, 0.1], [1.0])
    for propensity, least in ((0.5, 0.6), (0.0, 0.0), (1.1, 1.0), (math.nan, 0.5)):
        with pytest.raises(ValueError, match="propensity"):
            promise.admit([0.0], [True], [0.0], propensity=[propensity], least=[least])


@pytest.mark.parametrize("value", [0.0, 1.0, -0.1, math.nan])
def test_promises_that_mean_nothing_are_refused(value: float) -> None:
    with pytest.raises(ValueError, match="max_disagreement must lie"):
        BettingPromise(value, 0.9)
    with pytest.raises(ValueError, match="certainty must lie"):
        BettingPromise(0.1, value)
