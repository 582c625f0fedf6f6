"""`store: false` leaves nothing on the disk, whichever way the request takes."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

Start = Callable[..., Any]
MARK = "parcel lost"


def asked(text: str = MARK, **more: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": text}], "store": False, **more}


def on_disk(state_dir: Path) -> bytes:
    return b"".join(path.read_bytes() for path in state_dir.rglob("*.jsonl*") if path.is_file())


@pytest.fixture
def running(stand_in: Start, gateway: Start, publish: Start, eventually: Start) -> Any:
    """A gateway whose student answers the mark, and audits every answer."""
    answers = {MARK: "lost", "hello": "unstored answer", "stored": "stored answer"}
    teacher = stand_in(answers, latency_ms=700, latency_spread=0)
    started = gateway(
        teacher.url,
        task=[{"name": "t", "match": {"model": "m"}, "audit_rate": 1.0}, {"name": "plain"}],
        log={"max_wait_s": 60.0},
    )
    publish(started.state_dir, "t", {"parcel lost": "lost", "card stolen": "stolen"})
    eventually(lambda: started.get("/readyz").json()["live_releases"] == 1)
    return started


def check(running: Any, eventually: Start) -> None:
    """Another exchange, written after all that, is the only one there."""
    body = {**asked("stored"), "store": True}
    assert running.post(json=body, headers={"x-understudy-task": "plain"}).status_code == 200
    eventually(lambda: len(running.exchanges()) == 1)
    found = on_disk(running.state_dir)
    assert found.count(b"\n") == 1
    assert b"stored answer" in found
    assert b"unstored" not in found
    assert MARK.encode() not in found


@pytest.mark.parametrize("stream", [False, True])
def test_by_teacher_and_by_student(running: Any, eventually: Start, stream: bool) -> None:
    plain = running.post(json=asked("hello", stream=stream), headers={"x-understudy-task": "plain"})
    student = running.post(json=asked(stream=stream))
    forced = running.post(json=asked(stream=stream), headers={"x-understudy-route": "teacher"})
    routes = [answer.headers["x-understudy-route"] for answer in (plain, student, forced)]
    assert routes == ["teacher", "student", "teacher"]
    time.sleep(1.0)  # an audit would be over by now
    assert running.metric("understudy_audits_total") == 0
    check(running, eventually)


def test_a_retry(running: Any, eventually: Start) -> None:
    for retries in range(3):
        answer = running.post(json=asked(), headers={"x-stainless-retry-count": str(retries)})
        assert answer.status_code == 200
    check(running, eventually)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up(running: Any, eventually: Start, stream: bool) -> None:
    with pytest.raises(httpx.ReadTimeout):
        running.post(json=asked("hello", stream=stream), headers={"x-understudy-task": "plain"}, timeout=0.1)
    eventually(lambda: running.metric("understudy_requests_total", code="499") == 1)
    check(running, eventually)
