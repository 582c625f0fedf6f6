"""Several workers and the supervisor that keeps them: `serve --workers N`.

The supervisor opens the socket, starts the workers and serves nothing itself. It speaks to each worker over a
pipe, not by signals: a signal to the whole group (Ctrl-C, systemd) reaches the workers too, and twice would
mean "at once". A pipe that ends tells a worker that its supervisor was killed: it stops in order, since
nobody would replace it and the address would stay taken.

Each worker writes its metrics to files named by its place (0 … N-1): one that takes another's place goes on
counting where that one ended, so that totals neither vanish nor double.
"""

from __future__ import annotations

import asyncio
import ctypes
import logging
import multiprocessing
import multiprocessing.connection
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from multiprocessing.sharedctypes import RawValue
from pathlib import Path

from prometheus_client import values
from prometheus_client.multiprocess import mark_process_dead
from prometheus_client.values import MultiProcessValue

from gateway.app import create_app
from gateway.log_format import configure_logging
from gateway.reload import reloadable
from gateway.worker import Beat, Worker, relieve_collector
from serving.errors import UnderstudyError
from serving.settings import Settings

log = logging.getLogger("understudy.workers")

_LOOK_EVERY_S = 0.5
_HUNG_AFTER_S = 30.0
"""Of silence: a worker whose event loop stands still for so long is replaced."""
_START_S = 120.0
"""A worker that doesn't serve by then is replaced. On a busy machine importing alone takes many seconds."""
_CLOSING_S = 15.0
"""What a worker may take after its grace time to finish audits, the log and a learner."""
_STOP_AT_ONCE_S = 3.0
_SETTLED_S = 10.0
_LONGEST_PAUSE_S = 10.0
_FAILED = 3

_STOP = "stop"
_STOP_AT_ONCE = "stop at once"

Order = str | Settings


@dataclass(slots=True)
class _Post:
    """A worker as its supervisor sees it: the process in one place, and how it fares."""

    place: int
    process: SpawnProcess
    orders: Connection
    beat: ctypes.c_double
    started: float
    failures: int
    last_beat: float = 0.0
    silent_s: float = 0.0

    def order(self, what: Order) -> None:
        """Tell the worker something; one that is dying needn't hear it."""
        try:
            self.orders.send(what)
        except OSError:
            log.debug("worker %s takes no orders any more", self.process.pid)


class Supervisor:
    """Starts the workers, replaces those that die or hang, and passes on what it is told by signals.

    `reread` reads the configuration again (SIGHUP), and `reloaded` is told of it; `early` holds the signals that came
    before `run`.
    """

    def __init__(
        self,
        settings: Settings,
        listening: socket.socket,
        *,
        config_path: Path | None,
        reread: Callable[[], Settings] | None,
        early: list[int],
        reloaded: Callable[[Settings], None] = lambda _: None,
    ) -> None:
        self._settings = settings
        self._listening = listening
        self._config_path = config_path
        self._reread = reread
        self._early = early
        self._reloaded = reloaded
        self._posts: dict[int, _Post] = {}
        self._vacant: dict[int, tuple[float, int]] = {}
        self._ever_served = False
        self._code = 0
        self._deadline: float | None = None

    def run(self) -> int:
        """Serve until told to stop; return the exit code."""
        with _signals() as signals:
            for place in range(self._settings.server.workers):
                self._start(place, failures=0)
            for received in self._early:
                self._obey(received)
            looked = time.monotonic()
            while self._posts or self._deadline is None:
                sentinels = [post.process.sentinel for post in self._posts.values()]
                multiprocessing.connection.wait([*sentinels, signals.wake], timeout=self._pause())
                for received in signals.take():
                    self._obey(received)
                now = time.monotonic()
                self._bury()
                self._replace(now)
                self._look(min(now - looked, 2 * _LOOK_EVERY_S))
                looked = now
        return self._code

    def _start(self, place: int, *, failures: int) -> None:
        spawn = multiprocessing.get_context("spawn")
        ours, theirs = spawn.Pipe(duplex=False)
        beat = RawValue(ctypes.c_double, 0.0)
        process = spawn.Process(
            target=_work,
            name=f"worker {place}",
            args=(
                place,
                self._settings,
                self._config_path,
                self._listening,
                ours,
                beat,
            ),
            daemon=True,
        )
        process.start()
        ours.close()  # else the pipe wouldn't end with us
        self._posts[place] = _Post(place, process, theirs, beat, time.monotonic(), failures)

    def _obey(self, received: int) -> None:
        if received == signal.SIGHUP:
            self._reload()
        elif self._deadline is None:
            # First of all: what would be accepted for us now, nobody would serve.
            self._listening.close()
            self._stop(_STOP, self._settings.server.grace_s + _CLOSING_S)
        else:
            self._stop(_STOP_AT_ONCE, _STOP_AT_ONCE_S)

    def _stop(self, order: str, within_s: float) -> None:
        self._vacant.clear()
        self._deadline = time.monotonic() + within_s
        for post in self._posts.values():
            post.order(order)

    def _reload(self) -> None:
        if self._reread is None or self._deadline is not None:
            return
        try:
            settings = self._reread()
            settings.teacher_key()
        except UnderstudyError as error:
            log.error("the configuration can't be used, the old one stays: %s", error)
            return
        for post in self._posts.values():
            post.order(settings)
        self._settings, _ = reloadable(self._settings, settings)
        self._reloaded(self._settings)

    def _bury(self) -> None:
        """Note who has died, and when to replace them."""
        for place, post in list(self._posts.items()):
            if post.process.is_alive():
                continue
            post.process.join()
            post.orders.close()
            mark_process_dead(place)  # type: ignore[no-untyped-call]
            del self._posts[place]
            self._ever_served = self._ever_served or post.beat.value > 0
            if self._deadline is not None:
                continue
            code = post.process.exitcode
            if code == _FAILED and not self._ever_served:
                # What keeps the first one from starting keeps every other.
                self._code = _FAILED
                self._stop(_STOP, self._settings.server.grace_s + _CLOSING_S)
                return
            failures = 0 if time.monotonic() - post.started > _SETTLED_S else post.failures + 1
            pause = 0.0 if failures < 2 else min(_LONGEST_PAUSE_S, 0.25 * 2**failures)
            log.error("worker %s has ended (%s) and is replaced", post.process.pid, _cause(code))
            self._vacant[place] = (time.monotonic() + pause, failures)

    def _replace(self, now: float) -> None:
        for place, (due, failures) in list(self._vacant.items()):
            if due <= now:
                del self._vacant[place]
                self._start(place, failures=failures)

    def _look(self, passed_s: float) -> None:
        """End whoever is silent for too long. Counted in time that we were awake ourselves."""
        overdue = self._deadline is not None and time.monotonic() > self._deadline
        for post in self._posts.values():
            beat = post.beat.value
            post.silent_s = 0.0 if beat != post.last_beat else post.silent_s + passed_s
            post.last_beat = beat
            self._ever_served = self._ever_served or beat > 0
            hung = self._deadline is None and post.silent_s > (_HUNG_AFTER_S if beat else _START_S)
            if hung or overdue:
                log.error(
                    "worker %s %s: it is killed", post.process.pid, "hangs" if hung else "didn't stop in time"
                )
                post.process.kill()

    def _pause(self) -> float:
        due = min((due for due, _ in self._vacant.values()), default=None)
        return _LOOK_EVERY_S if due is None else min(_LOOK_EVERY_S, max(0.0, due - time.monotonic()))


class _Signals:
    """The signals that came in; `wake` becomes readable with each."""

    def __init__(self, wake: socket.socket) -> None:
        self.wake = wake
        self._received: list[int] = []

    def note(self, number: int, _: object) -> None:
        """Be a signal handler."""
        self._received.append(number)

    def take(self) -> list[int]:
        """Return what came in since the last time."""
        # The byte that wakes us is written before `note` is called: what comes in between is for the next time.
        with suppress(BlockingIOError):
            self.wake.recv(4096)
        received, self._received = self._received, []
        return received


@contextmanager
def _signals() -> Iterator[_Signals]:
    """Hear SIGTERM, SIGINT and SIGHUP."""
    reader, writer = socket.socketpair()
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    with reader, writer:
        reader.setblocking(False)
        writer.setblocking(False)
        heard = _Signals(reader)
        before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        handlers = {number: signal.signal(number, heard.note) for number in numbers}
        try:
            yield heard
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(before)


def _work(
    place: int,
    settings: Settings,
    config_path: Path | None,
    listening: socket.socket,
    orders: Connection,
    beat: ctypes.c_double,
) -> None:
    """Be a worker, in a process of its own."""
    for left_to_the_supervisor in (signal.SIGINT, signal.SIGHUP):
        signal.signal(left_to_the_supervisor, signal.SIG_IGN)
    values.ValueClass = MultiProcessValue(lambda: place)  # type: ignore[no-untyped-call]
    configure_logging(settings.observe.log_format)
    log.info("worker %d starts", os.getpid())
    gateway = create_app(settings, config_path=config_path)
    worker = Worker(gateway, settings, lambda worker: _listen_to(orders, worker), Beat(beat))
    relieve_collector()
    worker.run(sockets=[listening])
    sys.exit(0 if worker.started else _FAILED)


def _listen_to(orders: Connection, worker: Worker) -> None:
    """Obey the supervisor from now on; SIGTERM still stops this one worker, however often it comes."""
    loop = asyncio.get_running_loop()

    def hear() -> None:
        try:
            order: Order = orders.recv()
        except (EOFError, OSError):
            loop.remove_reader(orders.fileno())
            log.error("the supervisor is gone: this worker stops")
            worker.stop()
            return
        if isinstance(order, Settings):
            settings = order
            worker.reload(lambda: settings)
        elif order == _STOP_AT_ONCE:
            worker.stop_at_once()
        else:
            worker.stop()

    loop.add_signal_handler(signal.SIGTERM, worker.stop)
    loop.add_reader(orders.fileno(), hear)


def _cause(code: int | None) -> str:
    if code is not None and code < 0:
        # Of the real-time signals only two have names.
        named = -code in signal.Signals.__members__.values()
        return signal.Signals(-code).name if named else f"signal {-code}"
    return f"exit code {code}"
