"""Audits that wait for the teacher go on with the configuration that a reload brought, and are asked once."""

from __future__ import annotations

import asyncio
import dataclasses
import signal
import socket
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import httpx

from gateway.audits import Audits
from gateway.ledger import Ledger
from gateway.live import LiveReleases
from gateway.metrics import Metrics
from gateway.tasks import Tasks
from serving.exchange import Exchange, StudentAnswer
from serving.log import EventLog
from serving.log_settings import LogSettings
from serving.pricing import PriceList
from serving.settings import Settings
from serving.student_price import StudentPrices
from serving.teacher import Teacher
from serving.upstream import Upstream

Start = Callable[..., Any]


def body(text: str) -> dict[str, Any]:
    return {"model": "intents", "messages": [{"role": "user", "content": text}]}


def nobody() -> str:
    """Return the URL of a port where nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        return f"http://127.0.0.1:{free.getsockname()[1]}/v1"


def test_what_the_keeper_took_up_is_handed_over_and_asked_once(stand_in: Start, tmp_path: Path) -> None:
    teacher = stand_in({"parcel lost": "lost"})
    metrics, prices = Metrics(), PriceList(None)
    student = StudentAnswer("linear", [{"message": {"content": "lost"}}], None, latency_s=0.0, score=1.0)
    owed = [
        dataclasses.replace(
            Exchange(
                f"e{number}",
                "r",
                time.time() - 900,
                "intents",
                "t",
                body("parcel lost"),
                "student",
                "confident",
            ),
            student=student,
            audit="pending",
        )
        for number in range(12)
    ]

    async def run() -> None:
        under_way: set[str] = set()
        async with AsyncExitStack() as stack:
            event_log = EventLog(tmp_path, LogSettings())
            stack.push_async_callback(event_log.aclose)

            def audits(base_url: str) -> Audits:
                settings = Settings(state_dir=tmp_path, teacher={"base_url": base_url})
                upstream = Upstream(base_url, timeout_s=20.0)
                stack.push_async_callback(upstream.aclose)
                tasks = Tasks(settings, list)
                ledger = Ledger(
                    event_log,
                    metrics,
                    prices,
                    student_prices=StudentPrices(Settings().student),
                    teacher_model=None,
                    max_wait_s=2.0,
                )
                stack.push_async_callback(ledger.aclose)
                return Audits(
                    teacher=Teacher(settings.teacher, upstream, None, prices),
                    ledger=ledger,
                    live=LiveReleases(tmp_path, tasks, metrics),
                    tasks=tasks,
                    metrics=metrics,
                    client_keys=False,
                    under_way=under_way,
                )

            old, new = audits(nobody()), audits(f"{teacher.url}/v1")
            assert old.take_up(owed) == 12
            assert new.take_up(owed) == 0, "this process is at them already"
            await asyncio.sleep(0)  # some have begun, some wait for those
            old.hand_over(new)
            async with asyncio.timeout(20):  # of an hour that they would have waited
                await old.aclose(grace_s=None)
                assert new.take_up(owed) == 0
                await new.aclose(grace_s=None)
            assert not under_way

    asyncio.run(run())
    assert teacher.stats()["chat"] == 12
    assert sum(path.read_bytes().count(b'"audited"') for path in tmp_path.rglob("*.jsonl")) == 12


def test_a_reload_takes_waiting_audits_to_the_new_teacher(
    stand_in: Start, serving: Start, publish: Start, tmp_path: Path, eventually: Start
) -> None:
    teacher = stand_in({"parcel lost": "lost", "parcel late": "late"})
    publish(tmp_path / "state", "intents", {"parcel lost": "lost", "parcel late": "late"})

    def toml(url: str, redact: str) -> str:
        return f"""
[teacher]
base_url = "{url}"
[log]
redact = {redact}
[[task]]
name = "intents"
match = {{ model = "intents" }}
audit_rate = 1.0
"""

    running = serving(toml(nobody(), "[]"), env={"OPENAI_API_KEY": "k"})
    for text in ("parcel lost", "parcel late"):
        answer = httpx.post(f"{running.url}/v1/chat/completions", json=body(text), verify=False)
        assert answer.headers["x-understudy-route"] == "student"
    assert running.metric("understudy_audits_total") == 0
    running.config.write_text(toml(f"{teacher.url}/v1", '["email"]'))
    running.child.send_signal(signal.SIGHUP)
    eventually(lambda: running.metric("understudy_audits_total", outcome="agreed") == 2)
    assert teacher.stats()["chat"] == 2
    assert "redacted by another log.redact" not in running.stderr
    publish(tmp_path / "state", "intents", {"parcel lost": "lost"})
    eventually(lambda: "redacted by another log.redact" in running.stderr)
