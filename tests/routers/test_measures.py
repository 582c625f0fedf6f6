"""Measures of a ranking: by hand, by what they may not depend on, and against scikit-learn where it has the same."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import ArrayLike
from sklearn.calibration import calibration_curve

from routers.measures import (
    BinKind,
    accept,
    aurc,
    expected_calibration_error,
    reliability,
    risk_coverage,
    select,
    worst_slices,
)

LABELS = st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=1, max_size=30)
DISTINCT = st.lists(
    st.tuples(st.integers(-50, 50), st.booleans(), st.floats(0.5, 20.0)),
    min_size=1,
    max_size=30,
    unique_by=lambda one: one[0],
)


def test_risk_coverage_by_hand() -> None:
    curve = risk_coverage([0.9, 0.7, 0.7, 0.2], [True, True, False, False])
    assert curve.threshold.tolist() == [0.9, 0.7, 0.2]
    assert curve.coverage.tolist() == [0.25, 0.75, 1.0]
    assert curve.risk.tolist() == pytest.approx([0.0, 1 / 3, 0.5])


def test_weights_stand_for_traffic() -> None:
    curve = risk_coverage([0.9, 0.2], [False, True], [3.0, 1.0])
    assert curve.coverage.tolist() == [0.75, 1.0]
    assert curve.risk.tolist() == [1.0, 0.75]


def test_what_isnt_finite_is_never_accepted() -> None:
    curve = risk_coverage([0.9, math.nan, math.inf, -math.inf], [True, True, True, False])
    assert curve.threshold.tolist() == [0.9]
    assert curve.coverage.tolist() == [0.25]
    assert select([0.9, math.nan, math.inf], [True, True, True], -1e9).coverage.value == pytest.approx(1 / 3)
    assert len(risk_coverage([math.nan], [True]).risk) == 0


def test_aurc_by_hand() -> None:
    # Risks among the 1, 2, 3, 4 most confident: 0, 1/2, 1/3, 1/2.
    assert aurc([4, 3, 2, 1], [True, False, True, False]) == pytest.approx((0 + 1 / 2 + 1 / 3 + 1 / 2) / 4)
    assert aurc([1, 1, 1, 1], [True, False, True, False]) == pytest.approx(0.5)
    assert aurc([2, 1], [True, False], [3.0, 1.0]) == pytest.approx((3 * 0 + 1 * 0.25) / 4)
    assert aurc([], []) is None
    assert aurc([2, 1], [True, True]) == 0.0
    assert aurc([2, 1], [False, False]) == 1.0


def test_ties_are_what_a_random_order_gives_on_average() -> None:
    scores, agreed = np.array([2, 1, 1, 1, 1, 0]), np.array([True, False, True, True, False, False])
    chance = np.random.default_rng(1)
    orders = [aurc(scores + chance.random(6) / 2, agreed) for _ in range(3000)]
    assert np.mean([value for value in orders if value is not None]) == pytest.approx(
        aurc(scores, agreed), abs=0.01
    )


@given(LABELS)
def test_no_ranking_beats_the_one_that_knows(labels: list[tuple[int, bool]]) -> None:
    scores, agreed = zip(*labels, strict=True)
    best, found, worst = aurc(agreed, agreed), aurc(scores, agreed), aurc(~np.array(agreed), agreed)
    assert best is not None
    assert found is not None
    assert worst is not None
    assert best - 1e-12 <= found <= worst + 1e-12


@given(DISTINCT)
def test_only_the_order_counts(labels: list[tuple[int, bool, float]]) -> None:
    scores, agreed, weights = (np.array(column) for column in zip(*labels, strict=True))
    order = np.random.default_rng(len(scores)).permutation(len(scores))
    for other in (np.exp(scores / 25.0), 7.0 * scores - 3.0):
        assert aurc(other, agreed, weights) == pytest.approx(aurc(scores, agreed, weights))
        assert risk_coverage(other, agreed, weights).risk == pytest.approx(
            risk_coverage(scores, agreed, weights).risk
        )
    assert aurc(scores[order], agreed[order], 2.0 * weights[order]) == pytest.approx(
        aurc(scores, agreed, weights)
    )


@given(DISTINCT)
def test_the_curve_ends_with_everything(labels: list[tuple[int, bool, float]]) -> None:
    scores, agreed, weights = (np.array(column) for column in zip(*labels, strict=True))
    curve = risk_coverage(scores, agreed, weights)
    assert curve.coverage[-1] == pytest.approx(1.0)
    assert curve.risk[-1] == pytest.approx(np.average(~agreed, weights=weights))
    assert (np.diff(curve.coverage) > 0).all()
    for threshold, coverage, risk in zip(curve.threshold, curve.coverage, curve.risk, strict=True):
        selected = select(scores, agreed, float(threshold), weights)
        assert (selected.coverage.value, selected.risk.value) == pytest.approx((coverage, risk))


def test_a_threshold_by_hand() -> None:
    found = select([0.9, 0.8, 0.3, 0.1], [True, False, True, False], 0.5)
    assert (found.coverage.value, found.coverage.count) == (0.5, 4)
    assert (found.risk.value, found.risk.count, found.risk.exact) == (0.5, 2, True)
    assert found.risk.low == pytest.approx(0.0125791, abs=1e-6)
    nothing = accept([False, False], [True, False])
    assert (nothing.coverage.value, nothing.risk.value, nothing.risk.high) == (0.0, None, 1.0)


def test_reliability_is_scikit_learns() -> None:
    chance = np.random.default_rng(3)
    confidence = chance.random(500)
    agreed = chance.random(500) < confidence**2
    kinds: tuple[tuple[BinKind, str], ...] = (("equal_width", "uniform"), ("equal_mass", "quantile"))
    for kind, strategy in kinds:
        bins = reliability(confidence, agreed, kind=kind)
        share_agreed, mean = calibration_curve(agreed, confidence, n_bins=10, strategy=strategy)
        assert [b.agreement.value for b in bins] == pytest.approx(share_agreed, abs=0.03)
        assert [b.confidence for b in bins] == pytest.approx(mean, abs=0.01)
        assert sum(b.mass for b in bins) == pytest.approx(1.0)


def test_calibration_error_by_hand() -> None:
    bins = reliability([0.95, 0.95, 0.15, 0.15], [True, False, False, False], bins=2, kind="equal_width")
    assert [(b.low, b.high, b.mass, b.agreement.value) for b in bins] == [
        (0, 0.5, 0.5, 0),
        (0.5, 1, 0.5, 0.5),
    ]
    assert expected_calibration_error(bins) == pytest.approx(0.5 * 0.15 + 0.5 * 0.45)
    assert expected_calibration_error([]) is None
    assert reliability([], []) == []
    assert expected_calibration_error(reliability([1.0, 0.0], [True, False])) == 0.0


def test_equal_confidences_stay_in_one_bin() -> None:
    (one,) = reliability([0.7] * 50, [True] * 30 + [False] * 20)
    assert (one.low, one.high, one.mass, one.agreement.value) == (0.7, 0.7, 1.0, 0.6)
    assert expected_calibration_error([one]) == pytest.approx(0.1)


def test_weights_make_bins() -> None:
    bins = reliability([0.9, 0.8, 0.2], [True, True, False], [2.0, 2.0, 4.0], bins=2)
    assert [(b.mass, b.agreement.count) for b in bins] == [(0.5, 1), (0.5, 2)]


def test_the_slice_most_surely_bad_comes_first() -> None:
    keys = ["few"] * 5 + ["many"] * 100 + ["good"] * 50 + ["rare"]
    agreed = [False] * 2 + [True] * 3 + [False] * 30 + [True] * 70 + [True] * 50 + [False]
    found = worst_slices(keys, agreed)
    assert [one.key for one in found] == ["many", "few", "good"]
    assert (found[0].risk.value, found[0].risk.count) == (0.3, 100)
    assert [one.key for one in worst_slices(keys, agreed, least=1, most=None)][-1] in ("good", "rare")
    assert worst_slices([], []) == []


@pytest.mark.parametrize(
    ("confidence", "agreed", "weight", "said"),
    [
        ([0.1], [True, False], None, "equally long"),
        ([0.1], [math.nan], None, "must hold booleans"),
        ([0.1], [True], [0.0], "above 0"),
        ([0.1], [True], [math.nan], "above 0"),
        ([[0.1]], [[True]], None, "one-dimensional"),
    ],
)
def test_what_cant_be_measured_is_refused(
    confidence: ArrayLike, agreed: ArrayLike, weight: ArrayLike | None, said: str
) -> None:
    for measure in (risk_coverage, aurc, reliability):
        with pytest.raises(ValueError, match=said):
            measure(confidence, agreed, weight)


def test_a_confidence_that_is_no_probability_has_no_reliability() -> None:
    for wrong in (1.5, -0.1, math.nan):
        with pytest.raises(ValueError, match="probability"):
            reliability([wrong], [True])
