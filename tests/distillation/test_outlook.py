"""What is short, in words; the numbers are tested where a look finds them (test_learning.py)."""

from __future__ import annotations

import math
from typing import Any

import pytest

from distillation.dataset import Row
from distillation.outlook import PRESENT, after, in_words, labels_per_hour


def rows(times: list[float]) -> list[Row]:
    return [
        Row(str(i), "x", "a", None, None, None, None, None, created=created)
        for i, created in enumerate(times)
    ]


def short(**changed: Any) -> dict[str, Any]:
    return {
        "answer": None,
        "max_disagreement": 0.05,
        "delta": 0.06,
        "given": 200,
        "accepted": 80,
        "disagreements": 2,
        "if_all_agree": 40,
        "at_this_rate": 120,
        "hours_if_all_agree": 4.0,
        "hours_at_this_rate": 48.0,
        **changed,
    }


def test_the_present_rate_is_that_of_the_last_labels() -> None:
    slow = [3600.0 * i for i in range(PRESENT)]
    fast = [slow[-1] + 60.0 * (i + 1) for i in range(PRESENT)]
    assert labels_per_hour(rows(slow)) == pytest.approx(1.0)
    assert labels_per_hour(rows(slow + fast)) == pytest.approx(60.0)


@pytest.mark.parametrize("times", [[], [5.0], [5.0, 5.0], [5.0, 4.0], [0.0, math.inf], [0.0, math.nan]])
def test_a_rate_that_cant_be_told(times: list[float]) -> None:
    assert labels_per_hour(rows(times)) is None


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (
            {},
            "what the student may answer: at most 5.0% may disagree, and 2 of 80 accepted labels do; 40 (at this rate "
            "in 4 hours) are short if all of them agree, 120 (at this rate in 2 days) if as many disagree as so far",
        ),
        (
            {"answer": "refund", "at_this_rate": None, "hours_if_all_agree": None, "disagreements": 9},
            "the answer 'refund': at most 5.0% may disagree, and 9 of 80 accepted labels do; 40 are short if all of "
            "them agree, and no number is enough if as many disagree as so far",
        ),
        (
            {
                "accepted": 0,
                "disagreements": 0,
                "if_all_agree": 59,
                "at_this_rate": None,
                "hours_if_all_agree": None,
            },
            "what the student may answer: at most 5.0% may disagree, and 0 of 0 accepted labels do; 59 are short if "
            "all of them agree",
        ),
        (
            {"answer": "magic", "given": 0},
            "the answer 'magic': the student never gives it, so that it can't prove anything",
        ),
        (
            {"if_all_agree": None},
            "what the student may answer: at most 5.0% may disagree, and 2 of 80 accepted labels do: no number of "
            "labels would do",
        ),
    ],
)
def test_in_words(changed: dict[str, Any], said: str) -> None:
    assert in_words(short(**changed)) == said


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(5.0, "within a minute"), (90.0, "in 2 minutes"), (7200.0, "in 2 hours"), (2e5, "in 2 days")],
)
def test_a_time_to_come(seconds: float, said: str) -> None:
    assert after(seconds) == said
