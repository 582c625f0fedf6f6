"""How a student is asked, and whether its answer is served: the student's part of a turn."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from functools import partial

from gateway import names
from gateway.committed_stream import CommittedStream
from gateway.generation import Generation
from gateway.ledger import Ledger
from gateway.live import LiveRelease
from gateway.metrics import Metrics
from gateway.turn import Turn
from routers.foresight import last_text
from routers.router import Decision
from serving.closed_answers import TextTooLong
from serving.errors import RequestError, UpstreamError
from serving.guarded_student import StudentUnavailable
from serving.student import StudentStream
from serving.student_server import StudentRefused
from serving.text_thread import StudentBusy

log = logging.getLogger("understudy.pipeline")

STUDENT = "student"
_GRACE_S = 5.0
_TOLD_EVERY_S = 5.0


class StudentTurn:
    """Asks students. What is decided on the way is noted on the turn."""

    def __init__(self, *, ledger: Ledger, metrics: Metrics) -> None:
        self._ledger = ledger
        self._metrics = metrics
        self._unheard: set[asyncio.Task[None]] = set()
        self._told_at: dict[
            tuple[str, type[Exception]], float
        ] = {}  # tasks and kinds of failures: both are few

    async def ask(
        self, turn: Turn, release: LiveRelease, *, foreseen: Callable[[Turn], None] | None = None
    ) -> str | None:
        """Let the student answer. Return the reason to ask the teacher instead; None: serve the answer.

        The answer is `turn.student`, or `turn.generation` as long as it isn't whole. `foreseen` is called before
        the student is asked if an escalation is likely; if it is as good as sure, the student isn't asked at all. None:
        it is asked, whatever is foreseen. Raises RequestError when the client forced a student that can't answer.
        """
        forced = turn.arrival.route == STUDENT
        began = time.perf_counter()
        try:
            seen = self._ledger.seen(turn.chat.body)
            feature = release.student.unsupported(seen)
            if feature is not None:
                return _unsupported(turn, feature)
            if foreseen is not None and not forced and release.foresight is not None:
                text = last_text(seen)
                if release.foresight.skips(text):
                    # It counts like any escalation: what the student would have said is worked out when something is
                    # learned from it.
                    self._metrics.record_spared(turn.task, release.foresight.student_s)
                    return names.REASON_SKIPPED
                if release.foresight.hedges(text):
                    foreseen(turn)
            stream = release.student.stream(seen)
            if stream is None:
                answer = await release.student.answer(seen, failed=partial(self._ledger.student_failed, turn))
                key = release.comparison.key(answer.choices)
                decision = release.router.decide(answer.score, answer.signals, key)
                self._ledger.student_said(turn, answer)
            else:
                decision = await self._judged(turn, release, stream)
        except RequestError:
            raise
        except StudentRefused:
            return _unsupported(turn, "refused")
        except TextTooLong:
            return _unsupported(turn, "length")
        except StudentBusy:
            turn.spoiled = True  # load decided, not the router (STATISTICS.md §1)
            return names.REASON_STUDENT_BUSY
        except Exception as error:
            return self._failed(turn, release, error)
        finally:
            turn.waited_s += time.perf_counter() - began
        turn.decision = decision
        if forced:
            turn.reason = names.REASON_FORCED
            return None
        turn.reason = decision.reason
        return None if decision.accepted else decision.reason

    def stream(self, turn: Turn) -> CommittedStream:
        """Send on what was accepted before it was whole."""
        if turn.generation is None:
            raise RuntimeError("no student is at it")
        turn.route = "student"
        return CommittedStream(turn, turn.generation, self._ledger, self._metrics)

    async def whole(self, turn: Turn) -> bool:
        """Say whether the student's answer is there, and wait for one that is being finished."""
        if turn.generation is not None:
            began = time.perf_counter()
            await turn.generation.finished()
            turn.waited_s += time.perf_counter() - began
            self._ledger.student_said(turn, turn.generation.answer())
        return turn.student is not None and turn.student.complete

    def take_stock(self, turn: Turn) -> None:
        """Note what the student has said when the teacher has answered; the rest comes as an event of its own."""
        generation = turn.generation
        if generation is None:
            return
        self._ledger.student_said(turn, generation.answer())
        generation.when_ended(lambda: self._ledger.completed(turn, generation.answer()))

    async def aclose(self) -> None:
        """Give what is being finished unheard a few seconds."""
        if self._unheard:
            _, unfinished = await asyncio.wait(self._unheard, timeout=_GRACE_S)
            for task in unfinished:
                task.cancel()
            if unfinished:
                await asyncio.wait(unfinished)

    async def _judged(self, turn: Turn, release: LiveRelease, stream: StudentStream) -> Decision:
        """Decide about an answer while it is made. Whatever is left to be made of it is `turn.generation` then.

        Raises TimeoutError when the time is over that a client may be kept waiting, and whatever the student raises.
        """
        generation = Generation(stream)
        forced = turn.arrival.route == STUDENT
        # What was cut off here is counted neither for nor against the release: how busy a machine is must not decide
        # what counts.
        limit_s = generation.hold_back_s if turn.chat.stream else release.student.patience_s
        goes_on = slow = False
        try:
            async with asyncio.timeout(limit_s):
                decision = await generation.judged(
                    release.router,
                    release.comparison,
                    commits=turn.chat.stream,
                    may_stop=not forced,
                )
            goes_on = not generation.over and (forced or decision.accepted or _is_needed(turn))
        except TimeoutError:
            slow = True
            raise
        finally:
            if not goes_on:
                await generation.stop(failed=slow)
            self._ledger.student_said(turn, generation.answer())
        if goes_on:
            turn.generation = generation
            if not (forced or decision.accepted):
                task = generation.go_on(patience_s=release.student.patience_s)
                self._unheard.add(task)
                task.add_done_callback(self._over)
        return decision

    def _over(self, task: asyncio.Task[None]) -> None:
        self._unheard.discard(task)
        if not task.cancelled() and task.exception() is not None:
            self._metrics.record_upstream_error(STUDENT, "broken")

    def _failed(self, turn: Turn, release: LiveRelease, error: Exception) -> str:
        """Note that it isn't the router's doing, so nothing the promise may count (STATISTICS.md §1)."""
        turn.spoiled = True
        if isinstance(error, TimeoutError):
            self._metrics.record_upstream_error(STUDENT, "timeout")
            return names.REASON_STUDENT_SLOW
        expected = isinstance(error, StudentUnavailable | UpstreamError)
        self._metrics.record_upstream_error(STUDENT, "unavailable" if expected else "broken")
        if self._is_news(turn.task, error):
            if expected:
                log.warning("task %s: the student of release %s: %s", turn.task, release.name, error)
            else:
                log.error(
                    "task %s: the student of release %s failed", turn.task, release.name, exc_info=error
                )
        return names.REASON_STUDENT_ERROR

    def _is_news(self, task: str, error: Exception) -> bool:
        """Say whether a failure is to be told of: a student that is away fails every request of its task."""
        now = time.monotonic()
        told_at = self._told_at.get((task, type(error)))
        if told_at is not None and now - told_at < _TOLD_EVERY_S:
            return False
        self._told_at[task, type(error)] = now
        return True


def _unsupported(turn: Turn, feature: str) -> str:
    """Return the reason why the teacher answers. Raises RequestError for a client that wants the student.

    It counts: the teacher answers for certain, and a student that sees more may be learned from it.
    """
    if turn.arrival.route == STUDENT:
        raise RequestError(
            f"{names.ROUTE_HEADER}: student was asked for, but the student of task {turn.task} "
            f"doesn't support this request ({feature})",
            param=names.ROUTE_HEADER,
            code="unsupported",
        )
    return f"{names.REASON_UNSUPPORTED}:{feature}"


def _is_needed(turn: Turn) -> bool:
    """Say whether the student's whole answer is wanted though the teacher's is served.

    An audit is never cut short (STATISTICS.md §2); and it may have to step in for a teacher that fails.
    """
    return (turn.coin and turn.counts) or turn.policy.on_teacher_failure == "student"
