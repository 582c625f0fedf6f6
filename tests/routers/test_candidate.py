"""Levels that are fixed before the labels that test them come in."""

from __future__ import annotations

from typing import Any

import numpy as np
import orjson
import pytest
from numpy.typing import NDArray
from scipy.stats import binomtest

from routers.admission import AnswerTerms, Verdict
from routers.candidate import FixedLevels, bet, fix_levels
from routers.looks import spent

ALPHA = DELTA = 0.1


def drawn(seed: int, labels: int, rates: dict[str, float]) -> tuple[NDArray[Any], Any, NDArray[np.bool_]]:
    rng = np.random.default_rng(seed)
    answer = rng.choice(list(rates), labels)
    return rng.random(labels), answer, rng.random(labels) >= np.array([rates[key] for key in answer])


def verdict_on(fixed_on: Any, tested_on: Any, number: int = 1, seed: int = 1, **terms: Any) -> Verdict:
    asked: dict[str, Any] = {
        "max_disagreement": ALPHA,
        "delta": spent(number, DELTA),
        "level": DELTA,
        "terms": AnswerTerms(**terms),
        "seed": seed,
    }
    rank, answer, agreed = fixed_on
    levels = fix_levels(rank, answer.tolist(), agreed, np.ones(len(rank)), **asked)
    rank, answer, agreed = tested_on
    ones = np.ones(len(rank))
    return bet(levels, rank, answer.tolist(), agreed, ones, ones, **asked)


def test_a_good_student_passes_and_widens() -> None:
    rates = {"a": 0.02, "b": 0.01}
    found = [
        verdict_on(drawn(1, 200, rates), tuple(part[:count] for part in drawn(2, 600, rates)))
        for count in (0, 20, 120, 600)
    ]
    assert [one.passed for one in found] == [False, False, True, True]
    assert found[3].rank_threshold <= found[2].rank_threshold
    assert found[3].accepted.mean() > 0.9
    assert found[0].whole.levels[0].p_value == 1.0


def test_what_was_worse_before_is_vetoed_and_tests_nothing() -> None:
    rates = {"a": 0.01, "b": 0.01, "bad": 0.5}
    found = verdict_on(drawn(3, 600, rates), drawn(4, 600, rates))
    assert found.vetoed == {"bad"} and found.passed
    _, answer, _ = drawn(4, 600, rates)
    assert not found.accepted[answer == "bad"].any()


def test_named_answers_bet_by_themselves() -> None:
    rates = {"a": 0.02, "refund": 0.0, "rare": 0.5}
    terms: dict[str, Any] = {"prove": {"refund": 0.05, "rare": 0.05, "never": 0.1}}
    found = verdict_on(drawn(5, 300, rates), drawn(6, 900, rates), **terms)
    assert set(found.proven) == {"refund"}
    assert found.unproven == {"rare", "never"}
    assert found.given["never"] == 0 and found.named["never"].levels == []


def test_what_always_escalates_has_no_level() -> None:
    only = drawn(7, 300, {"a": 0.0})
    found = verdict_on(only, only, always_escalate=frozenset({"a"}))
    assert not found.passed and not found.accepted.any()
    assert found.whole.levels == []


def test_one_candidate_after_another_keeps_the_promise() -> None:
    """A student that sits at α. Each candidate is fixed on all labels so far and asked after each one since."""
    broken, lives = 0, 200
    for seed in range(lives):
        rank, answer, agreed = drawn(seed, 800, {"a": ALPHA, "b": ALPHA})
        for number, begin in enumerate((50, 100, 200, 400), start=1):
            before = (rank[:begin], answer[:begin], agreed[:begin])
            since = (rank[begin : 2 * begin], answer[begin : 2 * begin], agreed[begin : 2 * begin])
            if verdict_on(before, since, number, seed).passed:
                broken += 1
                break
    assert binomtest(broken, lives, DELTA, alternative="greater").pvalue > 1e-3, f"{broken} of {lives}"


def test_levels_come_back_from_json() -> None:
    levels = FixedLevels(((2.0, frozenset({"x", "y"})), (1.0, frozenset())), {"refund": (3.0, 0.5)})
    assert FixedLevels.from_json(orjson.loads(orjson.dumps(levels.to_json()))) == levels


@pytest.mark.parametrize(
    "data",
    [
        None,
        {},
        {"others": [[1.0]], "named": {}},
        {"others": [["x", []]], "named": {}},
        {"others": [[1.0, []], [1.0, []]], "named": {}},
        {"others": [["nan", []]], "named": {}},
        {"others": [], "named": {"a": [1.0, 2.0]}},
        {"others": [], "named": {"a": None}},
    ],
)
def test_what_are_no_levels_is_refused(data: Any) -> None:
    with pytest.raises((KeyError, TypeError, ValueError)):
        FixedLevels.from_json(data)
