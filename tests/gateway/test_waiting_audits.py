"""Audits wait for a teacher that is away, and are paid for where they are counted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Start = Callable[..., Any]
STUDENT = {"parcel lost": "lost", "parcel late": "late", "refund now": "cancel"}


def body(text: str) -> dict[str, Any]:
    return {"model": "intents", "messages": [{"role": "user", "content": text}]}


def test_audits_wait_until_the_teacher_is_back(
    stand_in: Start, gateway: Start, publish: Start, tmp_path: Any, eventually: Start
) -> None:
    publish(tmp_path / "state", "intents", STUDENT)
    teacher = stand_in({"parcel lost": "lost", "parcel late": "late"}, default="unclear")
    task = {"name": "intents", "match": {"model": "intents"}, "audit_rate": 1.0}
    running = gateway(teacher.url, task=[task])
    teacher.fail({"status": 503})
    for number in range(10):
        assert running.post(json=body(f"what is {number}")).status_code == 503
    assert running.metric("understudy_teacher_breaker", requests="chat") == 2
    asked = teacher.stats()["chat"]
    for text in ("parcel lost", "parcel late", "refund now"):
        assert running.post(json=body(text)).headers["x-understudy-route"] == "student"
    teacher.fail()
    assert running.metric("understudy_audits_total") == 0, "nothing is missing yet"
    eventually(lambda: running.metric("understudy_audits_total") == 3)
    assert running.metric("understudy_audits_total", outcome="missing") == 0
    assert running.metric("understudy_audits_total", outcome="disagreed") == 1
    assert teacher.stats()["chat"] == asked + 3, "each was asked once"
    eventually(lambda: [one.audit for one in running.exchanges()] == ["answered"] * 3)
    paid = [exchange.teacher.usage for exchange in running.exchanges()]
    for kind, name in (("audit_input", "prompt_tokens"), ("audit_output", "completion_tokens")):
        assert running.metric("understudy_tokens_total", task="intents", kind=kind) == sum(
            usage[name] for usage in paid
        )
