"""The promise's arithmetic, against SciPy, a brute force and MAPIE; what simulation says is in test_promise_kept.py."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mapie.risk_control import BinaryClassificationController, precision
from numpy.typing import NDArray
from scipy.stats import binom

from routers.promise import COVERAGES, Promise, binomial_tail


def brute_force(
    confidence: Sequence[float],
    agreed: Sequence[bool],
    alpha: float,
    delta: float,
    grid: Sequence[float] = COVERAGES,
) -> float | None:
    """The reference test said slowly: one label at a time, SciPy's binomial."""
    ranked = sorted((c for c in confidence if math.isfinite(c)), reverse=True)
    best = None
    for coverage in grid:
        wanted = math.ceil(coverage * len(confidence) - 1e-6)
        if not ranked:
            break
        cut = ranked[min(wanted, len(ranked)) - 1]
        outcomes = [a for c, a in zip(confidence, agreed, strict=True) if math.isfinite(c) and c >= cut]
        if (1 - alpha) ** len(outcomes) > delta * (1 + 1e-9):
            continue  # even all agreeing would prove nothing
        if binom.cdf(outcomes.count(False), len(outcomes), alpha) > delta:
            break
        best = cut
    return best


def sample(
    seed: int, labels: int, *, worst: float, ties: int | None = None
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Scores in [0, 1] and agreement; disagreement falls from `worst` at score 0 to none at 1."""
    rng = np.random.default_rng(seed)
    scores = rng.random(labels)
    if ties is not None:
        scores = np.round(scores * ties) / ties
    return scores, rng.random(labels) >= worst * (1 - scores) ** 2


@given(st.integers(0, 3000), st.floats(1e-4, 0.999), st.data())
def test_the_p_value_is_the_exact_binomial_one(accepted: int, alpha: float, data: st.DataObject) -> None:
    disagreements = data.draw(st.integers(0, accepted))
    expected = binom.cdf(disagreements, accepted, alpha)
    # Below that it is SciPy that is off: by 1.3e-8 at 12 of 883, α = 0.5625, in exact fractions 8.642028146748712e-290.
    assert binomial_tail(disagreements, accepted, alpha) == pytest.approx(expected, rel=1e-8, abs=1e-200)


def test_the_p_value_is_exact_where_floats_are_small() -> None:
    chance = Fraction(0.5625)
    exact = sum(math.comb(883, k) * chance**k * (1 - chance) ** (883 - k) for k in range(13))
    assert binomial_tail(12, 883, 0.5625) == pytest.approx(float(exact), rel=1e-12)


@pytest.mark.parametrize("ties", [None, 20, 3])
@pytest.mark.parametrize(("alpha", "certainty"), [(0.1, 0.9), (0.05, 0.8), (0.2, 0.99)])
def test_thresholds_are_those_of_a_brute_force(alpha: float, certainty: float, ties: int | None) -> None:
    promise = Promise(alpha, certainty)
    found = []
    for seed in range(40):
        scores, agreed = sample(seed, 60 + 20 * seed, worst=0.5, ties=ties)
        found.append(promise.threshold(scores, agreed))
        assert found[-1] == brute_force(scores.tolist(), agreed.tolist(), alpha, 1 - certainty)
    assert any(threshold is not None for threshold in found), "nothing was compared"
    assert len(set(found)) > 1, "one result compared forty times"


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from([0.1, 0.5, 0.9, 2.0, -3.0, math.nan, math.inf, -math.inf]), st.booleans()),
        max_size=120,
    )
)
def test_scores_that_are_not_finite_are_never_accepted(labels: list[tuple[float, bool]]) -> None:
    confidence = [score for score, _ in labels]
    agreed = [agrees for _, agrees in labels]
    expected = brute_force(confidence, agreed, 0.2, 0.3)
    assert Promise(0.2, 0.7).threshold(confidence, agreed) == expected


def test_a_level_is_the_share_of_all_traffic_of_which_some_has_no_score() -> None:
    scores = np.concatenate([np.linspace(1.0, 2.0, 50), np.full(50, -np.inf)])
    admission = Promise(0.1, 0.9).admit(scores, np.ones(100, dtype=bool))
    assert (admission.threshold, admission.coverage) == (1.0, 0.5)
    assert [level.accepted for level in admission.levels] == [40, 45, 50]


def test_the_sequence_stops_at_the_first_level_that_fails() -> None:
    # The strictest two levels are clean, then 20 disagreements, then hundreds of labels that agree.
    agreed = np.ones(1000, dtype=bool)
    agreed[450:500] = False
    admission = Promise(0.05, 0.9).admit(-np.arange(1000.0), agreed)
    assert [level.passed for level in admission.levels] == [True, True, False]
    assert admission.coverage == 0.45
    assert admission.threshold == -449.0
    assert binom.cdf(50, 1000, 0.05 + 0.02) < 0.1, "the loosest level would have passed, had it been reached"


def test_levels_with_too_few_labels_are_skipped_and_not_failed() -> None:
    admission = Promise(0.1, 0.9).admit(-np.arange(40.0), np.ones(40, dtype=bool))
    skipped = [level for level in admission.levels if level.p_value is None]
    assert [level.accepted for level in skipped] == [16, 18, 20]
    assert not any(level.passed for level in skipped)
    assert admission.levels[3].accepted == 22 and admission.levels[3].passed
    assert admission.coverage == 1.0


@pytest.mark.parametrize(
    ("alpha", "certainty", "labels"), [(0.01, 0.9, 230), (0.1, 0.9, 22), (0.035, 0.9, 65), (0.5, 0.75, 2)]
)
def test_so_many_clean_audits_are_needed(alpha: float, certainty: float, labels: int) -> None:
    promise = Promise(alpha, certainty)
    assert promise.least_accepted == labels
    for count, passes in ((labels - 1, False), (labels, True)):
        found = promise.threshold(np.arange(float(count)), np.ones(count, dtype=bool), grid=[1.0])
        assert (found is not None) is passes


@given(st.floats(1e-6, 0.9), st.floats(0.05, 1 - 1e-9))
def test_one_label_fewer_proves_nothing_however_clean(alpha: float, certainty: float) -> None:
    least = Promise(alpha, certainty).least_accepted
    assert least >= 1
    assert (1 - alpha) ** (least - 1) > (1 - certainty) * (1 - 1e-6)


def test_a_tiny_disagreement_needs_very_many_labels_but_can_be_asked_for() -> None:
    assert Promise(1e-18, 0.9).least_accepted == pytest.approx(math.log(10) * 1e18)


@pytest.mark.parametrize("labels", [0, 1, 10])
@pytest.mark.parametrize("propensity", [None, 0.05])
def test_a_handful_of_labels_proves_nothing(labels: int, propensity: float | None) -> None:
    chances = None if propensity is None else np.full(labels, propensity)
    admission = Promise(0.1, 0.9).admit(np.arange(float(labels)), np.ones(labels, bool), propensity=chances)
    assert admission.threshold is None and admission.coverage is None
    assert all(level.p_value is None for level in admission.levels)


def test_all_agree_accepts_everything_and_all_disagree_nothing() -> None:
    scores = np.random.default_rng(0).random(300)
    promise = Promise(0.1, 0.9)
    assert promise.threshold(scores, np.ones(300, bool)) == scores.min()
    assert promise.threshold(scores, np.zeros(300, bool)) is None


def test_equal_scores_are_one_level() -> None:
    promise = Promise(0.1, 0.9)
    admission = promise.admit(np.full(500, 0.7), np.ones(500, bool))
    assert [(level.threshold, level.accepted) for level in admission.levels] == [(0.7, 500)]
    agreed = np.ones(500, bool)
    agreed[:50] = False
    assert promise.threshold(np.full(500, 0.7), agreed) is None


def test_almost_certain_is_almost_impossible_and_does_not_overflow() -> None:
    scores, agreed = np.arange(2000.0), np.ones(2000, bool)
    assert Promise(0.1, 1 - 1e-15).threshold(scores, agreed) == 0.0
    agreed[::11] = False
    assert Promise(0.1, 1 - 1e-15).threshold(scores, agreed) is None


@pytest.mark.parametrize("value", [0.0, 1.0, -0.1, 1.5, math.nan, math.inf])
def test_promises_that_mean_nothing_are_refused(value: float) -> None:
    with pytest.raises(ValueError, match="max_disagreement must lie between 0 and 1"):
        Promise(value, 0.9)
    with pytest.raises(ValueError, match="certainty must lie between 0 and 1"):
        Promise(0.1, value)


@pytest.mark.parametrize(
    ("confidence", "agreed", "propensity"),
    [
        (np.zeros(3), np.ones(2, bool), None),
        (np.zeros(3), np.ones(3, bool), np.ones(2)),
        (np.zeros((3, 1)), np.ones(3, bool), None),
        (np.zeros(3), np.ones((3, 1), bool), None),
        (0.5, True, None),
        (np.zeros(3), np.ones(3, bool), 0.05),
    ],
)
def test_arrays_that_do_not_fit_are_refused(confidence: object, agreed: object, propensity: object) -> None:
    with pytest.raises(ValueError, match="one-dimensional and equally long"):
        Promise(0.1, 0.9).threshold(confidence, agreed, propensity=propensity)  # type: ignore[arg-type]


@pytest.mark.parametrize("propensity", [0.0, -0.5, 1.01, math.nan, math.inf])
def test_impossible_propensities_are_refused(propensity: float) -> None:
    with pytest.raises(ValueError, match=r"must lie in \(0, 1\]"):
        Promise(0.1, 0.9).threshold(np.zeros(3), np.ones(3, bool), propensity=[1.0, propensity, 1.0])


@pytest.mark.parametrize("agreed", [[True, None], [1.0, math.nan], [0.3, 1.0], [2, 1], ["yes", "no"]])
def test_labels_that_are_neither_true_nor_false_are_refused(agreed: list[object]) -> None:
    with pytest.raises(ValueError, match="missing is False"):
        Promise(0.1, 0.9).threshold([0.1, 0.2], agreed)  # type: ignore[arg-type]


def test_labels_may_be_zeros_and_ones() -> None:
    scores, agreed = sample(3, 400, worst=0.5)
    promise = Promise(0.1, 0.9)
    expected = promise.threshold(scores, agreed)
    assert expected is not None
    assert promise.threshold(scores.tolist(), agreed.astype(int).tolist()) == expected
    assert promise.threshold(scores, agreed.astype(float)) == expected


@pytest.mark.parametrize("coverage", [0.0, -0.1, 1.2, math.nan])
def test_impossible_coverages_are_refused(coverage: float) -> None:
    with pytest.raises(ValueError, match="a coverage must lie in"):
        Promise(0.1, 0.9).threshold(np.zeros(3), np.ones(3, bool), grid=[coverage])


def test_the_grid_can_be_given() -> None:
    scores, agreed = -np.arange(500.0), np.ones(500, bool)
    admission = Promise(0.1, 0.9).admit(scores, agreed, grid=[0.1, 0.123, 0.9])
    assert [level.accepted for level in admission.levels] == [50, 62, 450]
    assert admission.threshold == -449.0
    assert Promise(0.1, 0.9).threshold(scores, agreed, grid=[]) is None


@pytest.mark.filterwarnings("ignore:Fixed sequence testing requires:UserWarning")
@pytest.mark.parametrize("seed", range(12))
def test_never_stricter_than_mapie_on_the_same_grid(seed: int) -> None:
    alpha, certainty = [(0.1, 0.9), (0.05, 0.9), (0.15, 0.95)][seed % 3]
    scores, agreed = sample(seed, 1000 + 100 * seed, worst=6 * alpha)
    cuts = np.array([np.sort(scores)[::-1][math.ceil(c * len(scores) - 1e-6) - 1] for c in COVERAGES])
    theirs = BinaryClassificationController(
        predict_function=lambda given: np.column_stack([1 - given[:, 0], given[:, 0]]),
        risk=precision,
        target_level=1 - alpha,
        confidence_level=certainty,
        list_predict_params=cuts,
        fwer_method="fixed_sequence",
    )
    theirs.calibrate(scores[:, None], agreed.astype(int))
    admitted = np.asarray(theirs.valid_predict_params)
    ours = Promise(alpha, certainty).threshold(scores, agreed)
    assert len(admitted), "nothing to compare with"
    assert ours is not None and ours <= admitted.min()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(20, 300), st.floats(0.0, 1.0))
def test_what_must_not_matter_and_what_must_only_help(seed: int, labels: int, worst: float) -> None:
    scores, agreed = sample(seed, labels, worst=worst, ties=30)
    asked = Promise(0.1, 0.8).threshold(scores, agreed)

    def no_stricter(this: float | None, than: float | None) -> bool:
        return than is None or (this is not None and this <= than)

    order = np.random.default_rng(seed + 1).permutation(labels)
    assert Promise(0.1, 0.8).threshold(scores[order], agreed[order]) == asked
    # Half of a sample of halves is a simple random sample too.
    assert Promise(0.1, 0.8).threshold(scores, agreed, propensity=np.full(labels, 0.5)) == asked
    # Any increasing transformation ranks alike.
    moved = Promise(0.1, 0.8).threshold(np.exp(scores), agreed)
    assert moved == (None if asked is None else pytest.approx(math.exp(asked)))
    assert no_stricter(asked, Promise(0.1, 0.95).threshold(scores, agreed))
    # A disagreement turned into agreement can only help.
    if not agreed.all():
        better = agreed.copy()
        better[np.flatnonzero(~agreed)[0]] = True
        assert no_stricter(Promise(0.1, 0.8).threshold(scores, better), asked)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.02, 0.3), st.floats(0.02, 0.3))
def test_a_larger_alpha_admits_at_least_as_much(seed: int, one: float, other: float) -> None:
    # With enough labels for every level: a level skipped under the small α may be the one that fails under the large.
    scores, agreed = sample(seed, 1000, worst=0.4)
    small, large = sorted((one, other))
    strict = Promise(small, 0.8)
    assert strict.least_accepted <= 400
    lenient = Promise(large, 0.8).threshold(scores, agreed)
    found = strict.threshold(scores, agreed)
    assert found is None or (lenient is not None and lenient <= found)


def test_thinning_keeps_every_rare_label_and_knows_nothing_of_agreement() -> None:
    rng = np.random.default_rng(5)
    scores = rng.random(4000)
    chances = np.where(scores > 0.5, 0.1, 1.0)
    admission = Promise(0.1, 0.9).admit(scores, np.ones(4000, bool), propensity=chances, grid=[0.5, 1.0])
    rare = int((scores > 0.5).sum())
    first, last = admission.levels
    assert 0 < first.accepted <= rare  # weighted, half of the traffic lies among the rare
    expected = rare + 0.1 * (4000 - rare)
    assert abs(last.accepted - expected) < 4 * math.sqrt(0.09 * 4000)
    again = Promise(0.1, 0.9).admit(scores, np.ones(4000, bool), propensity=chances, grid=[0.5, 1.0])
    assert again == admission
    other = Promise(0.1, 0.9, seed=1).admit(scores, np.ones(4000, bool), propensity=chances, grid=[0.5, 1.0])
    assert other.levels[1].accepted != last.accepted
    worse = Promise(0.1, 0.9).admit(scores, rng.random(4000) > 0.02, propensity=chances, grid=[0.5, 1.0])
    assert [level.accepted for level in worse.levels] == [level.accepted for level in admission.levels]
