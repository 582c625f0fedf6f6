"""The teacher's own noise: counted from pairs, and its lower bound."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import beta, binom

from routers.intervals import at_least
from routers.noise import Noise


@given(st.lists(st.sampled_from([True, False, None]), max_size=60), st.floats(0.5, 0.999))
def test_the_floor_is_below_what_was_seen_and_missing_answers_say_nothing(
    steady: list[bool | None], certainty: float
) -> None:
    noise = Noise.of(steady)
    assert noise == Noise.of([one for one in steady if one is not None])
    floor = noise.floor(certainty)
    assert 0.0 <= floor <= (noise.differed / noise.asked if noise.asked else 0.0)
    assert floor <= Noise(noise.asked + 1, noise.differed + 1).floor(certainty)
    assert Noise(noise.asked + 1, noise.differed).floor(certainty) <= floor


@pytest.mark.parametrize("certainty", [0.3, 0.9, 0.99])
def test_the_bound_is_exact_and_one_sided(certainty: float) -> None:
    for k, n in ((1, 1), (2, 2), (1, 20), (7, 40), (40, 1000)):
        assert at_least(k, n, certainty) == pytest.approx(beta.ppf(1 - certainty, k, n - k + 1), rel=1e-7)
    for truth in (0.01, 0.05, 0.3):
        above = [k for k in range(101) if at_least(k, 100, certainty) > truth]
        assert binom.pmf(above, 100, truth).sum() <= 1 - certainty


@given(st.lists(st.floats(0.0, 1.0), min_size=1, max_size=8).filter(lambda drawn: sum(drawn) > 1e-6))
def test_no_student_disagrees_less_than_half_as_often_as_the_teacher_with_itself(drawn: list[float]) -> None:
    answers = np.array(drawn) / sum(drawn)
    assert 1 - answers.max() >= (1 - (answers**2).sum()) / 2 - 1e-12
