"""Requests that a release doesn't show its student: escalated like others, labels like others, and counted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from routers.foresight import FORESIGHT_FILE, WIDTH, Foresight, features
from serving.releases import ReleaseStore

Start = Callable[..., Any]
TEACHER = {"parcel lost": "lost", "poem please": "roses", "poem now": "violets"}
STUDENT = {"parcel lost": "lost", "poem please": "prose"}
TASK = {"name": "intents", "match": {"model": "intents"}}


def body(text: str, **more: Any) -> dict[str, Any]:
    return {"model": "intents", "messages": [{"role": "user", "content": text}], **more}


def foresees_poems() -> Foresight:
    """Foresees 0.5 − what the word `poem` weighs."""
    (place, sign), *_ = ((p, 1 if v > 0 else -1) for p, v in features("poem").items())
    weights = [0.0] * WIDTH
    weights[place] = -1.0 * sign
    return Foresight(tuple(weights), bias=0.5, slope=4.0, offset=-2.0, skip_below=0.3, student_s=0.25)


@pytest.fixture
def live(stand_in: Start, gateway: Start, publish: Start, tmp_path: Path) -> Start:
    """Start a gateway whose live release skips poems, or has the given bytes as its foresight."""

    def start(data: bytes | None = None, task: dict[str, Any] | None = None, **sections: Any) -> Any:
        name = publish(tmp_path / "state", "intents", STUDENT, live=False)
        store = ReleaseStore(tmp_path / "state")
        files = {FORESIGHT_FILE: foresees_poems().dump() if data is None else data}
        store.rewrite("intents", name, files)
        store.set_live("intents", name)
        teacher = stand_in(TEACHER, model="big")
        return gateway(teacher.url, task=[{**TASK, **(task or {})}], **sections), teacher

    return start


def test_a_foreseen_escalation_goes_straight_to_the_teacher(live: Start) -> None:
    running, teacher = live(task={"audit_rate": 1.0})
    answer = running.post(json=body("poem please"))
    assert answer.json()["choices"][0]["message"]["content"] == "roses"
    assert answer.headers["x-understudy-route"] == "teacher"
    assert answer.headers["x-understudy-reason"] == "skipped"
    assert "x-understudy-confidence" not in answer.headers
    assert teacher.stats()["chat"] == 1
    (exchange,) = running.exchanges()
    assert exchange.student is None
    assert (exchange.propensity, exchange.audit, exchange.eligible) == (1.0, "answered", True)
    assert running.metric("understudy_requests_total", reason="skipped", route="teacher") == 1
    assert running.metric("understudy_student_seconds_spared_total", task="intents") == 0.25


def test_other_requests_are_shown_to_the_student(live: Start) -> None:
    running, teacher = live(task={"audit_rate": 1e-9})
    assert running.post(json=body("parcel lost")).headers["x-understudy-route"] == "student"
    assert teacher.stats()["chat"] == 0


def test_streams_skip_too(live: Start) -> None:
    running, _ = live()
    answer = running.post(json=body("poem now", stream=True))
    assert answer.headers["x-understudy-reason"] == "skipped"
    assert answer.text.endswith("data: [DONE]\n\n")


def test_whoever_forces_the_student_gets_it(live: Start) -> None:
    running, _ = live()
    answer = running.post(json=body("poem please"), headers={"x-understudy-route": "student"})
    assert answer.json()["choices"][0]["message"]["content"] == "prose"
    assert answer.headers["x-understudy-reason"] == "forced"


def test_a_student_that_was_skipped_steps_in_for_a_teacher_that_fails(live: Start) -> None:
    running, teacher = live(task={"on_teacher_failure": "student"})
    teacher.fail({"status": 503})
    answer = running.post(json=body("poem please"))
    assert answer.status_code == 200
    assert answer.json()["choices"][0]["message"]["content"] == "prose"
    assert answer.headers["x-understudy-reason"] == "teacher_unavailable"
    (exchange,) = running.exchanges()
    assert not exchange.eligible


def test_without_that_the_teachers_failure_is_the_answer(live: Start) -> None:
    running, teacher = live()
    teacher.fail({"status": 503})
    assert running.post(json=body("poem please")).status_code == 503


def test_a_release_with_damaged_foresight_doesnt_go_live(live: Start) -> None:
    running, _ = live(data=b'{"schema": 1}')
    assert running.post(json=body("poem please")).headers["x-understudy-reason"] == "no_release"


def test_redacted_text_is_foreseen_as_the_log_has_it(live: Start) -> None:
    running, _ = live(log={"redact": ["verse:poem"]})
    assert running.post(json=body("poem please")).headers["x-understudy-reason"] != "skipped"
