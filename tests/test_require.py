"""What a machine lacks is skipped on a laptop and fails where UNDERSTUDY_REQUIRE names it, as in `.ci/run`."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

Require = Callable[[str], None]
CONFTEST = Path(__file__).with_name("conftest.py")
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


@pytest.mark.parametrize(
    ("required", "outcome"), [("", "skipped"), ("another,vllm", "error"), ("torch", "error")]
)
def test_an_environment_with_torch_that_is_absent_skips_or_fails(
    required: str, outcome: str, tmp_path: Path
) -> None:
    """What it needs is asked in a session of its own: the fixture is the session's."""
    (tmp_path / "conftest.py").write_text(CONFTEST.read_text())
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = torch: needs it\n")
    (tmp_path / "test_one.py").write_text("def test_one(torch_python): pass")
    asked = {"UNDERSTUDY_VLLM_PYTHON": str(tmp_path / "python"), "UNDERSTUDY_REQUIRE": required}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rs", "test_one.py"],
        cwd=tmp_path,
        env=os.environ | asked | {"PYTHONPATH": str(CONFTEST.parents[1])},
        capture_output=True,
        text=True,
    )
    assert f"1 {outcome}" in done.stdout.splitlines()[-1], done.stdout
    assert "make install-vllm" in done.stdout
