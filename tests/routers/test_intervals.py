"""Intervals for shares: against SciPy's beta distribution, and by how often they contain the truth."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import beta, binom

from routers.intervals import clopper_pearson, effective, share, wilson


@pytest.mark.parametrize("certainty", [0.9, 0.95, 0.999])
def test_clopper_pearson_is_scipys(certainty: float) -> None:
    tail = (1 - certainty) / 2
    for n in (1, 2, 7, 100, 5_000, 62_774, 10_000_000):
        for k in sorted({0, 1, n // 100, n // 2, n - 1, n}):
            low, high = clopper_pearson(k, n, certainty)
            assert low == pytest.approx(beta.ppf(tail, k, n - k + 1) if k > 0 else 0.0, rel=1e-7, abs=1e-12)
            assert high == pytest.approx(beta.ppf(1 - tail, k + 1, n - k) if k < n else 1.0, rel=1e-7)


@pytest.mark.parametrize("truth", [0.01, 0.05, 0.5, 0.93])
@pytest.mark.parametrize("n", [1, 10, 200])
def test_clopper_pearson_covers_as_often_as_it_says(truth: float, n: int) -> None:
    covering = [k for k in range(n + 1) if (ends := clopper_pearson(k, n, 0.9))[0] <= truth <= ends[1]]
    assert binom.pmf(covering, n, truth).sum() >= 0.9


def test_wilson_by_hand() -> None:
    # Wilson's own form: the two shares whose distance from 0.1 is z standard errors of themselves.
    for end in wilson(0.1, 50.0, 0.95):
        assert abs(0.1 - end) == pytest.approx(1.959964 * (end * (1 - end) / 50) ** 0.5, rel=1e-6)
    assert wilson(0.0, 20.0)[0] == 0.0
    assert wilson(1.0, 20.0)[1] == 1.0


def test_wilson_on_weighted_labels_contains_the_truth_about_as_often_as_it_says() -> None:
    chance = np.random.default_rng(5)
    weights = np.where(np.arange(400) % 4 == 0, 10.0, 1.0)
    contained = 0
    for _ in range(400):
        found = share(chance.random(400) < 0.1, weights, certainty=0.9)
        contained += found.low <= 0.1 <= found.high
    assert 0.85 <= contained / 400 <= 0.95


def test_shares() -> None:
    nothing = share([])
    assert (nothing.value, nothing.low, nothing.high, nothing.count) == (None, 0.0, 1.0, 0)
    none_of_ten = share([False] * 10)
    assert (none_of_ten.value, none_of_ten.low, none_of_ten.exact) == (0.0, 0.0, True)
    assert none_of_ten.high == pytest.approx(1 - 0.025**0.1)
    assert share([True, False, False], [3.0, 3.0, 3.0]) == share([True, False, False])
    weighted = share([True, False, False], [2.0, 1.0, 1.0])
    assert (weighted.value, weighted.exact) == (0.5, False)


@given(st.lists(st.floats(0.01, 100.0), min_size=1, max_size=50), st.data())
def test_an_interval_holds_its_share(weights: list[float], data: st.DataObject) -> None:
    hits = data.draw(st.lists(st.booleans(), min_size=len(weights), max_size=len(weights)))
    found = share(hits, weights)
    assert found.value is not None
    assert 0.0 <= found.low <= found.value + 1e-12
    assert found.value - 1e-12 <= found.high <= 1.0
    assert 1.0 - 1e-9 <= effective(np.array(weights)) <= len(weights) + 1e-9
