"""The pipeline without HTTP: what is left behind when the client is gone at a certain moment."""

from __future__ import annotations

import asyncio
import gc
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
from gateway.flight import Flight
from gateway.ledger import Ledger
from gateway.live import LiveReleases
from gateway.metrics import Metrics
from gateway.pipeline import Pipeline
from gateway.tasks import Tasks
from gateway.turn import Arrival, Turn
from serving.disk import Disk
from serving.exchange import Exchange
from serving.layout import task_names
from serving.log import EventLog, LogReader
from serving.pricing import PriceList
from serving.settings import Settings
from serving.student_price import StudentPrices
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
    ledger = Ledger(
        event_log,
        metrics,
        prices,
        student_prices=StudentPrices(settings.student),
        teacher_model=None,
        max_wait_s=2.0,
    )
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
        "teacher": {
            "base_url": f"{teacher.url}/v1",
            "api_key_env": "TEACHER_KEY",
            "price": {"input": 10.0, "output": 30.0},
        },
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


async def until(holds: Callable[[], bool]) -> None:
    """Wait until something holds; fail after ten seconds."""
    async with asyncio.timeout(10):
        while not await asyncio.to_thread(holds):  # noqa: ASYNC110 - it happens in another thread
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("leaving", [0, 100, 200])
def test_a_crowd_leaves_nothing_behind(
    settings: tuple[Settings, Any], stand_in: Start, monkeypatch: pytest.MonkeyPatch, leaving: int
) -> None:
    given, _ = settings
    teacher = stand_in({"what is this": "something long to say"}, latency_ms=400, latency_spread=0.0)
    monkeypatch.setenv("UNDERSTUDY_TEACHER__BASE_URL", f"{teacher.url}/v1")
    given = Settings(**given.model_dump(exclude_unset=True))

    async def ask(pipeline: Pipeline, stream: bool, temperature: float = 0) -> bytes:
        messages = [{"role": "user", "content": "what is this"}]
        reply = await pipeline.serve(arrival(temperature=temperature, stream=stream, messages=messages))
        said = reply.body or b""
        delivered = False
        try:
            if reply.frames is not None:
                said = b"".join([frame async for frame in reply.frames])
            delivered = True
        finally:
            await reply.finish(delivered)
        return said

    async def serve() -> None:
        async with running(given, Disk()) as pipeline:
            await ask(pipeline, stream=False, temperature=1)  # what is started once is there now
            before = asyncio.all_tasks()
            crowd = [asyncio.create_task(ask(pipeline, stream=bool(i % 2))) for i in range(200)]
            await until(lambda: teacher.stats()["chat"] == 2)
            gone = [one.cancel() for one in crowd[:leaving]]
            answers = await asyncio.gather(*crowd, return_exceptions=True)
            assert sum(isinstance(one, asyncio.CancelledError) for one in answers) == len(gone)
            assert all(b"long" in one for one in answers if isinstance(one, bytes))
            del crowd, answers  # the tracebacks of those that were cancelled hold what was in use then
            left = asyncio.all_tasks() - before
            if left:
                await asyncio.wait(left, timeout=10)
            assert asyncio.all_tasks() == before
        gc.collect()
        assert not [one for one in gc.get_objects() if isinstance(one, Flight | Turn)]

    asyncio.run(serve())
    assert teacher.stats()["chat"] == 2
    kept = [one for one in logged(given) if not one.cancelled]
    assert len(kept) == 1 + 200 - leaving
