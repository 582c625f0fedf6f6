"""One process that serves: how it listens, takes in a new configuration, and ends without failing a request.

Ending (SIGTERM): nothing new is accepted, and `/readyz` says so. Whatever was accepted is served, in the end with
`connection: close`; idle connections stay open for as long as a client may believe in them. After the grace
time, requests that are still under way are told: an error status, or an error frame in a stream.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import uvicorn

from gateway.app import Gateway
from gateway.edge import KEEP_ALIVE_S, Door, Edge
from serving.errors import UnderstudyError
from serving.settings import Settings

log = logging.getLogger("understudy.worker")

BACKLOG = 2048
_CUT_OFF_S = 2.0
_AT_ONCE_S = 1.0
_YOUNG, _MIDDLING, _OLD = 10_000, 20, 50
"""When the collector looks: after so many new objects, so many looks at those, so many looks at the survivors."""


@dataclass(slots=True)
class Beat:
    """When the event loop last turned (`time.monotonic`); 0 until the worker serves. Shared with a supervisor."""

    shared: ctypes.c_double = field(default_factory=ctypes.c_double)

    def beat(self) -> None:
        """Say that the worker lives."""
        self.shared.value = time.monotonic()


class Worker(uvicorn.Server):
    """uvicorn's server with orders of its own: `stop`, `stop_at_once` and `reload`.

    They are called in the event loop, by whoever hears the signals. `begin` is called there first, `reloaded` with each
    configuration that was taken in.
    """

    def __init__(
        self,
        gateway: Gateway,
        settings: Settings,
        begin: Callable[[Worker], None],
        beat: Beat,
        *,
        reloaded: Callable[[Settings], None] = lambda _: None,
    ) -> None:
        config = uvicorn.Config(
            gateway,
            interface="asgi3",
            lifespan="on",
            loop="uvloop",
            http=Edge,
            ws="none",
            access_log=False,
            log_config=None,
            log_level="error",
            proxy_headers=False,
            server_header=False,
            backlog=BACKLOG,
            timeout_keep_alive=KEEP_ALIVE_S,
        )
        super().__init__(config)
        self.server_state = self._door = Door(receive_timeout_s=settings.server.receive_timeout_s)
        self._gateway = gateway
        self._grace_s = settings.server.grace_s
        self._begin = begin
        self._beat = beat
        self._reloaded = reloaded
        self._wanted: Callable[[], Settings] | None = None
        self._reloading: asyncio.Task[None] | None = None

    def stop(self) -> None:
        """End when the requests under way are over."""
        self.should_exit = True

    def stop_at_once(self) -> None:
        """End without waiting for anything."""
        self.should_exit = self.force_exit = True

    def reload(self, read: Callable[[], Settings]) -> None:
        """Take in the configuration that `read` gives; if it can't be used, the old one stays."""
        self._wanted = read
        if self._reloading is None and self.started:  # else `startup` does it: only what runs can be reloaded
            self._reloading = asyncio.get_running_loop().create_task(self._reload())

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start to serve."""
        self._begin(self)
        await super().startup(sockets)
        self._beat.beat()
        log.info("worker %d serves", os.getpid())
        if self.started and self._wanted is not None:
            self.reload(self._wanted)

    async def on_tick(self, counter: int) -> bool:
        """Do what uvicorn does ten times a second."""
        self._beat.beat()
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End, see above."""
        self._gateway.drain()
        self._door.draining = True
        connections, tasks = self._door.connections, self._door.tasks
        for connection in list(connections):
            connection.shutdown()
        await self._stop_listening(sockets or [])
        if tasks:
            log.info("stopping: %d requests are under way; again, and they are cut off", len(tasks))
        await self._until_over(self._grace_s)
        if tasks:
            log.warning("stopping: %d requests are cut off", len(tasks))
            for task in list(tasks):
                task.cancel()
            await asyncio.wait(list(tasks), timeout=_CUT_OFF_S)
        for connection in list(connections):
            connection.transport.close()
        if self._reloading is not None:
            await asyncio.wait([self._reloading], timeout=_AT_ONCE_S)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_AT_ONCE_S if self.force_exit else None):
                await self.lifespan.shutdown()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals to whoever runs this."""
        yield

    async def _stop_listening(self, sockets: list[socket.socket]) -> None:
        """Take in every connection the system has accepted for us, then close: it would reset those."""
        waiting: list[socket.socket] = []
        for listening in sockets:
            listening.setblocking(False)
            with contextlib.suppress(OSError):  # BlockingIOError: that was the last one
                while True:
                    waiting.append(listening.accept()[0])
        for server in self.servers:
            server.close()
        for listening in sockets:
            listening.close()
        loop = asyncio.get_running_loop()
        for accepted in waiting:
            with contextlib.suppress(OSError):
                await loop.connect_accepted_socket(self._connect, accepted)
        await asyncio.sleep(0)

    def _connect(self) -> Edge:
        return Edge(self.config, self._door, self.lifespan.state)

    async def _until_over(self, seconds: float) -> None:
        """Return when all connections are closed and all requests over; after `seconds`, or if it's urgent."""
        deadline = time.monotonic() + seconds
        while (self._door.connections or self._door.tasks) and not self.force_exit:
            if time.monotonic() >= deadline:
                return
            self._beat.beat()
            await asyncio.sleep(0.05)

    async def _reload(self) -> None:
        while self._wanted is not None:
            read, self._wanted = self._wanted, None
            try:
                settings = await asyncio.to_thread(read)
                kept = await self._gateway.reload(settings)
            except UnderstudyError as error:
                log.error("the configuration can't be used, the old one stays: %s", error)
            except Exception:
                log.exception("reloading the configuration failed, the old one stays")
            else:
                self._grace_s = settings.server.grace_s
                self._reloaded(settings)
                log.info("the configuration was reloaded")
                if kept:
                    log.warning("only a restart changes %s: the old values stay", ", ".join(kept))
        self._reloading = None


def relieve_collector() -> None:
    """Have this process's garbage collector leave alone what was imported, and look at the rest less often.

    Requests leave next to no cycles, and with the defaults (700, 10, 10) looking for them takes a good part of
    the time a request takes.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(_YOUNG, _MIDDLING, _OLD)
