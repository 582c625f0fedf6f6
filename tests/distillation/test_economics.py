"""`understudy tasks`: what every task costs, and whether a student looks worth it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from distillation.economics import TaskSummary, summarise
from serving.exchange import StudentAnswer
from serving.releases import ReleaseStore
from serving.settings import Settings
from serving.task_settings import TaskPolicy

Make = Callable[..., Any]
TEXTS = [(f"where is {i}", "lost" if i % 2 else "late") for i in range(100)]


def summaries(state: Any, **policy: Any) -> dict[str, TaskSummary]:
    given = Settings(state_dir=state, task_defaults=TaskPolicy(**{"max_disagreement": 0.1, **policy}))
    return {one.task: one for one in summarise(given)}


def test_no_log_no_tasks(tmp_path: Any) -> None:
    assert summaries(tmp_path / "state") == {}


def test_a_task_on_day_0(write_log: Make, exchanges: Make) -> None:
    (one,) = summaries(write_log(exchanges(TEXTS))).values()
    assert dataclasses.replace(one, cost_usd=0, teacher_cost_usd=None) == TaskSummary(
        task="intents",
        exchanges=100,
        routes={"teacher": 100},
        labels=100,
        distinct_answers=2,
        unseen=0.0,
        cost_usd=0,
        teacher_cost_usd=None,
        release=None,
        outlook="yes: a look is due",
        damaged_lines=0,
    )
    assert one.cost_usd == pytest.approx(0.1)
    assert one.teacher_cost_usd == pytest.approx(0.001)


def test_audits_are_paid_for(write_log: Make, exchanges: Make) -> None:
    answer = StudentAnswer("linear", [{"message": {"content": "lost"}}], None, 0.0, 1.0, cost_usd=1e-6)
    served: dict[str, Any] = {"route": "student", "student": answer, "cost_usd": 1e-6, "release": "r0001"}
    audited = exchanges(TEXTS[:2], audit="answered", **served)
    plain = exchanges(TEXTS[:8], start=2e6, teacher=None, **served)
    (one,) = summaries(write_log([*audited, *plain])).values()
    assert one.routes == {"student": 10}
    assert one.cost_usd == pytest.approx(2 * 0.001 + 10 * 1e-6)


def test_a_students_cost_is_that_of_the_one_there_is_now(write_log: Make, exchanges: Make) -> None:
    def gave(model: str, seconds: float) -> StudentAnswer:
        choices = [{"message": {"content": "lost"}}]
        return StudentAnswer(model, choices, None, seconds, 1.0, cost_usd=seconds / 10, device_s=seconds)

    served: dict[str, Any] = {"route": "student", "release": "r0001", "teacher": None}
    before = exchanges(TEXTS[:6], student=gave("small-lm", 2.0), **served)
    now = exchanges(TEXTS[:4], start=2e6, student=gave("linear", 0.001), **served)
    (one,) = summaries(write_log([*before, *now])).values()
    assert one.student is not None
    assert one.student.answers == 4
    assert (one.student.seconds, one.student.usd) == pytest.approx((0.001, 0.0001))


def test_the_most_expensive_comes_first(write_log: Make, exchanges: Make) -> None:
    write_log(exchanges(TEXTS[:20], cost_usd=0.5), "dear")
    state = write_log(exchanges(TEXTS[:40]), "cheap")
    assert list(summaries(state)) == ["dear", "cheap"]


def test_what_skipping_spared_is_estimated(write_log: Make, exchanges: Make) -> None:
    answers = [
        StudentAnswer("small", [], None, 2 * seconds, 1.0, cost_usd=seconds / 1000, device_s=seconds)
        for seconds in (0.1, 0.3)
    ]
    asked = [e for one in answers for e in exchanges(TEXTS[:1], start=1e6 + one.latency_s, student=one)]
    asked = [dataclasses.replace(e, id=f"asked-{n}") for n, e in enumerate(asked)]
    skipped = exchanges(TEXTS[:9], start=2e6, reason="skipped")
    (one,) = summarise(Settings(state_dir=write_log([*asked, *skipped])))
    assert one.spared is not None and one.student is not None
    assert dataclasses.astuple(one.student) == (2, pytest.approx(0.2), pytest.approx(0.0002))
    assert dataclasses.astuple(one.spared) == (9, pytest.approx(1.8), pytest.approx(0.0018))
    assert summaries(write_log(exchanges(TEXTS[:9]), "always"))["always"].spared is None


def test_no_price_is_known(write_log: Make, exchanges: Make) -> None:
    unpriced = [
        dataclasses.replace(e, teacher=dataclasses.replace(e.teacher, cost_usd=None), cost_usd=None)
        for e in exchanges(TEXTS[:5])
    ]
    (one,) = summaries(write_log(unpriced)).values()
    assert (one.cost_usd, one.teacher_cost_usd) == (0, None)


@pytest.mark.parametrize(
    ("changes", "outlook"),
    [
        ({"eligible": False}, "no: 100 exchanges can't be used (not eligible)"),
        ({"cancelled": True}, "no: 100 exchanges can't be used (cancelled by the client)"),
        ({"teacher": None}, "no: 100 exchanges can't be used (teacher gave no answer)"),
        (
            {"request": {"messages": [{"role": "user", "content": "x"}], "tools": [{}]}},
            "no: 100 exchanges can't be used (unsupported: tools)",
        ),
    ],
)
def test_nothing_usable(write_log: Make, exchanges: Make, changes: dict[str, Any], outlook: str) -> None:
    (one,) = summaries(write_log(exchanges(TEXTS, **changes))).values()
    assert (one.labels, one.outlook) == (0, outlook)


def test_too_early_and_too_open(write_log: Make, exchanges: Make) -> None:
    write_log(exchanges(TEXTS[:12]), "young")
    state = write_log(exchanges([(f"write {i}", f"essay {i}") for i in range(100)]), "essays")
    found = summaries(state)
    assert found["young"].outlook == "too early: 12 labels; the first look needs 68"
    assert found["essays"].outlook.startswith("no: the answer space isn't closed: 100 distinct answers")
    assert found["essays"].unseen == 1.0


def test_numeric_agreement(write_log: Make, exchanges: Make) -> None:
    (one,) = summaries(write_log(exchanges(TEXTS)), agreement={"kind": "numeric"}).values()
    assert one.outlook.startswith("no: ")


def test_the_overflow_is_never_learned(write_log: Make, exchanges: Make) -> None:
    (one,) = summaries(write_log(exchanges(TEXTS), "other")).values()
    assert one.outlook == "no: the overflow of server.max_tasks is never learned"


def test_what_is_live_and_what_is_damaged(write_log: Make, exchanges: Make, publish: Make) -> None:
    state = write_log(exchanges(TEXTS))
    publish(state, "intents", {"a b": "lost"})
    (segment,) = (state / "tasks" / "intents" / "events").iterdir()
    segment.write_bytes(segment.read_bytes() + b"hello\nworld\n")
    (one,) = summaries(state).values()
    assert (one.release, one.damaged_lines, one.exchanges) == ("r0001", 2, 100)
    (state / "tasks" / "intents" / "live").write_bytes(b"?")
    assert summaries(state)["intents"].release is None
    assert ReleaseStore(state).list("intents"), "the release itself is still there"


def test_answers_that_are_named_and_unknown(write_log: Make, exchanges: Make) -> None:
    state = write_log(exchanges(TEXTS))
    assert summaries(state, always_escalate=["lost"])["intents"].unknown == []
    (said,) = summaries(state, always_escalate=["lots"])["intents"].unknown
    assert said.endswith("none of 100 labels has: did you mean 'lost'?")


def test_a_live_release_that_cannot_be_loaded(write_log: Make, exchanges: Make, publish: Make) -> None:
    state = write_log(exchanges(TEXTS))
    publish(state, "intents", {"where": "lost", "when": "late"})
    assert summaries(state)["intents"].unusable is None
    router = state / "tasks" / "intents" / "releases" / "r0001" / "router.json"
    router.write_bytes(router.read_bytes()[:-9])
    assert "router.json doesn't match its checksum" in str(summaries(state)["intents"].unusable)
    (state / "tasks" / "intents" / "live").write_text("{")
    assert "which names no release" in str(summaries(state)["intents"].unusable)
