"""A language model's answer while it comes in: pieces, with what is known of it at its checkpoints."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Self

import orjson

from serving.answer_events import AnswerEvents
from serving.assembler import Assembler
from serving.chat import chunks
from serving.device_time import DeviceTime, Share
from serving.errors import UpstreamError, UpstreamRefused
from serving.estimate import unfinished_usage
from serving.exchange import Json, StudentAnswer
from serving.failed_answer import error_in, failure_of
from serving.lm_plan import LmPlan
from serving.logprobs import alternatives_in, hide_logprobs, without_logprobs
from serving.mending import Mender
from serving.server_record import Seen, ServerRecord
from serving.student import CommitPlan, Piece
from serving.student_chunk import answer_of
from serving.student_server import StudentBroken
from serving.tally import Tally
from serving.teacher_stream import completion_of
from serving.upstream import MOST_ANSWER_BYTES, UpstreamResponse

_MOST_PIECES_A_TOKEN = 4
"""Without log-probabilities the pieces of an answer are counted, and some servers cut their text finer than tokens."""
_FEW = 16
_MOST_TOKEN_BYTES = 8192
"""A token takes so much of a stream at most: its own chunk, with 20 alternatives, their bytes written as numbers."""
_LEAST_BYTES = 1024 * 1024


class LmStream:
    """Gives the pieces of one answer to `request`; `ask` sends it, when the iteration begins. See `StudentStream`.

    `limit` is how many tokens are allowed, `device` measures what the server works, `record` is told what it gives,
    `refused` what it won't have, and says which error that is.
    Iterating raises UpstreamBroken (StudentBroken among them) or UpstreamTimeout.
    """

    def __init__(
        self,
        ask: Callable[[], Awaitable[UpstreamResponse]],
        request: Json,
        tally: Tally,
        *,
        plan: LmPlan,
        limit: int,
        record: ServerRecord,
        refused: Callable[[UpstreamRefused], StudentBroken],
        device: DeviceTime,
    ) -> None:
        self._record = record
        self._refused = refused
        self._alternatives: int | None = None
        self.plan: CommitPlan = plan
        self._device = device
        self._share: Share | None = None
        self._ask = ask
        self._request = request
        self._tally = tally
        self._model = plan.served_as
        self._only = plan.adapter
        self._limit = limit
        self._began = time.perf_counter()
        self._response: UpstreamResponse | None = None
        self._events: AnswerEvents | None = None
        self._bytes = 0
        # What isn't kept counts as well: a server that streams for ever, whatever it is, comes to an end here.
        self._most_bytes = min(MOST_ANSWER_BYTES, _LEAST_BYTES + _MOST_TOKEN_BYTES * max(limit, 0))
        self._mender = Mender(model=plan.served_as)
        self._assembler = Assembler()
        self._ready: deque[Piece] = deque()
        self._complete = False
        self._took_s: float | None = None

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Piece:
        while not self._ready:
            if self._complete:
                raise StopAsyncIteration
            if self._response is None or self._events is None:
                self._share = self._device.begin()
                response = await self._ask()
                self._response, self._events = response, AnswerEvents(response)
                if response.header("content-type").startswith("application/json"):
                    await self._take_whole(response)
                    self._events.ended = True
                    continue
            event = await self._events.next(partial(self._read, self._response))
            if event is None:
                self._end(done=self._events.done)
            else:
                self._take(self._sound(event))
        return self._ready.popleft()

    def answer(self) -> StudentAnswer:
        """The answer as far as it has come."""
        choices = self._assembler.choices
        told = (self._assembler.usage or {}).get("completion_tokens")
        told = told if type(told) is int and told >= 0 else None
        score, signals = self._tally.whole(choices, told)
        usage = unfinished_usage(self._request, self._assembler)
        counted = told if told is not None else self._tally.tokens or usage["completion_tokens"]
        return StudentAnswer(
            model=self._assembler.model or self._model,
            choices=without_logprobs(choices),
            usage={
                "prompt_tokens": usage["prompt_tokens"],
                "completion_tokens": counted,
                "total_tokens": usage["prompt_tokens"] + counted,
            },
            latency_s=time.perf_counter() - self._began if self._took_s is None else self._took_s,
            score=score,
            signals=signals,
            checkpoints=list(self._tally.checkpoints),
            complete=self._complete and not self._ready,
            device_s=self.device_s,
        )

    @property
    def device_s(self) -> float:
        """Its share of the time in which the server was at work for us, so far."""
        return 0.0 if self._share is None else self._share.seconds

    async def aclose(self, *, failed: bool = False) -> None:
        """Give the connection back after a whole answer; else close it, by which the server learns to stop."""
        if self._took_s is None:
            self._took_s = time.perf_counter() - self._began
        self._leave()
        if self._events is not None:
            await self._events.aclose(whole=self._complete)

    async def _read(self, response: UpstreamResponse) -> bytes | None:
        piece = await response.read_chunk()
        self._bytes += len(piece or b"")
        if self._bytes > self._most_bytes:
            raise StudentBroken(
                f"the student's answer is longer than {self._most_bytes} bytes, where max_tokens is {self._limit}"
            )
        return piece

    def _sound(self, event: bytes) -> Json:
        """What an event holds, if that is no error."""
        data = _read(event)
        error = error_in(data) if b"error" in event else None
        if error is None:
            return data
        if self._tally.tokens == 0:
            # vLLM finds out that it can't keep to a schema when the stream has begun.
            raise self._refused(failure_of(error, []))
        raise StudentBroken("the student reported an error in the middle of its stream")

    def _take(self, data: Json) -> None:
        try:
            data["choices"] = answer_of(data.get("choices"))
        except ValueError as error:
            raise StudentBroken(f"the student's stream holds {error}") from None
        if self._only is not None and data.get("model") not in (None, "", self._only):
            # Some servers answer with what they have, whatever model they are asked for.
            said = str(data["model"])[:80]
            raise StudentBroken(
                f"the student's server answered with {said!r}, not with the adapter {self._only}"
            )
        self._mender.mend(data)
        self._assembler.add(data)
        if not data["choices"]:
            return  # a keep-alive, or the usage, which the assembler has
        reached = [mark for choice in data["choices"] for mark in self._tally.take(choice)]
        if self._tally.tokens > _MOST_PIECES_A_TOKEN * max(self._limit, _FEW):
            raise StudentBroken(
                f"the student goes on after {self._tally.tokens} tokens, where max_tokens is {self._limit}"
            )
        if self._alternatives is None:
            self._alternatives = alternatives_in(data["choices"])
        hide_logprobs(data["choices"])
        self._ready.append(Piece(data["choices"], reached))

    def _end(self, *, done: bool) -> None:
        if not done and not self._assembler.finished:
            raise StudentBroken("the student's answer ended in its middle")
        for data in self._mender.unfinished(usage=self._assembler.usage, limit=self._limit):
            self._assembler.add(data)
            self._ready.append(Piece(data["choices"], []))
        if not self._assembler.choices:
            raise StudentBroken("the student's stream ended without an answer")
        self._finish(streamed=True)

    def _finish(self, *, streamed: bool) -> None:
        self._record.seen = Seen(
            logprobs=self._tally.sound if self._tally.tokens else None,
            alternatives=self._alternatives or 0,
            usage=self._assembler.usage is not None,
            model=self._assembler.model,
            streamed=streamed,
        )
        self._complete = True
        self._took_s = time.perf_counter() - self._began
        self._leave()

    def _leave(self) -> None:
        if self._share is not None:
            self._share.end()

    async def _take_whole(self, response: UpstreamResponse) -> None:
        """Cut an answer that came whole, although a stream was asked for, into pieces."""
        raw = await response.read()
        try:
            completion, _ = completion_of(raw, response.headers, self._request)
        except UpstreamError:
            raise StudentBroken(f"the student's answer is no completion ({len(raw)} bytes)") from None
        for data in chunks(completion, include_usage=True):
            self._take(data)
        self._finish(streamed=False)


def _read(event: bytes) -> Json:
    try:
        data = orjson.loads(event)
    except orjson.JSONDecodeError:
        raise StudentBroken(
            f"the student's stream holds an event that isn't JSON ({len(event)} bytes)"
        ) from None
    if not isinstance(data, dict):
        raise StudentBroken("the student's stream holds an event that isn't a JSON object")
    return data
