from __future__ import annotations

import dataclasses
import io

import pytest
from rich.console import Console

from loadtest.learner import Lesson
from loadtest.progress import Progress
from loadtest.results import percentile, summarise
from loadtest.table import show
from loadtest.traffic import Outcome
from serving.agreement import comparison
from serving.exchange import Audit, Exchange, Json, Route, TeacherAnswer
from serving.recording import Recorded
from serving.task_settings import AgreementChoice

COMPARE = comparison(AgreementChoice())


def said(text: str) -> list[Json]:
    return [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}]


def outcome(number: int, answer: str, teacher: str, gold: str, route: str, cost: float) -> Outcome:
    return Outcome(
        row=Recorded(f"text {number}", teacher, gold),
        latency_s=number / 1000,
        choices=said(answer),
        request_id=f"req-{number}",
        route=route,
        reason="confident" if route == "student" else "low_confidence",
        release="r0002" if number > 3 else "r0001",
        cost_usd=cost,
    )


OUTCOMES = [
    outcome(1, "a", "a", "a", "teacher", 0.010),
    outcome(2, "a", "a", "a", "student", 0.001),
    outcome(3, "b", "a", "b", "student", 0.001),
    outcome(4, "c", "c", "d", "student", 0.001),
    Outcome(Recorded("text 5", "a", "a"), 0.5, error="500: down"),
]


def test_progress_fits_into_80_columns() -> None:
    shown = io.StringIO()
    console = Console(file=shown, width=80, force_terminal=True)
    with Progress(console, 800, COMPARE) as progress:
        for one in OUTCOMES:
            progress.add(one)
        progress.learning("after 1,250 requests, 12.8 s: live release r0002")
    assert "…" not in shown.getvalue()
    assert "5 of 800" in shown.getvalue()
    assert "agreement with the teacher" in shown.getvalue()
    assert "$0.0130 (the teacher alone: $0.0400)" in shown.getvalue()


def exchange(number: int, route: Route, audit: Audit) -> Exchange:
    return Exchange(
        id=f"x{number}",
        request_id=f"req-{number}",
        created=float(number),
        task="t",
        tenant="",
        request={},
        route=route,
        reason="",
        audit=audit,
        teacher=TeacherAnswer("m", said("a"), None, 0.1, cost_usd=0.012) if audit != "missing" else None,
    )


def test_everything_is_counted_once() -> None:
    results = summarise(OUTCOMES, compare=COMPARE, audits=1, oracle_share=0.2)
    assert (results.requests, results.failed, results.failures) == (5, 1, {"500: down": 1})
    assert [(share.route, share.reason, share.requests, share.share) for share in results.routes] == [
        ("student", "confident", 3, 0.75),
        ("teacher", "low_confidence", 1, 0.25),
    ]
    assert (results.agreement, results.student_agreement) == (3 / 4, 2 / 3)
    assert (results.accuracy, results.student_accuracy, results.teacher_accuracy) == (3 / 4, 2 / 3, 3 / 5)
    assert (results.escalated, results.audits, results.teacher_share) == (1, 1, 2 / 4)
    assert [
        (entry.release, entry.served, entry.disagreed, entry.disagreement) for entry in results.releases
    ] == [
        ("r0001", 2, 1, 0.5),
        ("r0002", 1, 0, 0.0),
    ]
    assert results.latency["student"].p50_s == 0.003
    assert results.usd_per_request == pytest.approx(0.013 / 4)
    assert results.teacher_usd_per_request == pytest.approx(0.010)


def test_with_the_log_audits_and_their_cost_are_exact() -> None:
    exchanges = [
        exchange(1, "teacher", "none"),
        exchange(2, "student", "answered"),
        exchange(3, "student", "missing"),
        exchange(4, "student", "none"),
        exchange(99, "student", "answered"),  # of someone else
    ]
    results = summarise(OUTCOMES, compare=COMPARE, exchanges=exchanges, audits=7)
    assert (results.audits, results.teacher_share) == (2, 3 / 4)
    assert results.usd_per_request == pytest.approx((0.013 + 0.012) / 4)
    assert results.teacher_usd_per_request == pytest.approx(0.012)


def test_nothing_to_count_is_none_and_not_zero() -> None:
    results = summarise([OUTCOMES[-1]], compare=COMPARE)
    assert results.failed == 1
    assert results.agreement is results.student_agreement is results.accuracy is None
    assert results.audits is results.teacher_share is results.usd_per_request is None
    bare = dataclasses.replace(OUTCOMES[0], row=Recorded("text", "a"))
    assert summarise([bare], compare=COMPARE).accuracy is None


@pytest.mark.parametrize(("q", "expected"), [(0.5, 50.0), (0.99, 99.0), (0.001, 1.0), (1.0, 100.0)])
def test_percentiles_are_by_nearest_rank(q: float, expected: float) -> None:
    assert percentile([float(value) for value in range(100, 0, -1)], q) == expected
    assert percentile([7.0], q) == 7.0


def test_the_table_says_it_all() -> None:
    console = Console(width=120, file=io.StringIO())
    lessons = [Lesson(100, 2.0, {}, None), Lesson(200, 1.0, None, "no [such] thing")]
    results = summarise(
        OUTCOMES, compare=COMPARE, audits=1, oracle_share=0.2, lessons=lessons, interrupted=True
    )
    show(results, console)
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    for expected in (
        "low_confidence",
        "r0001",
        "50.0 %",
        "failed 1 ×: 500: down",
        "no [such] thing",
        "interrupted",
    ):
        assert expected in text
    assert "learned 2 times" in text
