"""How an answer is made: by the student if the router trusts it, else by the teacher."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncGenerator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field

from gateway import names
from gateway.auth import Gate
from gateway.committed_stream import CommittedStream
from gateway.hedge import Hedge, Opened
from gateway.ledger import Ledger
from gateway.metrics import Metrics
from gateway.student_turn import STUDENT, StudentTurn
from gateway.tasks import Tasks
from gateway.turn import Turn
from serving.chat import completion
from serving.errors import RequestError, UpstreamError, UpstreamRefused
from serving.exchange import Json
from serving.slots import UpstreamBusy
from serving.teacher import Chunk, Teacher, TeacherReply, TeacherStream

log = logging.getLogger("understudy.pipeline")

TEACHER = "teacher"
_UNAVAILABLE = frozenset({408, 409, 429})


@dataclass(slots=True)
class Whole:
    """An answer that is there: the completion and, from the teacher, its bytes and headers."""

    completion: Json
    raw: bytes | None = None
    headers: list[tuple[str, str]] = field(default_factory=list)


class Stream:
    """A teacher's answer while it comes in. `completion` is the whole of it, once `chunks` has ended."""

    def __init__(
        self,
        answers: Answers,
        turn: Turn,
        opened: AbstractAsyncContextManager[TeacherStream],
        stream: TeacherStream,
    ) -> None:
        self.headers = stream.headers
        self._answers = answers
        self._turn = turn
        self._opened = opened
        self._stream = stream

    async def chunks(self) -> AsyncGenerator[Chunk, None]:
        """Give the chunks, and at the end settle the turn. Raises UpstreamError when the answer breaks off."""
        try:
            async for chunk in self._stream:
                yield chunk
            self._turn.teacher = self._stream.answer()
        except UpstreamError as error:
            self._answers.note_failure(self._turn, error)
            self._answers.ledger.given_up(self._turn)
            raise
        self._answers.settle(self._turn)

    def completion(self) -> Json:
        """Put the answer together, once it has ended."""
        return self._stream.completion(id=f"chatcmpl-{self._turn.id}", created=int(self._turn.created))

    async def aclose(self) -> None:
        """Give the connection back, or close it if the answer hasn't come to its end."""
        await self._opened.__aexit__(None, None, None)


Streamed = Stream | CommittedStream
"""An answer that is sent on while it is made."""


class Answers:
    """Makes answers. What is decided on the way is noted on the turn."""

    def __init__(
        self, *, teacher: Teacher, tasks: Tasks, gate: Gate, ledger: Ledger, metrics: Metrics
    ) -> None:
        self.ledger = ledger
        self._students = StudentTurn(ledger=ledger, metrics=metrics)
        self._teacher = teacher
        self._tasks = tasks
        self._gate = gate
        self._metrics = metrics

    async def make(self, turn: Turn) -> Whole | Streamed:
        """Answer a request. A whole answer is settled; it isn't logged yet.

        Raises UpstreamError when the teacher fails and the student may not step in, RequestError when the
        client forced a student that can't answer.
        """
        try:
            escalated = await self._ask_student(turn)
        except BaseException:
            await self._drop_hedge(turn)  # the client has left
            raise
        if escalated is None:
            await self._drop_hedge(turn)
            return self._by_student(turn) if turn.generation is None else self._students.stream(turn)
        turn.reason = escalated
        try:
            return await self._by_teacher(turn)
        except UpstreamError as error:
            self.note_failure(turn, error)
            steps_in = _student_may_step_in(turn, error)
            if steps_in and escalated == names.REASON_SKIPPED and turn.release is not None:
                escalated = await self._students.ask(turn, turn.release)
            if not (steps_in and (escalated is None or await self._students.whole(turn))):
                self.ledger.given_up(turn)
                raise
            # After a deadline the teacher may have worked all the time.
            self.ledger.broken_off(turn)
            turn.reason = names.REASON_TEACHER_UNAVAILABLE
            turn.spoiled = True
            going_on = escalated is None and turn.generation is not None
            return self._students.stream(turn) if going_on else self._by_student(turn)

    def note_failure(self, turn: Turn, error: UpstreamError) -> None:
        """Count a failure of the teacher's."""
        turn.failure = str(error)
        if isinstance(error, UpstreamBusy):
            return  # our own doing
        self._metrics.record_upstream_error(TEACHER, error.kind)
        if isinstance(error, UpstreamRefused) and error.status in (401, 403):
            self._gate.teacher_refused(turn.arrival.caller)

    async def _ask_student(self, turn: Turn) -> str | None:
        """Let the student answer. Return the reason to ask the teacher instead; None: serve the answer."""
        forced = turn.arrival.route
        release = turn.release
        if forced == TEACHER:
            return names.REASON_FORCED
        if release is None:
            if forced == STUDENT:
                raise RequestError(
                    f"{names.ROUTE_HEADER}: student was asked for, but task {turn.task} has no live release",
                    param=names.ROUTE_HEADER,
                    code="no_live_release",
                )
            return names.REASON_NO_RELEASE
        if not self._gate.verified(turn.arrival.caller):
            # Not the router's doing, so nothing the promise may count (STATISTICS.md §1).
            turn.spoiled = True
            return names.REASON_UNVERIFIED_KEY
        return await self._students.ask(turn, release, foreseen=self._start_hedge)

    def settle(self, turn: Turn) -> None:
        """Close the account of a turn that the teacher has answered."""
        self._students.take_stock(turn)
        self.ledger.settle(turn)

    async def aclose(self) -> None:
        """Let students come to an end that are at work for the log alone."""
        await self._students.aclose()

    def _by_student(self, turn: Turn) -> Whole:
        answer = turn.student
        if answer is None:
            raise RuntimeError("no student has answered")
        turn.route = "student"
        self.ledger.settle(turn)
        return Whole(
            completion(
                id=f"chatcmpl-{turn.id}",
                created=int(turn.created),
                # Clients check the model they asked for; who answered stands in the headers.
                model=turn.chat.model,
                choices=answer.choices,
                usage=answer.usage,
            )
        )

    async def _by_teacher(self, turn: Turn) -> Whole | Stream:
        """Wait for the teacher's answer, or for a stream to begin; a hedge has asked for it already."""
        began = time.perf_counter()
        try:
            came = await (self._ask_teacher(turn) if turn.hedge is None else turn.hedge.taken())
        finally:
            turn.waited_s += time.perf_counter() - began
        if turn.hedge is not None:
            self._metrics.record_hedge(turn.task, "used")
        self._accepted(turn)
        if isinstance(came, Opened):
            turn.received = came.stream.assembler
            return Stream(self, turn, came.context, came.stream)
        turn.teacher = came.answer
        self.settle(turn)
        return Whole(came.body, came.raw, came.headers)

    async def _ask_teacher(self, turn: Turn) -> TeacherReply | Opened:
        ask = self._teacher.stream if turn.chat.stream else self._teacher.complete
        asked = ask(
            turn.chat.body,
            authorization=turn.arrival.caller.authorization,
            request_id=turn.arrival.request_id,
            headers=turn.arrival.headers,
            on_asked=turn.is_asking,
        )
        if isinstance(asked, AbstractAsyncContextManager):
            return Opened(asked, await asked.__aenter__())
        return await asked

    def _start_hedge(self, turn: Turn) -> None:
        """Start the teacher beside the student, where there is room for what may be thrown away."""
        if turn.policy.student.hedge and self._teacher.has_room:
            turn.hedge = Hedge(self._ask_teacher(turn))

    async def _drop_hedge(self, turn: Turn) -> None:
        """Give up a teacher's answer that isn't needed, and count what it cost all the same."""
        hedge, turn.hedge = turn.hedge, None
        if hedge is None:
            return
        came = await hedge.dropped()
        if isinstance(came, Opened):
            turn.received = came.stream.assembler
        self.ledger.hedge_dropped(turn, came.answer if isinstance(came, TeacherReply) else None)
        turn.received = None
        self._metrics.record_hedge(turn.task, "dropped")

    def _accepted(self, turn: Turn) -> None:
        """Note that the teacher answered: the caller's key is good, and an unseen prompt may become a task."""
        self._gate.teacher_accepted(turn.arrival.caller)
        if turn.newcomer is not None:
            turn.task = self._tasks.confirm(turn.newcomer)


def _student_may_step_in(turn: Turn, error: UpstreamError) -> bool:
    """Say whether the student's rejected answer goes before the error: if the task's owner says so."""
    if turn.policy.on_teacher_failure != "student":
        return False
    # A request the teacher finds wrong stays wrong; only a teacher that can't answer is stood in for.
    return not isinstance(error, UpstreamRefused) or error.status >= 500 or error.status in _UNAVAILABLE
