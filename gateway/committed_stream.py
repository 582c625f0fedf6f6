"""A student's answer on its way to a client before it is whole."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator

import orjson

from gateway.generation import Generation
from gateway.ledger import Ledger
from gateway.metrics import Metrics
from gateway.turn import Turn
from serving.chat import completion
from serving.errors import UnderstudyError, UpstreamBroken, UpstreamError
from serving.exchange import Json
from serving.teacher import Chunk

log = logging.getLogger("understudy.pipeline")


class CommittedStream:
    """A student's answer that was accepted before it was whole, while the rest of it is made.

    `completion` is the whole of it, once `chunks` has ended.
    """

    def __init__(self, turn: Turn, generation: Generation, ledger: Ledger, metrics: Metrics) -> None:
        self.headers: list[tuple[str, str]] = []
        self._turn = turn
        self._generation = generation
        self._ledger = ledger
        self._metrics = metrics

    async def chunks(self) -> AsyncGenerator[Chunk, None]:
        """Give the chunks, and at the end settle the turn. Raises UpstreamError when the answer breaks off."""
        first = True
        try:
            async for choices in self._generation.pieces():
                yield self._chunk(choices, first=first)
                first = False
        except Exception as error:
            raise self._broke_off(error) from error
        finally:
            self._ledger.student_said(self._turn, self._generation.answer())
        usage = self._turn.student.usage if self._turn.student else None
        if usage is not None:
            data = self._data([], usage=usage)
            yield Chunk(data, orjson.dumps(data), usage_only=True)
        self._ledger.settle(self._turn)

    def completion(self) -> Json:
        """Put the answer together, once it has ended."""
        turn = self._turn
        if turn.student is None or not turn.student.complete:
            raise RuntimeError("the student's answer isn't whole")
        return completion(
            id=f"chatcmpl-{turn.id}",
            created=int(turn.created),
            model=turn.chat.model,
            choices=turn.student.choices,
            usage=turn.student.usage,
        )

    async def aclose(self) -> None:
        """Have the student stop, if it hasn't come to the end."""
        await self._generation.stop()
        if not self._generation.over:
            self._ledger.student_said(self._turn, self._generation.answer())

    def _broke_off(self, error: Exception) -> UpstreamError:
        """Count an answer that didn't come to its end; return what its client is told."""
        turn = self._turn
        self._ledger.student_said(turn, self._generation.answer())
        self._ledger.given_up(turn)
        self._metrics.record_upstream_error("student", "broken")
        if not isinstance(error, UnderstudyError):
            log.error("task %s: the student failed in the middle of its answer", turn.task, exc_info=error)
        turn.failure = str(error)
        return error if isinstance(error, UpstreamError) else UpstreamBroken("the student's answer broke off")

    def _chunk(self, choices: list[Json], *, first: bool) -> Chunk:
        told = []
        for choice in choices:
            delta = choice["delta"]
            if first and "role" not in delta:
                delta = {"role": "assistant", **delta}
            told.append(
                {
                    "index": choice["index"],
                    "delta": delta,
                    "logprobs": None,
                    "finish_reason": choice.get("finish_reason"),
                }
            )
        data = self._data(told, usage=None)
        return Chunk(data, orjson.dumps(data), usage_only=False)

    def _data(self, choices: list[Json], *, usage: Json | None) -> Json:
        turn = self._turn
        data: Json = {
            "id": f"chatcmpl-{turn.id}",
            "object": "chat.completion.chunk",
            "created": int(turn.created),
            # Clients check the model they asked for; who answered stands in the headers.
            "model": turn.chat.model,
            "choices": choices,
        }
        if turn.chat.wants_usage or usage is not None:
            data["usage"] = usage
        return data
