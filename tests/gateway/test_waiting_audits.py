"""Audits wait for a teacher that is away, and are paid for where they are counted."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson

from gateway.audits import Audits
from gateway.auth import Caller
from gateway.ledger import Ledger
from gateway.live import LiveReleases
from gateway.metrics import Metrics
from gateway.tasks import Tasks
from serving.exchange import Exchange, StudentAnswer
from serving.log import EventLog
from serving.pricing import PriceList
from serving.settings import Settings
from serving.student_price import StudentPrices
from serving.teacher import Teacher
from serving.upstream import Upstream

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


def test_an_audit_asks_the_account_that_its_client_asks(
    serve: Start, gateway: Start, publish: Start, tmp_path: Path, eventually: Start
) -> None:
    """Any other may not have the model, or not pay for it: every audit would count as a disagreement."""
    heard: list[dict[bytes, bytes]] = []

    async def teacher(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        while (await receive()).get("more_body"):
            pass
        heard.append(dict(scope["headers"]))
        known = heard[-1].get(b"openai-project") == b"ours"
        choice = {"index": 0, "message": {"role": "assistant", "content": "lost"}, "finish_reason": "stop"}
        said = {"choices": [choice]} if known else {"error": {"message": "no such project"}}
        head = [(b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": 200 if known else 403, "headers": head})
        await send({"type": "http.response.body", "body": orjson.dumps(said)})

    publish(tmp_path / "state", "intents", STUDENT)
    task = {"name": "intents", "match": {"model": "intents"}, "audit_rate": 1.0}
    running = gateway(serve(teacher, lifespan="off"), task=[task])
    answer = running.post(json=body("parcel lost"), headers={"openai-project": "ours", "cookie": "c"})
    assert answer.headers["x-understudy-route"] == "student"
    eventually(lambda: running.metric("understudy_audits_total") == 1)
    assert running.metric("understudy_audits_total", outcome="agreed") == 1
    assert b"cookie" not in heard[0]


def test_an_audit_that_waited_long_behind_others_is_the_keepers(stand_in: Start, tmp_path: Path) -> None:
    """Else both would ask, and a queue that is too long for one teacher would be asked twice."""
    teacher = stand_in({"parcel lost": "lost"}, latency_ms=2000, latency_spread=0.0)
    settings = Settings(state_dir=tmp_path, teacher={"base_url": f"{teacher.url}/v1"})
    metrics, prices = Metrics(), PriceList(None)
    student = StudentAnswer("linear", [{"message": {"content": "lost"}}], None, latency_s=0.0, score=1.0)

    async def run() -> None:
        upstream = Upstream(settings.teacher.base_url, timeout_s=20.0)
        event_log = EventLog(tmp_path, settings.log)
        tasks = Tasks(settings, list)
        ledger = Ledger(
            event_log,
            metrics,
            prices,
            student_prices=StudentPrices(Settings().student),
            teacher_model=None,
            max_wait_s=2.0,
        )
        audits = Audits(
            teacher=Teacher(settings.teacher, upstream, None, prices),
            ledger=ledger,
            live=LiveReleases(tmp_path, tasks, metrics),
            tasks=tasks,
            metrics=metrics,
            client_keys=False,
        )
        for number in range(12):
            # A minute is the limit: eight are asked about before that, the others would be after it.
            exchange = Exchange(
                f"e{number}",
                "r",
                time.time() - 58.5,
                "intents",
                "t",
                body("parcel lost"),
                "student",
                "confident",
            )
            exchange = dataclasses.replace(exchange, student=student, audit="pending")
            audits.start(exchange, Caller("t"))
        await audits.aclose(grace_s=None)
        await ledger.aclose()
        await event_log.aclose()
        await upstream.aclose()

    asyncio.run(run())
    assert teacher.stats()["chat"] == 8
    assert sum(path.read_bytes().count(b'"audited"') for path in tmp_path.rglob("*.jsonl")) == 8
