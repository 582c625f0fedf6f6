"""The pipeline without HTTP: what is left behind when the client is gone at a certain moment."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import orjson
import pytest

from gateway.attempts import Attempts
from gateway.audits import Audits
from gateway.auth import Caller, Gate
from gateway.cache import Cache
from gateway.ledger import Ledger
from gateway.live import LiveReleases
from gateway.metrics import Metrics
from gateway.pipeline import Pipeline
from gateway.tasks import Tasks
from gateway.turn import Arrival
from serving.disk import Disk
from serving.exchange import Exchange
from serving.layout import task_names
from serving.log import EventLog, LogReader
from serving.pricing import PriceList
from serving.settings import Settings
from serving.teacher import Teacher
from serving.upstream import Upstream

Start = Callable[..., Any]


class SlowDisk(Disk):
    """A disk whose syncs wait until they are let go."""

    def __init__(self) -> None:
        self.syncing = threading.Event()
        self.let_go = threading.Event()

    def sync(self, fd: int) -> None:
        self.syncing.set()
        self.let_go.wait(10)
        super().sync(fd)


@asynccontextmanager
async def running(settings: Settings, disk: Disk) -> AsyncIterator[Pipeline]:
    state_dir, metrics, prices = settings.state_dir, Metrics(), PriceList(settings.teacher.price)
    upstream = Upstream(settings.teacher.base_url, timeout_s=5.0)
    teacher = Teacher(settings.teacher, upstream, None, prices)
    tasks = Tasks(settings, lambda: task_names(state_dir))
    live = LiveReleases(state_dir, tasks, metrics)
    event_log = EventLog(state_dir, settings.log, disk=disk)
    ledger = Ledger(event_log, metrics, prices, student_usd_per_hour=0.1, teacher_model=None, max_wait_s=2.0)
    audits = Audits(
        teacher=teacher, ledger=ledger, live=live, tasks=tasks, metrics=metrics, client_keys=False
    )
    await live.refresh()
    pipeline = Pipeline(
        teacher=teacher,
        tasks=tasks,
        live=live,
        gate=Gate([], settings.teacher_key()),
        ledger=ledger,
        audits=audits,
        attempts=Attempts(),
        cache=Cache(settings.cache, metrics),
        cache_settings=settings.cache,
        metrics=metrics,
    )
    yield pipeline
    await pipeline.aclose()
    await audits.aclose()
    await ledger.aclose()
    await event_log.aclose()
    await live.aclose()
    await upstream.aclose()


@pytest.fixture
def settings(
    stand_in: Start, publish: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Settings, Any]:
    """A task whose student is sure and always audited, and its teacher."""
    monkeypatch.setenv("TEACHER_KEY", "k")
    publish(tmp_path / "state", "intents", {"parcel lost": "lost", "parcel late": "late"})
    teacher = stand_in({"parcel lost": "lost"})
    given: dict[str, Any] = {
        "state_dir": tmp_path / "state",
        "teacher": {"base_url": f"{teacher.url}/v1", "api_key_env": "TEACHER_KEY"},
        "task": [{"name": "intents", "match": {"model": "intents"}, "audit_rate": 1.0}],
    }
    return Settings(**given), teacher


def arrival(**more: Any) -> Arrival:
    body = {"model": "intents", "messages": [{"role": "user", "content": "parcel lost"}], **more}
    return Arrival(raw=orjson.dumps(body), request_id="req_1", caller=Caller("tenant"))


def logged(settings: Settings) -> list[Exchange]:
    return LogReader(settings.state_dir).exchanges("intents").exchanges


@pytest.mark.parametrize("delivered", [True, False])
def test_only_an_answer_that_was_delivered_is_audited(
    settings: tuple[Settings, Any], delivered: bool
) -> None:
    given, teacher = settings

    async def serve() -> None:
        async with running(given, Disk()) as pipeline:
            reply = await pipeline.serve(arrival())
            assert reply.status == 200
            await reply.finish(delivered)

    asyncio.run(serve())
    (exchange,) = logged(given)
    assert (exchange.route, exchange.coin) == ("student", True)
    assert exchange.cancelled is not delivered
    assert exchange.audit == ("answered" if delivered else "pending")
    assert not exchange.audit_owed
    assert teacher.stats()["chat"] == delivered


def test_a_client_that_leaves_while_its_answer_is_logged_owes_nothing(settings: tuple[Settings, Any]) -> None:
    given, teacher = settings
    disk = SlowDisk()

    async def serve() -> None:
        async with running(given, disk) as pipeline:
            request = asyncio.create_task(pipeline.serve(arrival()))
            await asyncio.to_thread(disk.syncing.wait, 10)
            request.cancel()
            with pytest.raises(asyncio.CancelledError):
                await request
            disk.let_go.set()

    asyncio.run(serve())
    (exchange,) = logged(given)
    assert exchange.cancelled
    assert not exchange.audit_owed
    assert teacher.stats()["chat"] == 0
