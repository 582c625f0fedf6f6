"""What only a gateway's tests need beside it: a real Redis, and a program that stands where vLLM would."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from serving.settings import Settings
from serving.vllm_place import VllmPlace, read_place

Require = Callable[[str], None]


class RunningRedis:
    """A redis-server process without persistence. `url` is its TCP port; `socket` its Unix socket."""

    def __init__(self, directory: Path, *options: str, password: str | None = None) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port: int = free.getsockname()[1]
        self.url = f"redis://{f':{password}@' if password else ''}127.0.0.1:{self.port}"
        self.socket = directory / f"{self.port}.sock"
        self._password = password
        self._command = ["redis-server", "-", "--port", str(self.port), *options]
        self._config = f"""
bind 127.0.0.1
unixsocket {self.socket}
dir {directory}
save ""
{f"requirepass {password}" if password else ""}
"""
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        """Start it (again, and empty), and wait until it answers."""
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
        )
        assert self._process.stdin is not None
        with self._process.stdin as config:
            config.write(self._config)
        deadline = time.monotonic() + 20
        while True:
            try:
                self.command("PING")
                return
            except OSError:
                assert self._process.poll() is None, f"{' '.join(self._command)} ended instead of starting"
                assert time.monotonic() < deadline, "redis-server didn't start within 20 s"
                time.sleep(0.01)

    def command(self, *words: str | int | bytes) -> Any:
        """Run a command over its Unix socket, as the test's own client; OSError if it isn't there."""
        from redis import Redis, exceptions  # most tests need none, and it takes a third of a second

        client = Redis(unix_socket_path=str(self.socket), password=self._password, socket_timeout=10)
        try:
            with contextlib.closing(client):
                return client.execute_command(*words)  # type: ignore[no-untyped-call]
        except exceptions.ConnectionError as error:
            raise OSError(str(error)) from error

    def stop(self) -> None:
        """Let it hang, with its connections open (SIGSTOP)."""
        self._signal(signal.SIGSTOP)

    def cont(self) -> None:
        """Let it go on (SIGCONT)."""
        self._signal(signal.SIGCONT)

    def kill(self) -> None:
        """End it without a word (SIGKILL)."""
        if self._process is not None:
            self._signal(signal.SIGKILL)
            self._process.wait(timeout=20)

    def _signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)


@pytest.fixture(name="redis")
def redis_server(require: Require) -> Iterator[Callable[..., RunningRedis]]:
    """Start redis-servers with these command-line options, until the test ends."""
    require("redis-server")
    running: list[RunningRedis] = []
    # A Unix socket's path has 107 characters at most; pytest's own folders are too deep.
    with tempfile.TemporaryDirectory(prefix="redis-") as directory:

        def start(*options: str, password: str | None = None) -> RunningRedis:
            server = RunningRedis(Path(directory), *options, password=password)
            server.start()
            running.append(server)
            return server

        yield start
        for server in running:
            server.kill()


class PretendVllm:
    """A folder that `pretend_vllm.py` takes for a model, and what became of the servers."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "model"
        self.folder.mkdir()
        program = Path(__file__).with_name("pretend_vllm.py")
        self.python = folder / "python"
        self.python.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "{program}" "$@"\n')
        self.python.chmod(0o755)
        self.state_dir = folder / "state"
        self.state_dir.mkdir()
        self.behaves()

    def behaves(self, **behaviour: Any) -> None:
        written = self.folder / "new"
        written.write_text(json.dumps(behaviour))
        written.replace(self.folder / "behaviour.json")

    def starts(self) -> list[dict[str, Any]]:
        file = self.folder / "started"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def left(self) -> list[int]:
        """Return the processes that were started and live."""
        pids = [pid for start in self.starts() for pid in (start["pid"], start["child"]) if pid is not None]
        return [pid for pid in pids if _lives(pid)]

    def settings(self, **vllm: Any) -> Settings:
        given = {"python": str(self.python), "model": str(self.folder), "served_model_name": "small", **vllm}
        return Settings(state_dir=self.state_dir, student={"vllm": given})

    def place(self) -> VllmPlace | None:
        return read_place(self.state_dir)

    def phase(self) -> str | None:
        place = self.place()
        return place.phase if place else None


@pytest.fixture
def pretend_vllm(tmp_path: Path) -> Iterator[PretendVllm]:
    """A folder to serve as vLLM would; fails the test that leaves a server running."""
    made = PretendVllm(tmp_path)
    yield made
    deadline = time.monotonic() + 20
    while left := made.left():
        assert time.monotonic() < deadline, f"servers outlive what runs them: {left}"
        time.sleep(0.05)


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
