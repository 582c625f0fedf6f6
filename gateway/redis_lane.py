"""Questions to Redis that travel together: while one batch is under way, the next one gathers.

A call of the library costs 70 to 150 µs however much it carries, so under load most of that is shared.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from gateway.redis_client import RedisClient, RedisLost
from gateway.redis_presence import Presence

Q = TypeVar("Q")
A = TypeVar("A")

_MOST_AT_ONCE = 256
_GRACE_S = 0.005


@dataclass(frozen=True, slots=True)
class _Waiting(Generic[Q, A]):
    question: Q
    answer: asyncio.Future[A]
    since: float


class Lane(Generic[Q, A]):
    """Sends questions in batches, one after the other, each within its time.

    `send` answers a batch in order, or raises RedisLost; then `presence` is told. A batch gets `patience_s`,
    and less if its oldest question has waited before: none waits longer than `limit_s`.
    """

    def __init__(
        self,
        presence: Presence,
        send: Callable[[RedisClient, list[Q]], Awaitable[list[A]]],
        *,
        patience_s: float,
        limit_s: float,
    ) -> None:
        self._presence = presence
        self._send = send
        self._patience_s = patience_s
        self._limit_s = limit_s
        self._gathering: list[_Waiting[Q, A]] = []
        self._running: asyncio.Task[None] | None = None

    async def ask(self, question: Q) -> A:
        """Return the answer, or raise RedisLost."""
        loop = asyncio.get_running_loop()
        waiting: _Waiting[Q, A] = _Waiting(question, loop.create_future(), loop.time())
        self._gathering.append(waiting)
        if self._running is None:
            self._running = asyncio.create_task(self._run(), name="redis lane")
        return await waiting.answer

    async def aclose(self) -> None:
        """Stop; whoever still waits is told that Redis is lost."""
        if self._running is not None:
            self._running.cancel()
            await asyncio.wait([self._running])

    async def _run(self) -> None:
        batch: list[_Waiting[Q, A]] = []
        client = None
        try:
            while self._gathering:
                client = self._presence.client
                if client is None:
                    break
                batch = self._gathering[:_MOST_AT_ONCE]
                del self._gathering[:_MOST_AT_ONCE]
                answers = await self._in_time(client, [item.question for item in batch], batch[0].since)
                for item, answer in zip(batch, answers, strict=True):
                    # One whose request has ended in the meantime is done already.
                    if not item.answer.done():
                        item.answer.set_result(answer)
        except RedisLost as why:
            if client is not None:
                self._presence.lost(client, why)
        finally:
            # Those that gathered behind a batch that failed would only fail later.
            for item in (*batch, *self._gathering):
                if not item.answer.done():
                    item.answer.set_exception(RedisLost("it was lost while this waited"))
            self._gathering = []
            self._running = None

    async def _in_time(self, client: RedisClient, questions: list[Q], since: float) -> list[A]:
        loop = asyncio.get_running_loop()
        deadline = min(loop.time() + self._patience_s, since + self._limit_s)
        sending = asyncio.ensure_future(self._send(client, questions))
        try:
            done, _ = await asyncio.wait([sending], timeout=max(0.0, deadline - loop.time()))
            if not done and loop.time() - deadline > _GRACE_S:
                # Not Redis was busy but this process: its answer may be here, only unread.
                done, _ = await asyncio.wait([sending], timeout=_GRACE_S)
            if done:
                return sending.result()
            raise RedisLost("it didn't answer in time")
        finally:
            if not sending.done():
                sending.cancel()
                with contextlib.suppress(asyncio.CancelledError, RedisLost):
                    await sending
