"""The way of a request: task, coin, student, decision, teacher, log. Knows no HTTP framework.

parse → task → audit coin → student → router.decide ─┬─ accept → answer
                                                     └─ escalate → teacher → log → answer
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager

import orjson

from gateway import names
from gateway.attempts import Attempts
from gateway.audits import Audits
from gateway.auth import Gate
from gateway.envelope import enveloped, internal_error, refusal_of
from gateway.ledger import Ledger
from gateway.live import LiveReleases
from gateway.metrics import NOWHERE, Metrics
from gateway.reply import JSON_TYPE, SSE_HEADERS, Reply, refused
from gateway.tasks import Tasks
from gateway.turn import Arrival, Turn
from routers.coin import audit_rate
from serving.chat import SSE_DONE, ChatRequest, chunks, completion, sse
from serving.errors import RequestError, UnderstudyError, UpstreamError, UpstreamRefused
from serving.exchange import Json, StudentAnswer
from serving.slots import UpstreamBusy
from serving.teacher import StreamFailed, Teacher, TeacherStream

log = logging.getLogger("understudy.pipeline")

_TEACHER = "teacher"
_STUDENT = "student"
_UNAVAILABLE = frozenset({408, 409, 429})


class Pipeline:
    """Answers chat requests. Every collaborator comes from outside; nothing is kept between requests here."""

    def __init__(
        self,
        *,
        teacher: Teacher,
        tasks: Tasks,
        live: LiveReleases,
        gate: Gate,
        ledger: Ledger,
        audits: Audits,
        attempts: Attempts,
        metrics: Metrics,
    ) -> None:
        self._teacher = teacher
        self._tasks = tasks
        self._live = live
        self._gate = gate
        self._ledger = ledger
        self._audits = audits
        self._attempts = attempts
        self._metrics = metrics

    async def serve(self, arrival: Arrival, has_turn: Callable[[Turn], None] | None = None) -> Reply:
        """Answer a request; errors become replies too. Cancelling it cancels what it waits for.

        `has_turn` is told of the turn as soon as there is one: the request was read and belongs to a task.
        """
        began = time.perf_counter()
        try:
            turn = self._begin(arrival, began)
        except UnderstudyError as error:
            refusal = refusal_of(error)
            self._metrics.record_request(
                NOWHERE, NOWHERE, names.REASON_REFUSED, refusal.status, time.perf_counter() - began
            )
            return refused(refusal, [])
        if has_turn is not None:
            has_turn(turn)
        try:
            return await self._answer(turn)
        except UnderstudyError as error:
            return self._refuse(turn, error)
        except BaseException as error:
            if isinstance(error, Exception):
                log.exception("request %s failed", arrival.request_id)
                self._ledger.close_books(turn, 500)
                return refused(internal_error(), turn.headers())
            # Cancelled: the client went away.
            self._ledger.cancelled(turn)
            self._ledger.close_books(turn, 499)
            raise

    def _begin(self, arrival: Arrival, began: float) -> Turn:
        """Read the request, find its task and flip its coin."""
        if arrival.route not in (None, _TEACHER, _STUDENT):
            raise RequestError(
                f"{names.ROUTE_HEADER} should be teacher or student, not {arrival.route[:40]!r}",
                param=names.ROUTE_HEADER,
            )
        chat = ChatRequest.parse(arrival.raw)
        task, newcomer = self._tasks.find(chat.body, arrival.task)
        release = self._live.get(task)
        storable = chat.body.get("store") is not False
        turn = Turn(
            arrival=arrival,
            chat=chat,
            task=task,
            newcomer=newcomer,
            policy=self._tasks.policy(task),
            release=release,
            storable=storable,
            eligible=storable and arrival.route is None,
            started=began,
        )
        if storable:
            self._flip(turn)
        return turn

    def _flip(self, turn: Turn) -> None:
        """Flip the audit coin, or take over that of the attempt this one repeats."""
        arrival = turn.arrival
        key = Attempts.key(arrival.caller.tenant, turn.chat.raw)
        earlier = self._attempts.earlier(key) if arrival.retries > 0 else None
        if earlier is not None:
            turn.supersedes = earlier.id
            turn.eligible = turn.eligible and earlier.audit_rate > 0
            turn.coin = earlier.coin and turn.eligible
            turn.audit_rate = earlier.audit_rate
        elif arrival.retries > 0:
            # Its first attempt was seen by another worker or not at all: what it stands for isn't known.
            turn.eligible = False
        elif turn.eligible:
            audited = turn.release.accepted_audits if turn.release else 0
            turn.audit_rate = audit_rate(audited, turn.policy.audit_rate)
            turn.coin = random.random() < turn.audit_rate
        self._attempts.remember(key, turn.id, coin=turn.coin, audit_rate=turn.audit_rate)

    async def _answer(self, turn: Turn) -> Reply:
        escalated = await self._ask_student(turn)
        if escalated is None and turn.student is not None:
            return await self._student_reply(turn, turn.student)
        turn.reason = escalated or turn.reason
        try:
            if turn.chat.stream:
                return await self._teacher_stream(turn)
            return await self._teacher_whole(turn)
        except UpstreamError as error:
            turn.asking = False
            self._note_failure(turn, error)
            if turn.student is None or not self._student_may_step_in(turn, error):
                raise
            turn.reason = names.REASON_TEACHER_UNAVAILABLE
            turn.eligible = False
            return await self._student_reply(turn, turn.student)

    async def _ask_student(self, turn: Turn) -> str | None:
        """Let the student answer. Return the reason to ask the teacher instead; None: serve the answer."""
        forced = turn.arrival.route
        release = turn.release
        if forced == _TEACHER:
            return names.REASON_FORCED
        if release is None:
            if forced == _STUDENT:
                raise RequestError(
                    f"{names.ROUTE_HEADER}: student was asked for, but task {turn.task} has no live release",
                    param=names.ROUTE_HEADER,
                    code="no_live_release",
                )
            return names.REASON_NO_RELEASE
        if not self._gate.verified(turn.arrival.caller):
            # Not the router's doing, so nothing the promise may count (STATISTICS.md §1).
            turn.eligible = False
            return names.REASON_UNVERIFIED_KEY
        began = time.perf_counter()
        try:
            feature = release.student.unsupported(turn.chat.body)
            if feature is not None:
                turn.eligible = False
                if forced == _STUDENT:
                    raise RequestError(
                        f"{names.ROUTE_HEADER}: student was asked for, but the student of task {turn.task} "
                        f"doesn't support this request ({feature})",
                        param=names.ROUTE_HEADER,
                        code="unsupported",
                    )
                return f"{names.REASON_UNSUPPORTED}:{feature}"
            answer = await release.student.answer(turn.chat.body)
            decision = release.router.decide(answer.score, release.comparison.key(answer.choices))
        except RequestError:
            raise
        except Exception:
            log.exception("task %s: the student of release %s failed", turn.task, release.name)
            self._metrics.record_upstream_error(_STUDENT, "broken")
            turn.eligible = False
            return names.REASON_STUDENT_ERROR
        finally:
            took = time.perf_counter() - began
            turn.waited_s += took
        turn.student = self._ledger.priced(answer, took)
        turn.decision = decision
        if forced == _STUDENT:
            turn.reason = names.REASON_FORCED
            return None
        turn.reason = decision.reason
        return None if decision.accepted else decision.reason

    async def _student_reply(self, turn: Turn, answer: StudentAnswer) -> Reply:
        turn.route = "student"
        self._ledger.settle(turn)
        whole = completion(
            id=f"chatcmpl-{turn.id}",
            created=int(turn.created),
            # Clients check the model they asked for; who answered stands in the headers.
            model=turn.chat.model,
            choices=answer.choices,
            usage=answer.usage,
        )
        if turn.chat.stream:
            return self._streamed(turn, [], self._student_frames(turn, whole))
        await self._ledger.commit(turn)
        return self._whole(turn, [], orjson.dumps(whole))

    async def _teacher_whole(self, turn: Turn) -> Reply:
        began = time.perf_counter()
        turn.asking = True
        try:
            reply = await self._teacher.complete(
                turn.chat.body,
                authorization=turn.arrival.caller.authorization,
                request_id=turn.arrival.request_id,
                headers=turn.arrival.headers,
            )
        finally:
            turn.waited_s += time.perf_counter() - began
        self._accepted(turn)
        turn.teacher = reply.answer
        self._ledger.settle(turn)
        await self._ledger.commit(turn)
        return self._whole(turn, reply.headers, reply.raw)

    async def _teacher_stream(self, turn: Turn) -> Reply:
        opened = self._teacher.stream(
            turn.chat.body,
            authorization=turn.arrival.caller.authorization,
            request_id=turn.arrival.request_id,
            headers=turn.arrival.headers,
        )
        began = time.perf_counter()
        turn.asking = True
        try:
            stream = await opened.__aenter__()
        finally:
            turn.waited_s += time.perf_counter() - began
        self._accepted(turn)
        turn.received = stream.assembler
        return self._streamed(turn, stream.headers, self._teacher_frames(turn, stream), opened)

    async def _student_frames(self, turn: Turn, whole: Json) -> AsyncGenerator[bytes, None]:
        yield b"".join(sse(chunk) for chunk in chunks(whole, include_usage=turn.chat.wants_usage))
        await self._ledger.commit(turn)
        yield SSE_DONE

    async def _teacher_frames(self, turn: Turn, stream: TeacherStream) -> AsyncGenerator[bytes, None]:
        try:
            async for chunk in stream:
                if not chunk.usage_only or turn.chat.wants_usage:
                    yield sse(chunk.raw)
            turn.teacher = stream.answer()
        except UpstreamError as error:
            # Too late for a status of its own: the error is a frame, and the stream ends without [DONE].
            self._note_failure(turn, error)
            self._ledger.broken_off(turn)
            self._ledger.close_books(turn, 502)
            yield sse(
                enveloped(502, error.body) if isinstance(error, StreamFailed) else refusal_of(error).body
            )
            return
        self._ledger.settle(turn)
        await self._ledger.commit(turn)
        yield SSE_DONE

    def _whole(self, turn: Turn, headers: list[tuple[str, str]], body: bytes) -> Reply:
        turn.overhead_s = turn.elapsed_s() - turn.waited_s
        self._metrics.record_overhead(turn.overhead_s)
        self._ledger.close_books(turn, 200)

        async def on_end(delivered: bool) -> None:
            self._after(turn, delivered)

        return Reply(200, [JSON_TYPE, *_passed_on(headers), *turn.headers()], body, on_end=on_end)

    def _streamed(
        self,
        turn: Turn,
        headers: list[tuple[str, str]],
        frames: AsyncGenerator[bytes, None],
        opened: AbstractAsyncContextManager[TeacherStream] | None = None,
    ) -> Reply:
        first_s = turn.elapsed_s()
        turn.overhead_s = first_s - turn.waited_s
        self._metrics.record_overhead(turn.overhead_s)
        self._metrics.record_first_token(turn.task, turn.route, first_s)

        async def on_end(delivered: bool) -> None:
            if opened is not None:
                await opened.__aexit__(None, None, None)
            self._ledger.close_books(turn, 200 if delivered else 499)
            self._after(turn, delivered)

        return Reply(200, [*SSE_HEADERS, *_passed_on(headers), *turn.headers()], frames=frames, on_end=on_end)

    def _after(self, turn: Turn, delivered: bool) -> None:
        """Do what comes after the client has its answer, or has gone away.

        An answer that was not delivered is cancelled, and counts for nothing: nobody audits it.
        """
        if not delivered:
            self._ledger.cancelled(turn)
        elif turn.logged and turn.audit() == "pending":
            self._audits.start(turn.exchange(), turn.arrival.caller)

    def _refuse(self, turn: Turn, error: UnderstudyError) -> Reply:
        if isinstance(error, UpstreamBusy):
            turn.reason = names.REASON_OVERLOADED
        refusal = refusal_of(error)
        self._ledger.close_books(turn, refusal.status)
        return refused(refusal, turn.headers())

    def _accepted(self, turn: Turn) -> None:
        """Note that the teacher answered: the caller's key is good, and an unseen prompt may become a task."""
        self._gate.teacher_accepted(turn.arrival.caller)
        if turn.newcomer is not None:
            turn.task = self._tasks.confirm(turn.newcomer)

    def _note_failure(self, turn: Turn, error: UpstreamError) -> None:
        turn.failure = str(error)
        if isinstance(error, UpstreamBusy):
            return  # our own doing
        self._metrics.record_upstream_error(_TEACHER, error.kind)
        if isinstance(error, UpstreamRefused) and error.status in (401, 403):
            self._gate.teacher_refused(turn.arrival.caller)

    @staticmethod
    def _student_may_step_in(turn: Turn, error: UpstreamError) -> bool:
        """Say whether the student's rejected answer goes before the error: if the task's owner says so."""
        if turn.policy.on_teacher_failure != "student":
            return False
        # A request the teacher finds wrong stays wrong; only a teacher that can't answer is stood in for.
        return not isinstance(error, UpstreamRefused) or error.status >= 500 or error.status in _UNAVAILABLE


def _passed_on(headers: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Leave out what we say ourselves; a teacher behind another gateway like this one says it too."""
    return [
        (name, value)
        for name, value in headers
        if name != "cache-control" and not name.startswith(names.OWN_HEADER_PREFIX)
    ]
