"""A teacher's answer while it comes in."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import orjson

from serving.assembler import Assembler
from serving.chat import chunks
from serving.errors import UpstreamBroken, UpstreamRefused
from serving.exchange import Json, TeacherAnswer
from serving.sse import EventParser
from serving.upstream import Headers, UpstreamResponse
from serving.wire import forwardable_response

_DONE = b"[DONE]"
_DRAIN_S = 0.1


class StreamFailed(UpstreamBroken):
    """The teacher reported an error in the middle of its stream; `body` is the event it sent (JSON)."""

    def __init__(self, body: bytes) -> None:
        super().__init__("the teacher reported an error in the middle of its stream")
        self.body = body


@dataclass(frozen=True, slots=True)
class Chunk:
    """One `chat.completion.chunk`.

    `raw` is its JSON on one line, as received, for passing on without serialising it again. `usage_only`: it
    has no choices and holds nothing but the usage, so a client that didn't ask for usage must not be shown
    it. A chunk with choices may hold usage too (`data["usage"]`).
    """

    data: Json
    raw: bytes
    usage_only: bool


class TeacherStream:
    """Gives the chunks of one answer, then the answer whole. Made by `Teacher.stream`.

    Iterating raises UpstreamBroken when the stream ends without `[DONE]` or a finish reason for every choice,
    StreamFailed when the teacher reports an error, UpstreamTimeout when it falls silent.
    """

    def __init__(
        self, response: UpstreamResponse, *, finish: Callable[[TeacherStream], TeacherAnswer]
    ) -> None:
        self.assembler = Assembler()
        self.headers: list[tuple[str, str]] = forwardable_response(response.headers, whole=False)
        self._response = response
        self._finish = finish
        self._parser = EventParser()
        self._events: deque[bytes] = deque()
        self._ready: deque[Chunk] = deque()
        self._ended = False
        self._complete = False
        self._answer: TeacherAnswer | None = None

    async def begin(self) -> None:
        """Wait for the first chunk. Raises UpstreamRefused when an error comes instead of it."""
        kind = _header(self._response.headers, "content-type")
        if kind.startswith("application/json"):
            await self._take_whole()
            return
        try:
            first = await self._next()
        except StreamFailed as failure:
            raise failure_of(failure.body, self._response.headers) from None
        if first is None:
            raise UpstreamBroken("the teacher's stream ended without an answer")
        self._ready.append(first)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Chunk:
        chunk = self._ready.popleft() if self._ready else await self._next()
        if chunk is None:
            raise StopAsyncIteration
        return chunk

    def answer(self) -> TeacherAnswer:
        """Return the whole answer, once the iteration has ended. Raises UpstreamBroken before that."""
        if not self._complete or self._ready:
            raise UpstreamBroken(
                "the teacher's stream wasn't read to its end, so that there is no whole answer"
            )
        if self._answer is None:
            self._answer = self._finish(self)
        return self._answer

    async def aclose(self) -> None:
        """Give the connection back after a complete stream, close it otherwise."""
        try:
            if self._complete and not self._ended:
                # After [DONE] only the end of the body is due. Reading it keeps the connection; not for
                # long, since the client has its answer.
                async with asyncio.timeout(_DRAIN_S):
                    while await self._response.read_chunk() is not None:
                        pass
        except (TimeoutError, UpstreamBroken):
            pass
        finally:
            await self._response.aclose()

    async def _next(self) -> Chunk | None:
        """Return the next chunk, or None at the good end of the stream."""
        while not self._complete:
            while self._events:
                event = self._events.popleft()
                if event == _DONE:
                    self._complete = True
                    return None
                return self._chunk(event)
            if self._ended:
                if not self.assembler.finished:
                    where = "in the middle of its answer" if self.assembler.choices else "without an answer"
                    raise UpstreamBroken(f"the teacher's stream ended {where}")
                self._complete = True
                return None
            piece = await self._response.read_chunk()
            if piece is None:
                self._ended = True
                self._events.extend(self._parser.end())
            else:
                self._events.extend(self._parser.feed(piece))
        return None

    def _chunk(self, event: bytes) -> Chunk:
        try:
            data = orjson.loads(event)
        except orjson.JSONDecodeError:
            raise UpstreamBroken(
                f"the teacher's stream holds an event that isn't JSON ({len(event)} bytes)"
            ) from None
        if not isinstance(data, dict):
            raise UpstreamBroken("the teacher's stream holds an event that isn't a JSON object")
        if data.get("error") and not data.get("choices"):
            raise StreamFailed(event)
        self.assembler.add(data)
        raw = event if b"\n" not in event else orjson.dumps(data)
        return Chunk(data, raw, usage_only=not data.get("choices") and data.get("usage") is not None)

    async def _take_whole(self) -> None:
        """Cut an answer that came whole, although a stream was asked for, into chunks."""
        raw = await self._response.read()
        completion = completion_of(raw, self._response.headers)
        for data in chunks(completion, include_usage=True):
            self.assembler.add(data)
            self._ready.append(Chunk(data, orjson.dumps(data), usage_only=not data["choices"]))
        self._ended = self._complete = True


def completion_of(raw: bytes, headers: Headers) -> Json:
    """Read a whole completion. Raises UpstreamRefused for an error in disguise, else UpstreamBroken."""
    try:
        body = orjson.loads(raw)
    except orjson.JSONDecodeError:
        raise UpstreamBroken(f"the teacher's answer isn't JSON ({len(raw)} bytes)") from None
    if isinstance(body, dict) and body.get("error") and not body.get("choices"):
        raise failure_of(raw, headers)
    choices = body.get("choices") if isinstance(body, dict) else None
    if (
        not isinstance(choices, list)
        or not choices
        or not all(isinstance(choice, dict) for choice in choices)
    ):
        raise UpstreamBroken("the teacher's answer isn't a chat completion: it has no choices")
    if not isinstance(body.get("usage"), dict | None):
        body["usage"] = None
    return dict(body)


def failure_of(body: bytes, headers: Headers) -> UpstreamRefused:
    """Turn an error that came with status 200 into the refusal it is, with its own status, or else 502."""
    error = orjson.loads(body)["error"]
    status = 502
    for name in ("status", "status_code", "code"):
        value = error.get(name) if isinstance(error, dict) else None
        if isinstance(value, int) and 400 <= value <= 599:
            status = value
            break
    kept = dict(forwardable_response(headers, whole=False))
    return UpstreamRefused(status, {**kept, "content-type": "application/json"}, body)


def _header(headers: Headers, name: str) -> str:
    return next((value for key, value in headers if key == name), "")
