from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from serving.audit_index import AuditIndex
from serving.disk import Disk
from serving.events import answered, encode
from serving.exchange import Exchange
from serving.layout import training_directory
from serving.log import EventLog, LogReader
from serving.log_settings import LogSettings
from serving.removed import read_removed, removing_alone, write_removed
from serving.retention import oldest_open_s, remove_expired

Start = Callable[..., Any]
DAY = 86_400.0
NOW = 100 * DAY


def exchange(id: str, days: float, audit: str = "pending") -> Exchange:
    """One that a student answered so many days ago."""
    request = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}
    made = Exchange(id, id, NOW - days * DAY, "t", "h", request, "student", "confident", release="r0001")
    return replace(made, audit=audit)  # type: ignore[arg-type]


def segment(state_dir: Path, name: str, *exchanges: Exchange, task: str = "t") -> Path:
    path = state_dir / "tasks" / task / "events" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(encode(answered(exchange)) for exchange in exchanges))
    return path


def ids(state_dir: Path, task: str = "t") -> list[str]:
    return [exchange.id for exchange in LogReader(state_dir).exchanges(task).exchanges]


def test_a_segment_goes_when_its_newest_event_is_too_old(tmp_path: Path) -> None:
    segment(tmp_path, "00000000-1-1.jsonl", exchange("old", 40), exchange("older", 50))
    segment(tmp_path, "00000000-1-2.jsonl", exchange("mixed", 40), exchange("new", 20))
    segment(tmp_path, "00000000-1-3.jsonl.open", exchange("open", 40))
    segment(tmp_path, "00000000-2-1.jsonl", exchange("elsewhere", 31), task="u")
    damaged = segment(tmp_path, "00000000-1-4.jsonl")
    damaged.write_bytes(b"what can't be read is as old as its file\n")
    os.utime(damaged, (NOW - 40 * DAY, NOW - 40 * DAY))
    before = AuditIndex(tmp_path)
    assert before.accepted("t", "r0001") == 5
    assert remove_expired(tmp_path, 30, now=NOW) == 3
    assert ids(tmp_path) == ["mixed", "open", "new"]
    assert ids(tmp_path, "u") == []
    for index in (before, AuditIndex(tmp_path)):
        assert index.accepted("t", "r0001") == 5, "what was counted stays counted"
        assert {exchange.id for exchange in index.owed("t")} == {"mixed", "open", "new"}
    assert remove_expired(tmp_path, 30, now=NOW) == 0
    assert remove_expired(tmp_path, 30, now=NOW + 11 * DAY) == 1
    assert AuditIndex(tmp_path).accepted("t", "r0001") == 5
    assert ids(tmp_path) == ["open"]


@pytest.mark.parametrize("interrupted", [False, True])
def test_a_new_segment_may_have_the_name_of_one_that_was_removed(tmp_path: Path, interrupted: bool) -> None:
    """In a container the next process has the number of the last one, and counts its segments from 1 again."""

    async def append(made: Exchange) -> None:
        log = EventLog(tmp_path, LogSettings())
        await log.append("t", answered(made))
        await log.aclose()

    def write(made: Exchange) -> list[str]:
        asyncio.run(append(made))
        return [path.name for path in tmp_path.rglob("*.jsonl")]

    (name,) = write(exchange("old", 40))
    if interrupted:  # after the file was removed
        write_removed(tmp_path, "t", {"r0001": 1}, frozenset([name]), Disk())
        next(tmp_path.rglob(name)).unlink()
    else:
        assert remove_expired(tmp_path, 30, now=NOW) == 1
    assert write(exchange("new", 1)) == [name]
    assert remove_expired(tmp_path, 30, now=NOW) == 0
    assert ids(tmp_path) == ["new"]
    index = AuditIndex(tmp_path)
    assert index.accepted("t", "r0001") == 2
    assert [exchange.id for exchange in index.owed("t")] == ["new"]
    assert remove_expired(tmp_path, 30, now=NOW + 30 * DAY) == 1
    assert AuditIndex(tmp_path).accepted("t", "r0001") == 2


def test_what_training_that_was_killed_has_left_goes_with_the_texts_it_holds(tmp_path: Path) -> None:
    segment(tmp_path, "00000000-1-1.jsonl", exchange("new", 1))
    segment(tmp_path, "00000000-1-1.jsonl", exchange("new", 1), task="u")
    for task, days in (("t", 40), ("u", 20)):
        folder = training_directory(tmp_path, task)
        folder.mkdir()
        (folder / "job.json").write_text("texts")
        os.utime(folder, (NOW - days * DAY, NOW - days * DAY))
    remove_expired(tmp_path, 30, now=NOW)
    assert not training_directory(tmp_path, "t").exists()
    assert training_directory(tmp_path, "u").exists(), "that may still be at it"


def test_nothing_is_removed_while_somebody_else_removes(tmp_path: Path) -> None:
    segment(tmp_path, "00000000-1-1.jsonl", exchange("old", 40))
    with removing_alone(tmp_path, wait=False) as alone:
        assert alone
        assert remove_expired(tmp_path, 30, now=NOW) == 0
    assert remove_expired(tmp_path, 30, now=NOW) == 1


def test_a_damaged_count_of_what_was_removed_is_none(tmp_path: Path) -> None:
    segment(tmp_path, "00000000-1-1.jsonl", exchange("old", 40))
    remove_expired(tmp_path, 30, now=NOW)
    assert read_removed(tmp_path, "t").audits == {"r0001": 1}
    for content in (b"", b"[]", b'{"audits": 1, "removing": []}', b'{"audits": {"r0001": "x"}}'):
        (tmp_path / "tasks" / "t" / "removed.json").write_bytes(content)
        assert read_removed(tmp_path, "t").audits == {}


def test_open_segments_are_sealed_before_they_are_old() -> None:
    assert oldest_open_s(None) == DAY, "retention may be configured while it runs"
    assert oldest_open_s(365) == DAY
    assert oldest_open_s(1) == DAY / 10


def test_a_writer_seals_what_was_open_for_too_long(tmp_path: Path) -> None:
    async def run() -> None:
        log = EventLog(tmp_path, LogSettings(retention_days=1 / DAY))  # a second: a tenth of it for a segment
        await log.append("t", answered(exchange("a", 0)))
        deadline = time.monotonic() + 20
        while await asyncio.to_thread(lambda: list(tmp_path.rglob("*.open"))):
            assert time.monotonic() < deadline
            await asyncio.sleep(0.05)
        await log.append("t", answered(exchange("b", 0)))
        await log.aclose()

    asyncio.run(run())
    assert ids(tmp_path) == ["a", "b"]
    assert remove_expired(tmp_path, 1, now=NOW + 2 * DAY) == 2


@pytest.mark.parametrize("days", [None, 30])
def test_the_keeper_removes_what_the_configuration_says(
    days: float | None, stand_in: Start, gateway: Start, eventually: Start, tmp_path: Path
) -> None:
    now = time.time()
    old = replace(exchange("old", 0), created=now - 31 * DAY)
    new = replace(exchange("new", 0, audit="none"), created=now - 29 * DAY)
    segment(tmp_path / "state", "00000000-1-1.jsonl", replace(old, audit="none"))
    segment(tmp_path / "state", "00000000-1-2.jsonl", new)
    abandoned = segment(tmp_path / "state", "00000000-999999999-1.jsonl.open", new)
    running = gateway(stand_in({}).url, log={} if days is None else {"retention_days": days})
    eventually(lambda: not abandoned.exists())  # the keeper is at work
    if days is not None:
        eventually(lambda: ids(running.state_dir) == ["new"])
    assert ids(running.state_dir) == (["old", "new"] if days is None else ["new"])


def test_another_retention_closes_what_is_open(tmp_path: Path, exchanges: Start) -> None:
    def is_open() -> bool:
        return any(tmp_path.rglob("*.open"))

    async def run() -> None:
        event_log = EventLog(tmp_path, LogSettings())
        (exchange,) = exchanges([("parcel lost", "lost")])
        await event_log.append("intents", answered(exchange))
        assert await asyncio.to_thread(is_open)
        event_log.adopt(retention_days=1e-6)
        async with asyncio.timeout(10):
            while await asyncio.to_thread(is_open):  # noqa: ASYNC110 - of a file nobody tells
                await asyncio.sleep(0.02)
        await event_log.aclose()

    asyncio.run(run())
