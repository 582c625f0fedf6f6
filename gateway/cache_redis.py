"""The cache's second level: a Redis that several gateways share, and that may be slow, full or gone at any time.

A request never waits longer than 50 ms for it, and not at all while it is known to be lost; a write never
holds up a request.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from gateway.metrics import CachePut
from gateway.redis_client import Command, RedisClient, RedisLost, Refused, Reply, connect, tls_context
from gateway.redis_lane import Lane
from gateway.redis_presence import Presence
from serving.redis_url import RedisUrl

_WRITE_PATIENCE_S = 1.0
_MOST_WRITES = 512
_MOST_WRITE_BYTES = 16 * 1024 * 1024
_BATCH_BYTES = 1024 * 1024
_FIRST_WRITE_REST_S = 0.1
_LONGEST_WRITE_REST_S = 2.0


@dataclass(frozen=True, slots=True)
class _Write:
    command: Command
    size: int
    done: Callable[[CachePut], None]


class RedisLevel:
    """What is read from and written to Redis. Made inside a running event loop; it begins to connect at once.

    A batch of questions may take `patience_s`, and nobody waits longer than half as much again. Raises
    ConfigError for certificates that can't be used.
    """

    def __init__(self, url: RedisUrl, *, patience_s: float) -> None:
        tls = tls_context(url)
        limit_s = 1.5 * patience_s
        self._presence = Presence(lambda: connect(url, tls), patience_s=patience_s)
        self._reads = Lane(self._presence, _read, patience_s=patience_s, limit_s=limit_s)
        self._calls = Lane(self._presence, _call, patience_s=patience_s, limit_s=limit_s)
        self._writes: deque[_Write] = deque()
        self._write_bytes = 0
        self._writer: asyncio.Task[None] | None = None
        self._write_rest_s = _FIRST_WRITE_REST_S
        self._no_write_before = 0.0
        self._closed = False
        self._presence.start()

    async def read(self, *names: str) -> tuple[bytes | None, ...] | None:
        """Return what stands under names of one slot, all at one moment; None if Redis can't be asked."""
        if self._presence.client is None:
            return None
        try:
            return await self._reads.ask(names)
        except RedisLost:
            return None

    async def call(self, command: Command) -> int | None:
        """Run a command whose reply is a number; None if Redis can't be asked, or refuses."""
        if self._presence.client is None:
            return None
        try:
            reply = await self._calls.ask(command)
        except RedisLost:
            return None
        return reply if isinstance(reply, int) else None

    def write(
        self, command: Command, size: int, done: Callable[[CachePut], None], *, takes_room: bool = True
    ) -> None:
        """Run a command of `size` bytes in the background; `done` is told what came of it.

        A reply of 0 is `fenced`; `dropped` is what Redis never saw or never answered, for want of room or of
        Redis. What takes no room in Redis is tried even while it is full.
        """
        if (
            self._closed
            or self._presence.client is None
            or (takes_room and time.monotonic() < self._no_write_before)
            or len(self._writes) >= _MOST_WRITES
            or self._write_bytes + size > _MOST_WRITE_BYTES
        ):
            done("dropped")
            return
        self._writes.append(_Write(command, size, done))
        self._write_bytes += size
        if self._writer is None:
            self._writer = asyncio.create_task(self._write_all(), name="redis writes")

    async def aclose(self) -> None:
        """Write what waits, then close everything; within two seconds or so. May be called twice."""
        if self._writer is not None:
            await asyncio.wait([self._writer], timeout=_WRITE_PATIENCE_S)
        self._closed = True
        if self._writer is not None:
            self._writer.cancel()
            await asyncio.wait([self._writer])
        await self._reads.aclose()
        await self._calls.aclose()
        await self._presence.aclose()

    async def _write_all(self) -> None:
        batch: list[_Write] = []
        client = None
        try:
            while self._writes:
                client = self._presence.client
                if client is None:
                    break
                batch = self._next_writes()
                async with asyncio.timeout(_WRITE_PATIENCE_S):
                    replies = await client.run([write.command for write in batch])
                for write, reply in zip(batch, replies, strict=True):
                    write.done(_outcome(reply))
                batch = []
                self._after_writes(replies)
        except (TimeoutError, RedisLost) as error:
            if client is not None:
                why = error if isinstance(error, RedisLost) else RedisLost("it didn't take a write in time")
                self._presence.lost(client, why)
        finally:
            left = [*batch, *self._writes]
            self._writes.clear()
            self._write_bytes = 0
            self._writer = None
            for write in left:
                write.done("dropped")

    def _next_writes(self) -> list[_Write]:
        batch: list[_Write] = []
        size = 0
        while self._writes and (not batch or size + self._writes[0].size <= _BATCH_BYTES):
            write = self._writes.popleft()
            size += write.size
            batch.append(write)
        self._write_bytes -= size
        return batch

    def _after_writes(self, replies: Sequence[Reply]) -> None:
        """Leave a Redis that takes no writes (full, a replica) alone for a while; it is read all the same."""
        refused = [reply.code for reply in replies if isinstance(reply, Refused)]
        if not refused:
            self._write_rest_s = _FIRST_WRITE_REST_S
            return
        self._no_write_before = time.monotonic() + self._write_rest_s
        self._write_rest_s = min(2 * self._write_rest_s, _LONGEST_WRITE_REST_S)
        if "READONLY" in refused or "ReadOnlyError" in refused:
            self._presence.renew()


async def _read(client: RedisClient, questions: list[tuple[str, ...]]) -> list[tuple[bytes | None, ...]]:
    values = iter(await client.get([name for names in questions for name in names]))
    return [tuple(next(values) for _ in names) for names in questions]


async def _call(client: RedisClient, commands: list[Command]) -> list[Reply]:
    return await client.run(commands)


def _outcome(reply: Reply) -> CachePut:
    if isinstance(reply, Refused):
        return "failed"
    return "fenced" if reply == 0 else "stored"
