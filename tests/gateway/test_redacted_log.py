"""`[log].redact` through a running gateway: what the disk holds, what the student sees, what is audited."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distillation.dataset import build_dataset, known_answers
from serving.agreement import comparison
from serving.task_settings import AgreementChoice

Start = Callable[..., Any]
SECRET = "ann@mail.example"
CARD = "4111 1111 1111 1111"


def asked(text: str, **more: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": text}], **more}


def on_disk(state_dir: Path) -> bytes:
    return b"".join(path.read_bytes() for path in state_dir.rglob("*") if path.is_file())


@pytest.fixture
def redacting(stand_in: Start, gateway: Start) -> Start:
    def start(answers: dict[str, str], **task: Any) -> Any:
        teacher = stand_in(answers)
        tasks = [{"name": "t", "match": {"model": "m"}, **task}]
        running = gateway(teacher.url, log={"redact": ["email", "card"]}, task=tasks)
        return running, teacher

    return start


@pytest.mark.parametrize("stream", [False, True])
def test_the_client_and_the_teacher_get_everything_and_the_disk_doesnt(
    redacting: Start, stream: bool
) -> None:
    running, _ = redacting({f"write to {SECRET}": f"I wrote to {SECRET}, card {CARD}"})
    body = asked(f"write to {SECRET}", stream=stream, user=SECRET, metadata={SECRET: SECRET})
    answer = running.post(json=body, headers={"x-request-id": SECRET})
    assert answer.status_code == 200
    assert "[card]" not in answer.text
    if not stream:
        assert answer.json()["choices"][0]["message"]["content"] == f"I wrote to {SECRET}, card {CARD}"
    (exchange,) = running.exchanges()
    assert exchange.request["messages"] == [{"role": "user", "content": "write to [email]"}]
    assert (exchange.request["user"], exchange.request["metadata"]) == ("[email]", {"[email]": "[email]"})
    assert exchange.teacher.choices[0]["message"]["content"] == "I wrote to [email], card [card]"
    assert exchange.redacted == ["request", "request_id", "teacher"]
    found = on_disk(running.state_dir)
    assert b"ann" not in found
    assert b"4111" not in found


def test_the_student_sees_what_the_log_holds(redacting: Start, publish: Start, eventually: Start) -> None:
    running, _ = redacting({f"mail {SECRET}": "sent", "mail [email]": "sent"})
    # It knows the pair of words `mail email`, which is what the log makes of an address.
    publish(running.state_dir, "t", {"mail email": "sent", "card stolen": "stolen"})
    eventually(lambda: running.get("/readyz").json()["live_releases"] == 1)
    answer = running.post(json=asked(f"mail {SECRET}"))
    assert answer.headers["x-understudy-route"] == "student"
    assert answer.json()["choices"][0]["message"]["content"] == "sent"


def test_an_audit_from_memory_asks_what_the_client_asked(
    redacting: Start, publish: Start, eventually: Start
) -> None:
    running, teacher = redacting({f"mail {SECRET}": f"sent to {SECRET}"}, audit_rate=1.0)
    publish(running.state_dir, "t", {"mail email": "sent", "card stolen": "stolen"})
    eventually(lambda: running.get("/readyz").json()["live_releases"] == 1)
    assert running.post(json=asked(f"mail {SECRET}")).headers["x-understudy-route"] == "student"
    eventually(lambda: running.metric("understudy_audits_total", outcome="disagreed") == 1)
    assert teacher.stats()["answered"] == 1
    eventually(lambda: running.exchanges()[0].audit == "answered")
    (exchange,) = running.exchanges()
    assert exchange.teacher.choices[0]["message"]["content"] == "sent to [email]"
    assert exchange.redacted == ["request", "teacher"]
    assert b"ann" not in on_disk(running.state_dir)


def test_an_audit_left_over_of_what_was_redacted_is_missing(
    stand_in: Start, gateway: Start, write_log: Start, exchanges: Start, eventually: Start
) -> None:
    texts = [("mail [email]", "x"), ("mail", "x")]
    left = exchanges(
        texts, task="t", route="student", reason="confident", release="r0001", teacher=None, audit="pending"
    )
    write_log([dataclasses.replace(left[0], redacted=["request"]), left[1]], task="t")
    running = gateway(stand_in({"mail": "sent", "mail [email]": "sent"}).url, task=[{"name": "t"}])
    eventually(lambda: [e.audit for e in running.exchanges()] == ["missing", "answered"])


def test_an_answer_that_was_redacted_is_none_a_student_may_give(exchanges: Start) -> None:
    made = exchanges([("mail", "write to [email]"), ("parcel", "lost")])
    redacted = [dataclasses.replace(made[0], redacted=["teacher"]), made[1]]
    comparing = comparison(AgreementChoice())
    rows = build_dataset(redacted, comparing).rows
    assert len(rows) == 2, "it is a label all the same: nothing the student says agrees with it"
    assert [answer.key for answer in known_answers(rows)] == ["lost"]
    assert rows[0].answer not in (None, comparing.key(made[0].teacher.choices))
    assert len(known_answers(build_dataset(made, comparing).rows)) == 2


def test_a_request_that_is_nested_too_deeply_to_be_searched_is_logged_without_it(redacting: Start) -> None:
    deep = '{"\\u0061":' + "[" * 900 + "]" * 900 + "}"
    running, _ = redacting({deep: "x"})
    assert running.post(json=asked(deep)).status_code == 200
    (exchange,) = running.exchanges()
    assert exchange.request["messages"] == [{"role": "user", "content": "[email]"}]
