"""What a request leaves behind: its events in the log, and what it cost in the metrics."""

from __future__ import annotations

import asyncio
import functools
import logging
import math
import time
from collections.abc import Callable

from gateway.metrics import Metrics
from gateway.turn import Turn
from serving import events
from serving.estimate import unfinished_usage
from serving.exchange import Json, StudentAnswer, TeacherAnswer
from serving.log import EventLog
from serving.pricing import PriceList
from serving.redaction import Redactor
from serving.student_price import StudentPrices

log = logging.getLogger("understudy.log")

_COMPLAIN_EVERY_S = 60.0
_UNPRICED_TOLD = 20
"""Models without a price that are warned of: a client may make up names."""


class Ledger:
    """Makes exchanges durable and counts their cost. A log that fails never fails a request.

    An answer waits for its exchange at most `max_wait_s`: then it goes out, and the exchange is late.
    """

    def __init__(
        self,
        event_log: EventLog,
        metrics: Metrics,
        prices: PriceList,
        *,
        student_prices: StudentPrices,
        teacher_model: str | None,
        max_wait_s: float,
        redactor: Redactor | None = None,
    ) -> None:
        self._log = event_log
        self._metrics = metrics
        self._prices = prices
        self._student_prices = student_prices
        self._teacher_model = teacher_model
        self._max_wait_s = max_wait_s
        self._redactor = redactor
        self._unpriced: set[str] = set()
        self._complained_at = -_COMPLAIN_EVERY_S

    def student_said(self, turn: Turn, answer: StudentAnswer) -> None:
        """Note what has come of the student's answer so far, and what it cost. May be told again as it grows."""
        usd = self._student_took(turn, answer)
        if answer.choices:
            turn.student = answer.priced(usd)

    def student_failed(self, turn: Turn, seconds: float) -> None:
        """Note for how long what the student runs on was at an answer that came to nothing: it costs all the same."""
        nothing = StudentAnswer(
            "", choices=[], usage=None, latency_s=seconds, score=-math.inf, complete=False, device_s=seconds
        )
        self._student_took(turn, nothing)

    def _student_took(self, turn: Turn, answer: StudentAnswer) -> float:
        """Count what the student has done for the request since this was last asked; what it cost so far in all."""
        if turn.release is None:
            raise RuntimeError("no student was asked")
        usage = answer.usage if answer.choices else None
        self._metrics.record_student(
            turn.task,
            answers=bool(answer.choices) and turn.student is None,
            seconds=answer.took_s - turn.device_s,
            usage=usage,
            counted=turn.student.usage if turn.student is not None else None,
        )
        turn.device_s = answer.took_s
        turn.student_usd = self._student_prices.usd(answer, turn.release.kind, turn.policy.student)
        return turn.student_usd

    def settle(self, turn: Turn) -> None:
        """Work out and count what the request cost, once its answer is whole, whether or not it arrives.

        That is the answer given and, if it was rejected, the student's as well.
        """
        turn.asking = False
        student = turn.student_usd
        if turn.route == "cache":
            turn.cost_usd = 0.0
        elif turn.route == "student":
            turn.cost_usd = student
        elif turn.teacher is not None and turn.teacher.cost_usd is not None:
            turn.cost_usd = turn.teacher.cost_usd + (student or 0.0)
        elif turn.teacher is not None and turn.teacher.usage is not None:
            self._note_unpriced(turn.teacher.model)
        self._metrics.record_tokens(turn.task, turn.route, turn.given.usage if turn.given else None)
        self._metrics.record_spending(turn.task, turn.route, turn.cost_usd, self._avoided(turn))
        if turn.hedge_usd:  # counted when it was dropped
            turn.cost_usd = (turn.cost_usd or 0.0) + turn.hedge_usd

    def _note_unpriced(self, model: str) -> None:
        """Warn, once for a model, that what it costs is missing."""
        if model in self._unpriced or len(self._unpriced) >= _UNPRICED_TOLD:
            return
        self._unpriced.add(model)
        log.warning(
            "no price is known for model %r: costs and savings are without it; set teacher.price", model[:80]
        )

    def broken_off(self, turn: Turn) -> float | None:
        """Count what an answer cost that didn't come to its end, and return it; None where nothing is owed.

        The teacher bills what it did until then. How much that was can only be estimated.
        """
        if not turn.asking:
            return None
        turn.asking = False
        usage = unfinished_usage(turn.chat.body, turn.received)
        usd, _ = self._prices.cost(self._teacher_model or turn.chat.model, usage)
        self._metrics.record_tokens(turn.task, turn.route, usage)
        self._metrics.record_spending(turn.task, turn.route, usd, None)
        return usd

    def hedge_dropped(self, turn: Turn, answer: TeacherAnswer | None) -> None:
        """Count what a teacher's answer cost that was asked for in vain; None: it isn't whole."""
        if answer is None:
            turn.hedge_usd = self.broken_off(turn) or 0.0
            return
        turn.asking = False
        turn.hedge_usd = answer.cost_usd or 0.0
        self._metrics.record_tokens(turn.task, turn.route, answer.usage)
        self._metrics.record_spending(turn.task, turn.route, answer.cost_usd, None)

    def given_up(self, turn: Turn) -> float | None:
        """Count what a request cost that gets no answer, once, and return it; what the student does for it ends."""
        if turn.generation is not None:
            turn.generation.abandon()
        if turn.cost_usd is not None:
            return self.broken_off(turn)
        if turn.generation is not None:
            self.student_said(turn, turn.generation.answer())
        if turn.student_usd:
            self._metrics.record_spending(turn.task, turn.route, turn.student_usd, None)
            turn.cost_usd = turn.student_usd
        teacher = self.broken_off(turn)
        return teacher if turn.cost_usd is None else turn.cost_usd + (teacher or 0.0)

    def completed(self, turn: Turn, answer: StudentAnswer) -> None:
        """Note what a student has come to whose answer wasn't waited for; one that broke off only costs."""
        known = turn.student_usd or 0.0
        student = answer.priced(self._student_took(turn, answer))
        usd = (student.cost_usd or 0.0) - known
        self._metrics.record_late_cost(turn.task, turn.route, usd)
        told = turn.storable and answer.complete
        if told and turn.release is not None and turn.teacher is not None:
            agreement = turn.release.comparison.agree(student.choices, turn.teacher.choices)
            self.later(
                turn.task,
                events.completed(turn.id, student=student, agreement=agreement, usd=usd, at=time.time()),
            )

    async def commit(self, turn: Turn) -> None:
        """Return when the exchange is durable, or counted as lost or late. One that isn't storable leaves nothing.

        A late one is still being written; it is counted as logged or lost once that has come to an end. The client may
        go away meanwhile: what was answered is logged all the same.
        """
        if not turn.storable:
            return
        loop = asyncio.get_running_loop()
        written = loop.create_future()
        self._write(turn, functools.partial(_resolve, written, True))
        if written.done():
            return
        patience = loop.call_later(self._max_wait_s, _resolve, written, False)
        try:
            in_time = await written
        finally:
            patience.cancel()
        if not in_time:
            self._metrics.record_late(turn.task)
            self._complain(
                "task %s: an answer went out after %.1f s before its exchange was on disk: the disk is too slow",
                turn.task,
                self._max_wait_s,
            )

    def note(self, turn: Turn) -> None:
        """Log the exchange without waiting: the answer it replays is on disk already."""
        if turn.storable:
            self._write(turn)

    def _write(self, turn: Turn, ended: Callable[[], None] | None = None) -> None:
        """Log the exchange; `ended` is called when it is on disk, or lost."""
        if turn.supersedes is not None:
            self.later(turn.task, events.superseded(turn.supersedes, by=turn.id, at=time.time()))
        turn.logged = True

        def over(written: bool) -> None:
            turn.logged = written
            turn.lost = not written
            if written:
                self._metrics.record_logged(turn.task)
            if ended is not None:
                ended()

        self._append(turn.task, events.answered(turn.exchange()), over)

    def cancelled(self, turn: Turn) -> None:
        """Note that the client went away. The answer counts for nothing unless all of it had come."""
        turn.left = True
        if turn.shared:
            return  # others wait for the answer: when it is there, this is called again
        usd = self.given_up(turn)
        if turn.storable:
            event = events.cancelled(turn.id, teacher=turn.teacher, at=time.time(), estimated_usd=usd)
            self.later(turn.task, event)

    def later(self, task: str, event: Json) -> None:
        """Append an event without waiting for it; `aclose` does."""
        self._append(task, event)

    def seen(self, request: Json) -> Json:
        """Return a request as the log will hold it, which is what a student was trained on."""
        if self._redactor is None:
            return request
        redacted: Json = self._redactor.value(request)
        return redacted

    def _append(self, task: str, event: Json, over: Callable[[bool], None] | None = None) -> None:
        """Append an event; what the log can't take is counted, and complained about once a minute.

        `over` is called when it is on disk (True) or lost. Everything that reaches the disk comes through here, and is
        redacted here.
        """

        def ended(error: Exception | None) -> None:
            if error is not None:
                self._metrics.record_lost(task)
                self._complain("task %s: an exchange is lost, the log can't take it: %s", task, error)
            if over is not None:
                over(error is None)

        try:
            self._log.add(task, event if self._redactor is None else self._redactor.event(event), ended)
        except (OSError, ValueError) as error:
            ended(error)

    def _complain(self, message: str, *details: object) -> None:
        """Log an error, but not one a request."""
        now = time.monotonic()
        if now - self._complained_at >= _COMPLAIN_EVERY_S:
            self._complained_at = now
            log.error(message, *details)

    def close_books(self, turn: Turn, status: int) -> None:
        """Count a request that is over, once."""
        if turn.status is not None:
            return
        turn.status = status
        self._metrics.record_request(turn.task, turn.route, turn.reason, status, turn.elapsed_s())
        if turn.decision is not None:
            self._metrics.record_confidence(turn.task, turn.decision.confidence)
            if turn.release is not None and turn.counts:
                drift = turn.release.note_confidence(turn.decision.confidence)
                if drift is not None:
                    self._metrics.record_drift(turn.task, drift)

    def would_have_cost(self, turn: Turn) -> float | None:
        """Return what the teacher would have cost for the answer given, in USD."""
        if turn.teacher is not None:
            return turn.teacher.cost_usd
        if turn.student is None:
            return None
        usd, _ = self._prices.cost(self._teacher_model or turn.chat.model, turn.student.usage)
        return usd

    async def aclose(self) -> None:
        """Wait for what is still being written."""
        await self._log.settled()

    def _avoided(self, turn: Turn) -> float | None:
        if turn.route == "teacher":
            return None
        usd = self.would_have_cost(turn)
        return None if usd is None else usd - (turn.cost_usd or 0.0)


def _resolve(waiter: asyncio.Future[bool], outcome: bool) -> None:
    if not waiter.done():
        waiter.set_result(outcome)
