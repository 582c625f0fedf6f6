from __future__ import annotations

import fcntl
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Start = Callable[..., Any]
BODY = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}


def test_the_lock_makes_one_keeper(
    stand_in: Start, gateway: Start, eventually: Start, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="understudy.keeper")
    state_dir = tmp_path / "state"
    abandoned = state_dir / "tasks" / "old" / "events" / "00000000-999999999-1.jsonl.open"
    abandoned.parent.mkdir(parents=True)
    abandoned.write_bytes(b'{"crc":"torn')
    with (state_dir / "keeper.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        running = gateway(stand_in({"hello": "x"}).url)
        assert running.post(json=BODY).status_code == 200
        assert "is the keeper" not in caplog.text
        assert abandoned.exists()
    eventually(lambda: "is the keeper" in caplog.text)
    eventually(lambda: not abandoned.exists())


def test_it_learns_when_the_log_has_grown(
    stand_in: Start, gateway: Start, eventually: Start, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="understudy.keeper")
    running = gateway(stand_in({"hello": "x"}).url, learning={"interval_s": 0.2})
    running.post(json={**BODY, "store": False})
    time.sleep(0.5)
    assert "learning" not in caplog.text, "nothing was logged, so there is nothing to learn"
    running.post(json=BODY)
    eventually(lambda: "the log has grown: learning" in caplog.text)
