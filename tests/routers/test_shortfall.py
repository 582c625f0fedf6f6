"""How many labels are short: exactly as many as make the test pass, by SciPy's binomial."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from routers.promise import Promise
from routers.shortfall import labels_short


@settings(deadline=None)
@given(st.integers(0, 300), st.integers(0, 40), st.floats(0.02, 0.3), st.floats(0.001, 0.3))
def test_one_label_fewer_wouldnt_do(accepted: int, wrong: int, alpha: float, delta: float) -> None:
    wrong = min(wrong, accepted)
    clean, same = labels_short(accepted, wrong, alpha, delta)
    assert clean is not None
    assert binom.cdf(wrong, accepted + clean, alpha) <= delta * (1 + 1e-9)
    assert clean == 0 or binom.cdf(wrong, accepted + clean - 1, alpha) > delta * (1 - 1e-9)
    if same is not None:
        assert same >= clean
        rate = wrong / accepted
        assert rate < alpha
        assert binom.cdf(wrong + round(rate * same), accepted + same, alpha) <= delta * (1 + 1e-9)


def test_a_clean_student_is_short_of_what_no_level_can_do_without() -> None:
    promise = Promise(0.01, 0.9)
    assert labels_short(100, 0, 0.01, 0.1) == (promise.least_accepted - 100,) * 2


@pytest.mark.parametrize(("accepted", "wrong"), [(100, 10), (100, 100), (3, 1)])
def test_at_alpha_or_above_no_number_is_enough(accepted: int, wrong: int) -> None:
    clean, same = labels_short(accepted, wrong, 0.1, 0.1)
    assert clean is not None and clean > 0
    assert same is None


def test_without_a_label_there_is_no_rate() -> None:
    assert labels_short(0, 0, 0.1, 0.1) == (22, None)


def test_a_bound_nobody_lives_to_see() -> None:
    assert labels_short(0, 0, 1e-9, 0.1) == (None, None)
