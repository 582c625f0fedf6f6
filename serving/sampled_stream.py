"""An answer whose server gives no log-probabilities: how sure it is shows in how many drawn at random say the same.

Self-consistency (Wang et al., arXiv 2203.11171): the same request is asked a few more times at temperature 1, beside
the answer itself. Nothing is known of it before its end, so that it has no checkpoints and is judged whole.
"""

from __future__ import annotations

import asyncio
import dataclasses
import math
from collections.abc import AsyncIterator, Callable, Sequence

from serving.agreement import JsonComparison
from serving.exchange import Json, StudentAnswer
from serving.lm_stream import LmStream
from serving.student import CommitPlan, Piece
from serving.tally import Meter

Choices = list[Json]


class SampledStream:
    """The pieces of `answer`, while the streams that `draw` makes are read beside it. See `StudentStream`.

    The score is the log-odds of agreement with one drawn at random, estimated from k of them of which m agree:
    ln((m + ½)/(k − m + ½)). They agree as JSON values do, or else as texts, whatever the task compares by: so that
    what is known of an answer doesn't change with the task's settings. Raises as `LmStream` does, whichever fails.
    """

    def __init__(
        self,
        answer: LmStream,
        draw: Callable[[], Sequence[LmStream]],
        meter: Meter,
    ) -> None:
        self.plan: CommitPlan = answer.plan
        self._answer = answer
        self._draw = draw
        self._meter = meter
        self._comparison = JsonComparison()
        self._pieces = self._both()
        self._drawn: list[Choices] | None = None
        self._streams = [answer]
        self._drawing: asyncio.Task[list[Choices]] | None = None

    def __aiter__(self) -> AsyncIterator[Piece]:
        return self._pieces

    def answer(self) -> StudentAnswer:
        """The answer as far as it has come."""
        answer = self._answer.answer()
        score, signals = -math.inf, {}
        if self._drawn is not None:
            agreeing = sum(self._comparison.agree(answer.choices, drawn) for drawn in self._drawn)
            score = math.log((agreeing + 0.5) / (len(self._drawn) - agreeing + 0.5))
            signals = self._meter.sampled(
                answer.choices, [self._comparison.key(drawn) for drawn in self._drawn]
            )
        return dataclasses.replace(
            answer,
            device_s=sum(stream.device_s for stream in self._streams),
            billed=_together([stream.answer().usage for stream in self._streams]),
            score=score,
            signals=signals,
            checkpoints=[],
            complete=answer.complete and self._drawn is not None,
        )

    async def aclose(self, *, failed: bool = False) -> None:
        """Stop all of them."""
        if self._drawing is not None:
            self._drawing.cancel()
            await asyncio.gather(self._drawing, return_exceptions=True)
        await self._answer.aclose(failed=failed)

    async def _both(self) -> AsyncIterator[Piece]:
        drawn = self._draw()
        self._streams += drawn
        self._drawing = asyncio.get_running_loop().create_task(_all_of(drawn))
        async for piece in self._answer:
            yield Piece(piece.choices, [])
        self._drawn = await self._drawing


def _together(usages: Sequence[Json | None]) -> Json:
    """What several answers used in all."""
    names = ("prompt_tokens", "completion_tokens", "total_tokens")
    return {name: sum((usage or {}).get(name, 0) for usage in usages) for name in names}


async def _all_of(streams: Sequence[LmStream]) -> list[Choices]:
    """Read all of them to their ends at the same time; the first that fails stops the others."""

    async def read(stream: LmStream) -> Choices:
        try:
            async for _ in stream:
                pass
        finally:
            await stream.aclose()
        return stream.answer().choices

    try:
        async with asyncio.TaskGroup() as group:
            reading = [group.create_task(read(stream)) for stream in streams]
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from None
    return [task.result() for task in reading]
