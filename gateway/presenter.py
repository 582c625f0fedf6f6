"""From an answer to the reply: headers, body or frames, and what comes after the client has it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable

import orjson

from gateway.answers import Streamed
from gateway.audits import Audits
from gateway.envelope import enveloped, passed_on, refusal_of
from gateway.ledger import Ledger
from gateway.metrics import Metrics
from gateway.reply import JSON_TYPE, SSE_HEADERS, Headers, Reply
from gateway.turn import Turn
from serving.chat import SSE_DONE, chunks, sse
from serving.errors import UpstreamError
from serving.exchange import Json
from serving.teacher import StreamFailed

Leave = Callable[[], Awaitable[None]]


class Presenter:
    """Makes replies. `leave` is what else is to be done when a reply is over, however it ended."""

    def __init__(self, *, ledger: Ledger, audits: Audits, metrics: Metrics) -> None:
        self._ledger = ledger
        self._audits = audits
        self._metrics = metrics

    def whole(self, turn: Turn, headers: Headers, body: bytes) -> Reply:
        """Reply with a body; the exchange is logged, or about to be."""
        turn.overhead_s = turn.elapsed_s() - turn.waited_s
        self._metrics.record_overhead(turn.overhead_s)
        self._ledger.close_books(turn, 200)

        async def on_end(delivered: bool) -> None:
            self._after(turn, delivered)

        return Reply(200, [JSON_TYPE, *passed_on(headers), *turn.headers()], body, on_end=on_end)

    def streamed(
        self, turn: Turn, headers: Headers, frames: AsyncGenerator[bytes, None], leave: Leave | None = None
    ) -> Reply:
        """Reply with frames, of which the first can be sent at once."""
        first_s = turn.elapsed_s()
        turn.overhead_s = first_s - turn.waited_s
        self._metrics.record_overhead(turn.overhead_s)
        self._metrics.record_first_token(turn.task, turn.route, first_s)

        async def on_end(delivered: bool) -> None:
            if leave is not None:
                await leave()
            self._ledger.close_books(turn, 200 if delivered else 499)
            self._after(turn, delivered)

        return Reply(200, [*SSE_HEADERS, *passed_on(headers), *turn.headers()], frames=frames, on_end=on_end)

    async def frames(self, turn: Turn, stream: Streamed) -> AsyncGenerator[bytes, None]:
        """Pass on an answer while it is made, and log it before its end is sent."""
        try:
            async for chunk in stream.chunks():
                if not chunk.usage_only or turn.chat.wants_usage:
                    yield sse(chunk.raw)
        except UpstreamError as error:
            yield self.broken(turn, error)
            return
        await self._ledger.commit(turn)
        yield SSE_DONE

    async def frames_of(self, turn: Turn, completion: Json) -> AsyncGenerator[bytes, None]:
        """Stream an answer that is there, and log it before its end is sent."""
        yield cut(turn, completion)
        await self._ledger.commit(turn)
        yield SSE_DONE

    def broken(self, turn: Turn, error: Exception) -> bytes:
        """Make the last frame of a stream that broke off.

        It is too late for a status of its own: the error is a frame, and the stream ends without [DONE].
        """
        self._ledger.close_books(turn, 502)
        return sse(enveloped(502, error.body) if isinstance(error, StreamFailed) else refusal_of(error).body)

    def _after(self, turn: Turn, delivered: bool) -> None:
        """Do what comes after the client has its answer, or has gone away.

        An answer that was not delivered is cancelled, and counts for nothing: nobody audits it.
        """
        if not delivered:
            self._ledger.cancelled(turn)
        elif turn.logged and turn.audit() == "pending":
            self._audits.start(turn.exchange(), turn.arrival.caller, turn.arrival.headers)
        elif turn.logged and turn.repeats():
            self._audits.repeat(turn.exchange(), turn.arrival.caller, turn.arrival.headers)


def cut(turn: Turn, completion: Json) -> bytes:
    """Cut an answer into the frames this client asked for, without the last one."""
    return b"".join(sse(chunk) for chunk in chunks(completion, include_usage=turn.chat.wants_usage))


def written(completion: Json) -> bytes:
    """Write an answer as a body."""
    return orjson.dumps(completion)
