"""What the campaign runs on: a teacher, a Redis and a gateway with several workers, each behind a bad link."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import orjson

from loadtest.chaos.link import Link, linked
from loadtest.chaos.traffic import MODEL, STUDENT_TOPICS, Message
from loadtest.processes import Processes, find_processes
from loadtest.stack import KEY_VARIABLE, Child, StackError, start_gateway, start_stand_in
from routers.confidence import Confidence
from routers.router import Router
from serving.closed_answers import KnownAnswer, TokenEstimate
from serving.linear import LinearStudent
from serving.releases import ReleaseStore

TASK = "topics"
WORKERS = 2
_LOST = "understudy_exchanges_lost_total{"
_STUDENT_MARGIN = 3.0


@dataclass(slots=True)
class Redis:
    """A Redis server of our own on a free port; it keeps nothing on disk."""

    folder: Path
    port: int = 0
    _process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    def start(self) -> None:
        """Start it, empty, and return when it accepts connections."""
        if not self.port:
            self.port = free_port()
        options = ["--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
        self._process = subprocess.Popen(  # noqa: S603
            ["redis-server", *options],  # noqa: S607 - the system's own
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        deadline = time.monotonic() + 10
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 0.2):
                return
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise StackError("redis-server didn't start")
            time.sleep(0.02)

    def kill(self) -> None:
        """End it with SIGKILL."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def command(self, *words: str) -> None:
        """Give it a command, whose answer isn't read further than that it came."""
        with socket.create_connection(("127.0.0.1", self.port), 2.0) as connection:
            parts = "".join(f"${len(word.encode())}\r\n{word}\r\n" for word in words)
            connection.sendall(f"*{len(words)}\r\n{parts}".encode())
            connection.recv(1024)


@dataclass(slots=True)
class Stage:
    """Everything that runs, and the links between."""

    folder: Path
    config: Path
    state_dir: Path
    base_url: str
    stand_in_url: str
    redis: Redis
    to_redis: Link
    to_teacher: Link
    gateway: Child

    def processes(self) -> Processes:
        """Return who of the gateway runs now."""
        return find_processes(self.gateway.pid, self.state_dir)

    def limit_files(self, most_bytes: int | None) -> None:
        """Let no worker's file grow beyond `most_bytes`: what writing to a full disk is like. None: as before."""
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        soft = hard if most_bytes is None else most_bytes
        for pid in self.processes().workers:
            with contextlib.suppress(ProcessLookupError):
                resource.prlimit(pid, resource.RLIMIT_FSIZE, (soft, hard))

    def teacher_fails(self, rule: str = "") -> None:
        """Script what goes wrong at the teacher from now on (serving/failures.py); nothing: all is well."""
        url = f"{self.stand_in_url.removesuffix('/v1')}/failures"
        request = urllib.request.Request(url, data=rule.encode(), method="POST")  # noqa: S310 - our own http URL
        with urllib.request.urlopen(request, timeout=5.0) as answer:  # noqa: S310
            answer.read()

    def counted_lost(self) -> int:
        """Return how many exchanges the gateway says it could not log, by its metrics."""
        url = f"{self.base_url.removesuffix('/v1')}/metrics"
        with urllib.request.urlopen(url, timeout=5.0) as answer:  # noqa: S310 - our own http URL
            lines = answer.read().decode().splitlines()
        return sum(int(float(line.rpartition(" ")[2])) for line in lines if line.startswith(_LOST))

    def signal_gateway(self, number: signal.Signals) -> None:
        """Send the supervisor a signal."""
        os.kill(self.gateway.pid, number)


@contextlib.asynccontextmanager
async def staged(folder: Path, messages: Iterable[Message]) -> AsyncIterator[Stage]:
    """Set the stage in `folder`, which exists, while the context lasts. Raises StackError for what can't be started."""
    recording = folder / "recording.jsonl"
    recording.write_bytes(
        b"".join(orjson.dumps({"text": m.text, "teacher": m.answer}) + b"\n" for m in messages)
    )
    redis = Redis(folder)
    children: list[Child] = []
    async with contextlib.AsyncExitStack() as stack:
        stack.callback(_stop, children, redis)
        await asyncio.to_thread(redis.start)
        options = ["--model", MODEL, "--latency-ms", "5"]
        stand_in, stand_in_url = start_stand_in(recording, folder / "stand-in.log", *options)
        children.append(stand_in)
        teacher_port = int(stand_in_url.removesuffix("/v1").rpartition(":")[2])
        to_teacher = await stack.enter_async_context(linked("127.0.0.1", teacher_port))
        to_redis = await stack.enter_async_context(linked("127.0.0.1", redis.port))
        port = free_port()
        state_dir = folder / "state"
        config = folder / "understudy.toml"
        config.write_text(configuration(state_dir, port, to_teacher, to_redis), encoding="utf-8")
        publish(state_dir)
        gateway, base_url = await asyncio.to_thread(start_gateway, config, folder / "gateway.log")
        stage = Stage(
            folder,
            config,
            state_dir,
            base_url,
            stand_in_url,
            redis,
            to_redis,
            to_teacher,
            gateway,
        )
        stack.callback(lambda: stage.gateway.stop())
        yield stage


def configuration(state_dir: Path, port: int, to_teacher: Link, to_redis: Link) -> str:
    """Return the gateway's configuration: a short deadline, so that what doesn't answer is seen to fail.

    Without a first level of its own a worker's hits come from Redis, so that they tell when it is back.
    """
    return f"""\
state_dir = {orjson.dumps(str(state_dir)).decode()}

[server]
port = {port}
workers = {WORKERS}

[teacher]
base_url = "http://127.0.0.1:{to_teacher.listening}/v1"
api_key_env = "{KEY_VARIABLE}"
trainable = true
timeout_s = 3
price = {{ input = 10.0, output = 30.0 }}

[cache]
url = "redis://127.0.0.1:{to_redis.listening}/0"
max_bytes = 0

[learning]
interval_s = 0

[[task]]
name = "{TASK}"
match = {{ model = "{MODEL}" }}
"""


def publish(state_dir: Path) -> None:
    """Make a student live that knows its topics: it is sure of texts that name one, and of no others."""
    size = len(STUDENT_TOPICS)
    student = LinearStudent(
        vocabulary=list(STUDENT_TOPICS),
        words=size,
        idf=np.ones(size, dtype=np.float32),
        weights=10 * np.eye(size, dtype=np.float32),
        intercept=np.zeros(size, dtype=np.float32),
        answers=[KnownAnswer(topic, [_choice(topic)], 2) for topic in STUDENT_TOPICS],
        tokens=TokenEstimate(fixed=8.0, per_character=0.25),
    )
    router = Router(Confidence.of_score(slope=1.0, offset=-2.0), rank_threshold=_STUDENT_MARGIN - 2.0)
    store = ReleaseStore(state_dir)
    files = {**student.files(), "router.json": router.dump()}
    store.set_live(TASK, store.write(TASK, files, {"student": "linear"}))


def free_port() -> int:
    """Return a port of the loopback interface that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port: int = listening.getsockname()[1]
        return port


def _stop(children: list[Child], redis: Redis) -> None:
    for child in children:
        child.stop()
    redis.kill()


def _choice(text: str) -> dict[str, object]:
    return {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
