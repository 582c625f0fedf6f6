"""The line before the teacher: so many requests at once, so many waiting, and not for long.

Without it, a slow teacher collects requests until memory or clients' patience ends, and then answers those
that nobody waits for any more.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from serving.errors import UpstreamError

_PATIENCE_S = 5.0
_BACKGROUND_SHARE = 4
"""Background work gets a fourth of the slots at most, and only those that nobody waits for."""


_ROOM_SHARE = 5


class UpstreamBusy(UpstreamError):
    """The teacher wasn't asked: too many requests are under way or waiting already."""

    kind = "busy"


class Slots:
    """Hands out `limit` slots. `waiting` requests may wait for one, in turn, `patience_s` at most.

    What runs in the background (audits) waits behind everybody else, without a limit of time or number: its
    caller sees to that.
    """

    def __init__(self, limit: int, *, waiting: int, patience_s: float = _PATIENCE_S) -> None:
        self._limit = limit
        self._most_waiting = waiting
        self._patience_s = patience_s
        self._free = limit
        self._line: deque[asyncio.Future[None]] = deque()
        self._background_line: deque[asyncio.Future[None]] = deque()
        self._background_free = max(1, limit // _BACKGROUND_SHARE)

    @property
    def has_room(self) -> bool:
        """Whether one could be taken so that a fifth stays free, and nobody waits: room for what isn't needed."""
        return (self._free - 1) * _ROOM_SHARE >= self._limit and not self._line

    @asynccontextmanager
    async def taken(self, *, background: bool = False) -> AsyncIterator[None]:
        """Hold a slot. Raises UpstreamBusy when there is none in time."""
        await self.take(background=background)
        try:
            yield
        finally:
            self.give_back(background=background)

    async def take(self, *, background: bool = False) -> None:
        """Take a slot; whoever takes one gives it back. Raises UpstreamBusy when there is none in time."""
        if background:
            if self._free and self._background_free and not self._line:
                self._free -= 1
                self._background_free -= 1
                return
            await self._wait(self._background_line, None)
        elif self._free:
            self._free -= 1
        elif len(self._line) >= self._most_waiting:
            raise self._busy()
        else:
            await self._wait(self._line, self._patience_s)

    def give_back(self, *, background: bool = False) -> None:
        """Give a slot back: to the first in line, if there is a line."""
        self._free += 1
        self._background_free += background
        self._hand_on()

    async def _wait(self, line: deque[asyncio.Future[None]], patience_s: float | None) -> None:
        turn = asyncio.get_running_loop().create_future()
        line.append(turn)
        try:
            async with asyncio.timeout(patience_s):
                await turn
        except BaseException as error:
            if turn.done() and not turn.cancelled():
                # Its turn came at the very moment it gave up.
                self.give_back(background=line is self._background_line)
            else:
                with contextlib.suppress(ValueError):
                    line.remove(turn)
            if isinstance(error, TimeoutError):
                raise self._busy() from None
            raise

    def _hand_on(self) -> None:
        while self._free and (turn := _first(self._line)) is not None:
            self._free -= 1
            turn.set_result(None)
        while self._free and self._background_free and (turn := _first(self._background_line)) is not None:
            self._free -= 1
            self._background_free -= 1
            turn.set_result(None)

    def _busy(self) -> UpstreamBusy:
        return UpstreamBusy(
            f"{self._limit} requests are at the teacher and {len(self._line)} wait for it "
            "(teacher.max_concurrency): try again in a moment"
        )


def _first(line: deque[asyncio.Future[None]]) -> asyncio.Future[None] | None:
    """Take the first out of a line who still waits."""
    while line:
        turn = line.popleft()
        if not turn.done():
            return turn
    return None
