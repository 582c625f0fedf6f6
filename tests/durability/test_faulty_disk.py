"""A disk that is full, read-only, broken or slow: every request is served, and what isn't logged is counted."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from serving.disk import Disk

Start = Callable[..., Any]
BODY = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}
LOST = "understudy_exchanges_lost_total"
LATE = "understudy_exchanges_late_total"
LOGGED = "understudy_exchanges_logged_total"


class FaultyDisk(Disk):
    """A disk on which operations fail on demand, or wait."""

    def __init__(self) -> None:
        self.fault: tuple[str, int] | None = None
        self.free = threading.Event()
        self.free.set()

    def _maybe_fail(self, operation: str, path: Path | None = None) -> None:
        if self.fault is not None and self.fault[0] == operation:
            number = self.fault[1]
            raise OSError(number, os.strerror(number), None if path is None else str(path))

    def create(self, path: Path) -> int:
        self._maybe_fail("create", path)
        return super().create(path)

    def write(self, fd: int, data: bytes) -> None:
        if self.fault is not None and self.fault[0] == "write":
            super().write(fd, data[: len(data) // 2])  # a full disk takes what fits
        self._maybe_fail("write")
        super().write(fd, data)

    def sync(self, fd: int) -> None:
        assert self.free.wait(30)
        self._maybe_fail("sync")
        super().sync(fd)


def content(answer: httpx.Response) -> str:
    assert answer.status_code == 200
    text: str = answer.json()["choices"][0]["message"]["content"]
    return text


@pytest.mark.parametrize(
    ("operation", "number"),
    [
        ("write", errno.ENOSPC),
        ("write", errno.EDQUOT),
        ("create", errno.EROFS),
        ("create", errno.EMFILE),
        ("sync", errno.EIO),
    ],
)
def test_what_a_disk_wont_take_is_served_counted_and_complained_about(
    operation: str,
    number: int,
    stand_in: Start,
    gateway: Start,
    eventually: Start,
    caplog: pytest.LogCaptureFixture,
) -> None:
    disk = FaultyDisk()
    running = gateway(
        stand_in({"hello": "world"}).url, disk=disk, task=[{"name": "t", "match": {"model": "m"}}]
    )
    if operation != "create":  # else the segment would be open already
        assert content(running.post(json=BODY)) == "world"
    before = len(running.exchanges())
    disk.fault = operation, number
    for _ in range(3):
        assert content(running.post(json=BODY)) == "world"
    streamed = running.post(json={**BODY, "stream": True})
    assert streamed.text.endswith("data: [DONE]\n\n")
    assert running.metric(LOST, task="t") == 4
    assert len(running.exchanges()) == before
    (complaint,) = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert complaint.startswith("task t: an exchange is lost, the log can't take it: ")
    assert os.strerror(number) in complaint
    disk.fault = None
    assert content(running.post(json=BODY)) == "world"
    eventually(lambda: len(running.exchanges()) == before + 1)
    assert running.metric(LOST, task="t") == 4
    assert running.metric(LOGGED, task="t") == before + 1


def test_a_disk_that_hangs_holds_an_answer_up_for_a_bounded_time_only(
    stand_in: Start, gateway: Start, eventually: Start, caplog: pytest.LogCaptureFixture
) -> None:
    disk = FaultyDisk()
    running = gateway(
        stand_in({"hello": "world"}).url,
        disk=disk,
        log={"max_wait_s": 0.2},
        task=[{"name": "t", "match": {"model": "m"}}],
    )
    assert content(running.post(json=BODY)) == "world"
    disk.free.clear()
    try:
        began = time.monotonic()
        assert content(running.post(json=BODY)) == "world"
        assert running.post(json={**BODY, "stream": True}).text.endswith("data: [DONE]\n\n")
        assert 0.4 <= time.monotonic() - began < 10, "each waited for the disk, and not for long"
        assert running.metric(LATE, task="t") == 2
        assert running.metric(LOGGED, task="t") == 1
    finally:
        disk.free.set()
    eventually(lambda: running.metric(LOGGED, task="t") == 3)
    assert len(running.exchanges()) == 3, "late is not lost"
    assert running.metric(LOST, task="t") == 0
    (complaint,) = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert complaint.startswith("task t: an answer went out after 0.2 s before its exchange was on disk")


def test_a_disk_that_hangs_fills_no_memory(stand_in: Start, gateway: Start, eventually: Start) -> None:
    disk = FaultyDisk()
    running = gateway(
        stand_in({"hello": "world"}).url,
        disk=disk,
        log={"max_wait_s": 0.01, "max_waiting_bytes": 20_000},
        task=[{"name": "t", "match": {"model": "m"}}],
    )
    large = {**BODY, "metadata": {"more": "x" * 5_000}}
    disk.free.clear()
    try:
        for _ in range(8):
            assert content(running.post(json=large)) == "world"
        assert running.metric(LATE, task="t") + running.metric(LOST, task="t") == 8
        assert running.metric(LOST, task="t") == 5
    finally:
        disk.free.set()
    eventually(lambda: running.metric(LOGGED, task="t") == 3)
    assert len(running.exchanges()) == 3
