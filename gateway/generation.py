"""One answer of a student's while it is made, for one request: judged, then sent on, finished unheard, or stopped.

It is judged at its commit point, or at its end if that comes first (STATISTICS.md §6). Until then its client sees
nothing of it. What is decided depends on the tokens alone: neither on how fast they come, nor on how the student's
server cuts them into chunks.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from dataclasses import replace

from gateway import names
from routers.router import Decision, Router
from serving.agreement import Comparison
from serving.beginning import begun
from serving.exchange import Json, StudentAnswer
from serving.student import StudentStream


class Generation:
    """What one request has of a student's answer. Whoever made it calls `stop`, or `go_on` and then `abandon`."""

    def __init__(self, stream: StudentStream) -> None:
        self.over = False
        self.hold_back_s = stream.plan.hold_back_s
        self._stream = stream
        self._pieces = aiter(stream)
        self._held: list[list[Json]] = []
        self._unheard: asyncio.Task[None] | None = None

    @property
    def goes_on(self) -> bool:
        """Whether it is being finished unheard."""
        return self._unheard is not None and not self._unheard.done()

    async def judged(
        self, router: Router, comparison: Comparison, *, commits: bool, may_stop: bool
    ) -> Decision:
        """Read on until it can be judged. Raises whatever the student raises.

        With `commits` that is at the commit point, by what is known of the beginning. The answer isn't known then,
        but one that may yet become an answer that the router's rules hold to more is held to it. With `may_stop` a
        rank below the release's `stop_below` at an earlier checkpoint is judgement enough.
        """
        plan = self._stream.plan
        async for piece in self._pieces:
            self._held.append(piece.choices)
            for checkpoint in piece.checkpoints:
                score, signals = checkpoint["score"], checkpoint["signals"]
                if checkpoint["tokens"] == plan.commit_tokens and commits:
                    said = begun(self._stream.answer().choices, checkpoint["bytes"])
                    return router.judge_begun(router.confidence.rank(score, signals), said)
                if checkpoint["tokens"] < plan.commit_tokens and may_stop and plan.stop_below is not None:
                    rank = router.confidence.rank(score, signals)
                    if rank < plan.stop_below:
                        return replace(router.judge(rank), accepted=False, reason=names.REASON_STOPPED_EARLY)
        self._end()
        answer = self._stream.answer()
        return router.decide(answer.score, answer.signals, comparison.key(answer.choices))

    async def pieces(self) -> AsyncGenerator[list[Json], None]:
        """Give the choices of every piece, those that were held back first. Raises whatever the student raises."""
        for choices in self._held:
            yield choices
        if not self.over:
            async for piece in self._pieces:
                yield piece.choices
            self._end()

    def answer(self) -> StudentAnswer:
        """The answer as far as it has come."""
        return self._stream.answer()

    async def stop(self, *, failed: bool = False) -> None:
        """Have the student stop, if it hasn't come to the end. `failed`: because it took too long."""
        self.abandon()
        await self._stream.aclose(failed=failed)

    def go_on(self, *, patience_s: float) -> asyncio.Task[None]:
        """Let it come to its end though nobody waits for it: it is to be known what it would have said."""

        async def finish() -> None:
            try:
                async with asyncio.timeout(patience_s):
                    async for _ in self._pieces:
                        pass
                self._end()
            finally:
                await self._stream.aclose()

        self._unheard = asyncio.get_running_loop().create_task(finish())
        return self._unheard

    async def finished(self) -> bool:
        """Wait for the end of what goes on; whether the answer is whole."""
        if self._unheard is not None:
            await asyncio.wait([self._unheard])
        return self.over

    def when_ended(self, tell: Callable[[], None]) -> None:
        """Call `tell` when what goes on has come to its end, whole or not."""
        if self._unheard is not None:
            self._unheard.add_done_callback(lambda _: tell())

    def abandon(self) -> None:
        """Stop what goes on: its request counts for nothing any more."""
        if self._unheard is not None:
            self._unheard.cancel()

    def _end(self) -> None:
        self.over = True
