"""What a machine lacks is skipped on a laptop and fails where UNDERSTUDY_REQUIRE names it, as in `.ci/run`."""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

Require = Callable[[str], None]
ABSENT = "understudy-program-that-nobody-has"


def test_a_program_that_is_absent_skips(require: Require, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNDERSTUDY_REQUIRE", "sh, another")
    with pytest.raises(pytest.skip.Exception, match="isn't installed"):
        require(ABSENT)


def test_one_that_is_required_fails(require: Require, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNDERSTUDY_REQUIRE", f"another, {ABSENT}")
    with pytest.raises(pytest.fail.Exception, match=f"UNDERSTUDY_REQUIRE names {ABSENT}"):
        require(ABSENT)


def test_one_that_is_there_is_used(require: Require) -> None:
    require("sh")


def test_the_redis_of_the_gate_answers(require: Require, tmp_path: Path) -> None:
    require("redis-server")
    path = tmp_path / "redis.sock"
    command = ["redis-server", "--port", "0", "--unixsocket", str(path), "--save", "", "--dir", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as server:
        try:
            deadline = time.monotonic() + 10
            while not path.exists():
                assert server.poll() is None, "redis-server ended instead of starting"
                assert time.monotonic() < deadline, "redis-server didn't start within 10 s"
                time.sleep(0.02)
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(str(path))
                client.sendall(b"PING\r\n")
                assert client.recv(64) == b"+PONG\r\n"
        finally:
            server.terminate()
