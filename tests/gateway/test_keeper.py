from __future__ import annotations

import fcntl
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gateway.app import create_app
from serving.settings import Settings

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


def test_adapters_that_cant_be_looked_after_hold_up_nothing_else(
    stand_in: Start, gateway: Start, eventually: Start, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "state" / "adapters" / "understudy-0123456789ab").mkdir(parents=True)
    (tmp_path / "state" / "tasks" / "odd" / "live").mkdir(parents=True)  # where a file should be
    began = time.time()
    running = gateway(stand_in({}).url)
    eventually(lambda: running.metric("understudy_keeper_round_timestamp_seconds") >= began)
    eventually(lambda: "adapters" in caplog.text)


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


def learners() -> list[str]:
    """The processes of `understudy learn` that this one has started and that still run."""
    listed = subprocess.run(
        ["ps", "-A", "-o", "ppid=,stat=,args="], capture_output=True, text=True, check=True
    ).stdout
    found = [line.split(maxsplit=2) for line in listed.splitlines()]
    return [
        words[2]
        for words in found
        if words[0] == str(os.getpid()) and not words[1].startswith("Z") and "understudy learn" in words[2]
    ]


def test_a_learner_that_says_too_much_at_once_is_heard_to_its_end(
    require: Start,
    serve: Start,
    write_log: Start,
    exchanges: Start,
    eventually: Start,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    require("ps")
    write_log(exchanges([("a parcel", "lost")]))
    settings = Settings(state_dir=tmp_path / "state", learning={"interval_s": 0.1})
    broken = tmp_path / "understudy.toml"
    broken.write_text("k" * 1_000_000 + " = 1")  # which the learner complains about in one very long line
    serve(create_app(settings, config_path=broken))
    eventually(lambda: "ended with code 2" in caplog.text)
    assert learners() == []
