from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from routers.looks import (
    GRID,
    GROWTH,
    SEEN_ENOUGH,
    PastLook,
    half_is_known,
    labels_needed,
    next_look,
    spent,
    unseen_chance,
)
from routers.looks import tested_grid as levels_to_test  # under its own name pytest takes it for a test
from routers.promise import Promise


@given(st.floats(0.001, 0.999))
def test_looks_spend_all_of_delta_and_no_more(delta: float) -> None:
    shares = [spent(look, delta) for look in range(1, 5001)]
    assert sum(shares) < delta
    assert sum(shares) == pytest.approx(delta, rel=2e-4)
    assert shares == sorted(shares, reverse=True)


def test_counting_starts_again_after_a_release() -> None:
    assert next_look([]) == 1
    held = [PastLook(1, 68, False), PastLook(2, 85, False)]
    assert next_look(held) == 3
    released = [*held, PastLook(3, 107, True)]
    assert next_look(released) == 1
    assert next_look([*released, PastLook(1, 134, False)]) == 2


def test_the_first_look_needs_enough_for_forty_percent_to_pass() -> None:
    # 0.9ⁿ ≤ 0.1·6/π² from n = 27 on; 27 of 40 % are 68.
    assert labels_needed([], 0.1, 0.9) == 68
    assert labels_needed([], 0.01, 0.9) > 10 * labels_needed([], 0.1, 0.9) * 0.9


@given(st.integers(1, 10**6), st.booleans())
def test_a_later_look_needs_the_labels_to_have_grown(labels: int, released: bool) -> None:
    needed = labels_needed([PastLook(1, 5, True), PastLook(1, labels, released)], 0.1, 0.9)
    assert needed >= labels * GROWTH > labels
    assert needed <= labels * GROWTH + 1


@given(st.integers(1, 10**6), st.integers(0, 10**6), st.floats(0.01, 0.3))
def test_of_the_last_look_count_the_labels_that_count_today(labels: int, kept: int, alpha: float) -> None:
    past = [PastLook(1, labels, True)]
    needed = labels_needed(past, alpha, 0.9, kept=kept)
    assert needed > min(kept, labels), "never the same labels twice"
    assert needed <= labels_needed(past, alpha, 0.9), "never later than by all that it had"
    first = labels_needed([], alpha, 0.9)
    assert needed <= max(first, math.ceil(kept * GROWTH)) or kept >= labels
    assert needed >= min(first, labels_needed(past, alpha, 0.9))


def test_the_grid_goes_from_strict_to_loose_in_steps_of_five_percent() -> None:
    assert list(GRID) == sorted(GRID)
    assert (GRID[0], GRID[-1]) == (0.2, 1.0)
    assert all(math.isclose(b - a, 0.05) for a, b in itertools.pairwise(GRID))


def test_a_look_begins_below_forty_percent_only_where_a_level_can_bear_a_disagreement() -> None:
    forty = [coverage for coverage in GRID if coverage >= 0.4]
    assert levels_to_test(0, 27) == forty
    assert levels_to_test(81 / 0.35 - 1, 27) == forty
    assert levels_to_test(81 / 0.35 + 1, 27) == [0.35, *forty]
    assert levels_to_test(81 / 0.2 - 1, 27) == list(GRID)[1:]
    assert levels_to_test(81 / 0.2 + 1, 27) == list(GRID)
    assert Promise(0.1, 1 - spent(1, 0.1)).least_accepted == 27


def test_the_chance_of_an_unseen_answer_is_the_share_of_those_seen_once() -> None:
    assert unseen_chance([]) == 1.0
    assert unseen_chance(["a"]) == 1.0
    assert unseen_chance(["a", "a", "b", "c"]) == 0.5
    assert unseen_chance(["a"] * 10) == 0.0


def test_half_is_known_once_frequent_answers_make_half_of_the_traffic() -> None:
    often = ["a"] * SEEN_ENOUGH
    assert not half_is_known([])
    assert not half_is_known(["a"] * (SEEN_ENOUGH - 1))
    assert half_is_known(often)
    assert half_is_known([*often, *(str(i) for i in range(SEEN_ENOUGH))])
    assert not half_is_known([*often, *(str(i) for i in range(SEEN_ENOUGH + 1))])
