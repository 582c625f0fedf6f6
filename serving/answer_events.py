"""The server-sent events of an answer that comes in as a stream, teacher's or student's."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable

from serving.errors import UpstreamError
from serving.sse import EventParser
from serving.upstream import UpstreamResponse

_DONE = b"[DONE]"
_DRAIN_S = 0.1


class AnswerEvents:
    """Gives the events of `response` one by one.

    `done` says that `[DONE]` came, `ended` that the body did; who reads the body otherwise sets it.
    """

    def __init__(self, response: UpstreamResponse) -> None:
        self.done = False
        self.ended = False
        self._response = response
        self._parser = EventParser()
        self._events: deque[bytes] = deque()

    async def next(self, read: Callable[[], Awaitable[bytes | None]]) -> bytes | None:
        """Return the data of the next event, or None at `[DONE]` and at the end of the body.

        `read` gets the next piece of the body, None at its end; raises as it does.
        """
        while not self._events:
            if self.ended:
                return None
            piece = await read()
            if piece is None:
                self.ended = True
                self._events.extend(self._parser.end())
            else:
                self._events.extend(self._parser.feed(piece))
        event = self._events.popleft()
        if event == _DONE:
            self.done = True
            return None
        return event

    async def aclose(self, *, whole: bool) -> None:
        """Give the connection back after a `whole` answer; else close it, by which the upstream learns to stop."""
        try:
            if whole and not self.ended:
                # After [DONE] only the end of the body is due. Reading it keeps the connection; not for
                # long, since the client has its answer.
                async with asyncio.timeout(_DRAIN_S):
                    while await self._response.read_chunk() is not None:
                        pass
        except (TimeoutError, UpstreamError):
            pass
        finally:
            await self._response.aclose()
