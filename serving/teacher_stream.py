"""A teacher's answer while it comes in."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import orjson

from serving.answer_events import AnswerEvents
from serving.assembler import Assembler
from serving.chat import chunks, token_limit, wants_continuous_usage
from serving.errors import UpstreamBroken, UpstreamError, UpstreamTimeout
from serving.exchange import Json, TeacherAnswer
from serving.failed_answer import error_in, failure_of
from serving.logprobs import hide_logprobs, without_logprobs
from serving.mending import Mender, mend_completion
from serving.upstream import MOST_ANSWER_BYTES, Headers, UpstreamResponse
from serving.wire import forwardable_response

_HELD_AT_MOST = 100


class StreamFailed(UpstreamBroken):
    """The teacher reported an error in the middle of its stream; `body` is the event it sent, on one line."""

    def __init__(self, body: bytes) -> None:
        super().__init__("the teacher reported an error in the middle of its stream")
        self.body = body


@dataclass(frozen=True, slots=True)
class Chunk:
    """One `chat.completion.chunk`, mended where strict clients need it (`serving.mending`).

    `raw` is its JSON on one line: as received where nothing was wrong with it, for passing on without
    serialising it again. `usage_only`: it has no choices and is there for the usage, so a client that didn't
    ask for usage must not be shown it. It comes last, and no chunk before it holds usage, unless the request
    asked for `continuous_usage_stats`. Log-probabilities that only the log wants are in neither.
    """

    data: Json
    raw: bytes
    usage_only: bool


class TeacherStream:
    """Gives the chunks of the answer to `request`, then the answer whole. Made by `Teacher.stream`.

    Iterating raises UpstreamBroken when the stream ends without `[DONE]` or a finish reason for every choice,
    StreamFailed when the teacher reports an error, UpstreamTimeout when it falls silent: for `stall_s`
    seconds once the answer has begun; before that, it may be thinking. `failed` is called then. After
    `[DONE]` a choice without a finish reason is given one: its sender called the answer whole. With `hide`
    the chunks lack the log-probabilities that the answer has.
    """

    def __init__(
        self,
        response: UpstreamResponse,
        request: Json,
        *,
        hide: bool,
        stall_s: float,
        finish: Callable[[TeacherStream], TeacherAnswer],
        failed: Callable[[], None],
    ) -> None:
        self.assembler = Assembler()
        self.headers: list[tuple[str, str]] = forwardable_response(response.headers, whole=False)
        self._response = response
        self._request = request
        self._hide = hide
        self._stall_s = stall_s
        self._finish = finish
        self._failed = failed
        self._begun = False
        self._bytes = 0
        self._keeps_usage = wants_continuous_usage(request)
        self._mender = Mender(model=request["model"])
        self._events = AnswerEvents(response)
        self._ready: deque[Chunk] = deque()
        self._usage: Chunk | None = None
        self._complete = False
        self._answer: TeacherAnswer | None = None

    async def begin(self) -> None:
        """Wait until the answer itself begins. Raises UpstreamRefused when an error comes instead of it.

        Chunks that say nothing yet (a role, a filter's verdict on the prompt) are held until then: as long as
        the client has seen nothing, a failure keeps its status and the request can be repeated.
        """
        if self._response.header("content-type").startswith("application/json"):
            await self._take_whole()
            return
        held: list[tuple[bytes, Json]] = []
        begun = False
        try:
            while not begun and len(held) < _HELD_AT_MOST:
                event = await self._events.next(self._read)
                if event is None:
                    raise UpstreamBroken("the teacher's stream ended without an answer")
                data = _read(event)
                self._mender.learn(data)
                held.append((event, data))
                begun = _begins_an_answer(data)
        except StreamFailed as failure:
            raise failure_of(failure.body, self._response.headers) from None
        for event, data in held:
            self._take(event, data)
        self._begun = True

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Chunk:
        while not self._ready:
            if self._complete:
                raise StopAsyncIteration
            try:
                event = await self._events.next(self._read)
                if event is None:
                    self._end()
                else:
                    self._take(event, _read(event))
            except UpstreamError:
                self._failed()
                raise
        return self._ready.popleft()

    def answer(self) -> TeacherAnswer:
        """Return the whole answer, once the iteration has ended. Raises UpstreamBroken before that."""
        if not self._complete or self._ready:
            raise UpstreamBroken(
                "the teacher's stream wasn't read to its end, so that there is no whole answer"
            )
        if self._answer is None:
            self._answer = self._finish(self)
        return self._answer

    def completion(self, *, id: str, created: int) -> Json:
        """Return the completion as a client gets it that asks for it whole, once the iteration has ended.

        `id` and `created` are for a stream that had none.
        """
        whole = self.assembler.completion(id=id, created=created)
        if self._hide:
            whole["choices"] = without_logprobs(whole["choices"])
        return whole

    async def aclose(self) -> None:
        """Give the connection back after a complete stream, close it otherwise."""
        await self._events.aclose(whole=self._complete)

    async def _read(self) -> bytes | None:
        try:
            async with asyncio.timeout(self._stall_s if self._begun else None):
                piece = await self._response.read_chunk()
        except TimeoutError:
            raise UpstreamTimeout(
                f"the teacher's stream fell silent for {self._stall_s:g} s in the middle of its answer"
            ) from None
        self._bytes += len(piece or b"")
        if self._bytes > MOST_ANSWER_BYTES:
            raise UpstreamBroken(f"the teacher's stream is longer than {MOST_ANSWER_BYTES} bytes")
        return piece

    def _take(self, event: bytes, data: Json) -> None:
        """Take in one chunk of the teacher's, and make of it what goes on."""
        mended = self._mender.mend(data)
        self.assembler.add(data)
        if self._hide:
            mended = hide_logprobs(data["choices"]) or mended
        if data.get("usage") is not None:
            if not data["choices"]:
                self._usage = Chunk(data, _written(data) if mended else _on_one_line(event, data), True)
                return
            if not self._keeps_usage:
                data["usage"] = None
                mended = True
        self._ready.append(Chunk(data, _written(data) if mended else _on_one_line(event, data), False))

    def _end(self) -> None:
        """Bring the stream to its end: what is missing of the finish reasons, and the usage."""
        whole = self.assembler
        if not self._events.done and not whole.finished:
            raise UpstreamBroken("the teacher's stream ended in the middle of its answer")
        self._complete = True
        for data in self._mender.unfinished(usage=whole.usage, limit=token_limit(self._request)):
            whole.add(data)
            self._ready.append(Chunk(data, orjson.dumps(data), False))
        if self._usage is not None:
            self._ready.append(self._usage)
        elif whole.usage is not None:
            data = self._mender.chunk([], usage=whole.usage)
            self._ready.append(Chunk(data, _written(data), True))

    async def _take_whole(self) -> None:
        """Cut an answer that came whole, although a stream was asked for, into chunks."""
        raw = await self._response.read()
        completion, _ = completion_of(raw, self._response.headers, self._request)
        for data in chunks(completion, include_usage=True):
            self.assembler.add(data)
        shown, _ = shown_of(completion, raw, hide=self._hide)
        for data in chunks(shown, include_usage=True):
            self._ready.append(Chunk(data, _written(data), usage_only=not data["choices"]))
        self._events.ended = self._complete = True


def completion_of(raw: bytes, headers: Headers, request: Json) -> tuple[Json, bytes]:
    """Read and mend a whole completion; its bytes are the same where nothing was wrong with it.

    Raises UpstreamRefused for an error in disguise, UpstreamBroken for what is no completion.
    """
    try:
        body = orjson.loads(raw)
    except orjson.JSONDecodeError:
        raise UpstreamBroken(f"the teacher's answer isn't JSON ({len(raw)} bytes)") from None
    error = error_in(body) if isinstance(body, dict) else None
    if error is not None:
        raise failure_of(error, headers)
    choices = body.get("choices") if isinstance(body, dict) else None
    if (
        not isinstance(choices, list)
        or not choices
        or not all(isinstance(choice, dict) for choice in choices)
    ):
        raise UpstreamBroken("the teacher's answer isn't a chat completion: it has no choices")
    mended = mend_completion(body, model=request["model"], limit=token_limit(request))
    if not isinstance(body.get("usage"), dict | None):
        body["usage"] = None
        mended = True
    return body, _written(body) if mended else raw


def shown_of(completion: Json, raw: bytes, *, hide: bool) -> tuple[Json, bytes]:
    """Return what the client gets of a completion, and its bytes: with `hide` without log-probabilities."""
    if not hide:
        return completion, raw
    shown = {**completion, "choices": without_logprobs(completion["choices"])}
    return shown, _written(shown)


def _read(event: bytes) -> Json:
    """Read one event. Raises StreamFailed if it reports an error, UpstreamBroken if it is no JSON object."""
    try:
        data = orjson.loads(event)
    except orjson.JSONDecodeError:
        raise UpstreamBroken(
            f"the teacher's stream holds an event that isn't JSON ({len(event)} bytes)"
        ) from None
    if not isinstance(data, dict):
        raise UpstreamBroken("the teacher's stream holds an event that isn't a JSON object")
    # Every form of an error has this word in it; of all chunks only those that do are looked through.
    error = error_in(data) if b"error" in event else None
    if error is not None:
        raise StreamFailed(error)
    return data


def _begins_an_answer(chunk: Json) -> bool:
    """Say whether a chunk holds more than a role: text, a tool call, a finish reason and the like."""
    choices = chunk.get("choices")
    for choice in choices if isinstance(choices, list) else ():
        if not isinstance(choice, dict):
            continue
        delta = choice.get("delta")
        if choice.get("finish_reason") or (
            isinstance(delta, dict) and any(value for key, value in delta.items() if key != "role")
        ):
            return True
    return False


def _on_one_line(event: bytes, data: Json) -> bytes:
    return event if b"\n" not in event else _written(data)


def _written(data: Json) -> bytes:
    try:
        return orjson.dumps(data)
    except TypeError:
        raise UpstreamBroken("the teacher's answer is nested too deeply to be written again") from None
