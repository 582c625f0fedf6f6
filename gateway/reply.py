"""What goes back to the client: a whole body, or frames of a stream."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass, field

from gateway.envelope import Refusal

Headers = list[tuple[str, str]]

JSON_TYPE = ("content-type", "application/json")
SSE_HEADERS = [("content-type", "text/event-stream; charset=utf-8"), ("cache-control", "no-cache")]


@dataclass(slots=True)
class Reply:
    """The answer to one request; exactly one of `body` and `frames` is there.

    Whoever sends it calls `finish(delivered)` when it is over, however it ended: that closes what is behind
    it.
    """

    status: int
    headers: Headers
    body: bytes | None = None
    frames: AsyncGenerator[bytes, None] | None = None
    on_end: Callable[[bool], Awaitable[None]] | None = field(default=None, repr=False)

    async def finish(self, delivered: bool) -> None:
        """Close the frames; let the pipeline do what comes after. `delivered`: the client has the answer."""
        if self.frames is not None:
            await self.frames.aclose()
        if self.on_end is not None:
            await self.on_end(delivered)


def refused(refusal: Refusal, headers: Headers) -> Reply:
    """Make the reply that carries a refusal."""
    return Reply(refusal.status, [JSON_TYPE, *refusal.headers, *headers], refusal.body)
