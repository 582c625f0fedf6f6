"""Cost against quality: by hand, by what no ranking can do, and on recorded models."""

from __future__ import annotations

import csv
import math
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import ArrayLike

from routers.frontier import frontier, oracle_frontier

ROOT = Path(__file__).resolve().parents[2]
ANSWERS = st.lists(
    st.tuples(st.integers(-5, 5), st.booleans(), st.booleans(), st.floats(0.5, 20.0)), min_size=1, max_size=30
)


def test_by_hand() -> None:
    # The least confident two are what the student gets wrong and the teacher right.
    found = frontier([4, 3, 2, 1], [1, 1, 0, 0], [1, 1, 1, 1])
    assert found.calls.tolist() == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert found.quality.tolist() == [0.5, 0.75, 1.0, 1.0, 1.0]
    assert (found.student, found.teacher, found.at(0.125)) == (0.5, 1.0, 0.625)
    assert found.cpt(0.5) == 0.25
    assert found.cpt(0.8) == pytest.approx(0.4)
    assert found.cpt(0.0) == 0.0
    assert found.cpt(1.0) == pytest.approx(0.5)
    # PGR at 0, 10, … 100 %: 0, .2, .4, .6, .8, then 1.
    assert found.apgr() == pytest.approx((0 / 2 + 0.2 + 0.4 + 0.6 + 0.8 + 5 * 1 + 1 / 2) / 10)


def test_a_ranking_that_knows_nothing_recovers_half() -> None:
    found = frontier([1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 1, 0])
    assert found.calls.tolist() == [0.0, 1.0]
    assert found.apgr() == pytest.approx(0.5)
    assert (found.cpt(0.5), found.cpt(0.8)) == pytest.approx((0.5, 0.8))


def test_without_a_gap_nothing_is_recovered() -> None:
    for student, teacher in (([1, 1], [1, 1]), ([1, 1], [1, 0])):
        found = frontier([2, 1], student, teacher)
        assert (found.apgr(), found.cpt(0.5), found.recovered()) == (None, None, None)


def test_what_isnt_finite_is_passed_on_first() -> None:
    found = frontier([math.nan, 1.0], [0, 1], [1, 1])
    assert found.quality.tolist() == [0.5, 1.0, 1.0]


@given(ANSWERS)
def test_no_ranking_beats_the_one_that_knows(answers: list[tuple[int, bool, bool, float]]) -> None:
    scores, student, teacher, weights = (np.array(column) for column in zip(*answers, strict=True))
    found, best = frontier(scores, student, teacher, weights), oracle_frontier(student, teacher, weights)
    for calls in np.linspace(0.0, 1.0, 17):
        assert found.at(calls) <= best.at(calls) + 1e-9
    assert (found.student, found.teacher) == pytest.approx((best.student, best.teacher))
    if found.teacher > found.student:
        one, other = best.cpt(0.8), found.cpt(0.8)
        assert one is not None
        assert other is not None
        assert one <= other + 1e-9


@given(ANSWERS)
def test_only_the_order_counts_and_a_weight_is_so_many_requests(
    answers: list[tuple[int, bool, bool, float]],
) -> None:
    scores, student, teacher, weights = (np.array(column) for column in zip(*answers, strict=True))
    found = frontier(scores, student, teacher, weights)
    for calls in np.linspace(0.0, 1.0, 9):
        again = frontier(np.exp(scores), student, teacher, 3.0 * weights)
        twice = [np.concatenate([column, column]) for column in (scores, student, teacher, weights / 2.0)]
        assert again.at(calls) == pytest.approx(found.at(calls))
        assert frontier(*twice).at(calls) == pytest.approx(found.at(calls))


@pytest.mark.parametrize(
    "arrays",
    [
        ([], [], [], None),
        ([1, 2], [1], [1, 1], None),
        ([1], [math.nan], [1], None),
        ([1], [1], [1], [0.0]),
    ],
)
def test_what_cant_be_measured_is_refused(
    arrays: tuple[ArrayLike, ArrayLike, ArrayLike, ArrayLike | None],
) -> None:
    with pytest.raises(ValueError, match="must be"):
        frontier(*arrays)


def test_recorded_sentiment_models() -> None:
    """FrugalML's SHOP: two priced services, what they said of 62,774 reviews, and what is true (arXiv 2006.07512)."""
    data = Path(os.environ.get("UNDERSTUDY_DATA") or ROOT.parent / "shared" / "data")
    path = data / "frugalml_shop" / "SHOP.csv"
    if not path.is_file():
        pytest.skip(f"no recorded data at {path}; UNDERSTUDY_DATA says where it is")
    with path.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    right = {model: np.array([row[f"pred_{model}"] == row["true"] for row in rows]) for model in "34"}
    found = frontier([float(row["conf_4"]) for row in rows], right["4"], right["3"])
    assert found.apgr() == pytest.approx(0.842, abs=0.0005)
    assert found.cpt(0.5) == pytest.approx(0.150, abs=0.0005)
    assert found.cpt(0.8) == pytest.approx(0.237, abs=0.0005)
    best = oracle_frontier(right["4"], right["3"]).apgr()
    assert best is not None
    assert best > 0.9
