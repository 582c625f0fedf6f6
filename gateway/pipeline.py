"""The way of a request: task, coin, cache, single flight, student, decision, teacher, log. Knows no HTTP framework.

parse → task → audit coin → cache ─┬─ hit ─────────────────────────────────────────────→ answer
                                   └─ miss ─ single flight
                                        └─ student → router.decide ─┬─ accept ─────────→ answer
                                                                    └─ escalate → teacher → log → answer
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable

from gateway import names
from gateway.answers import TEACHER, Answers, Whole
from gateway.attempts import Attempts
from gateway.audits import Audits
from gateway.auth import Gate
from gateway.cache import Cache
from gateway.cache_control import cache_control
from gateway.envelope import internal_error, refusal_of
from gateway.ledger import Ledger
from gateway.live import LiveReleases
from gateway.metrics import NOWHERE, Metrics
from gateway.presenter import Presenter, written
from gateway.reply import Reply, refused
from gateway.sharing import Sharing
from gateway.student_turn import STUDENT
from gateway.tasks import Tasks
from gateway.turn import Arrival, Turn
from routers.coin import audit_rate
from serving.cache_settings import CacheSettings
from serving.chat import ChatRequest
from serving.errors import RequestError, UnderstudyError
from serving.slots import UpstreamBusy
from serving.teacher import Teacher

log = logging.getLogger("understudy.pipeline")


class Pipeline:
    """Answers chat requests. Every collaborator comes from outside; of requests it keeps what they share."""

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
        cache: Cache,
        cache_settings: CacheSettings,
        metrics: Metrics,
    ) -> None:
        self._tasks = tasks
        self._live = live
        self._gate = gate
        self._ledger = ledger
        self._attempts = attempts
        self._metrics = metrics
        self._answers = Answers(teacher=teacher, tasks=tasks, gate=gate, ledger=ledger, metrics=metrics)
        self._presenter = Presenter(ledger=ledger, audits=audits, metrics=metrics)
        self._sharing = Sharing(
            cache=cache,
            settings=cache_settings,
            answers=self._answers,
            presenter=self._presenter,
            ledger=ledger,
            metrics=metrics,
        )

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
        if arrival.route not in (None, TEACHER, STUDENT):
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
            # Once a release is live, what the teacher answers is the harder part: no sample of the traffic.
            turn.asks_twice = turn.release is None and random.random() < turn.policy.noise_rate
        self._attempts.remember(key, turn.id, coin=turn.coin, audit_rate=turn.audit_rate)

    async def _answer(self, turn: Turn) -> Reply:
        control = cache_control(turn)
        key = None
        # A made-up key must get nothing that the teacher was paid for by somebody else.
        if control.write and self._gate.verified(turn.arrival.caller):
            key = self._sharing.key(turn)
        if key is not None:
            return await self._sharing.answer(turn, key, control)
        self._metrics.record_cache(turn.task, "bypass")
        return await self._alone(turn)

    async def _alone(self, turn: Turn) -> Reply:
        """Answer a request by itself: nothing of it is shared with others."""
        made = await self._answers.make(turn)
        presenter = self._presenter
        if not isinstance(made, Whole):
            return presenter.streamed(turn, made.headers, presenter.frames(turn, made), made.aclose)
        if turn.chat.stream:
            return presenter.streamed(turn, made.headers, presenter.frames_of(turn, made.completion))
        await self._ledger.commit(turn)
        return presenter.whole(turn, made.headers, made.raw or written(made.completion))

    async def aclose(self) -> None:
        """Give up what is still being made for several."""
        await self._sharing.flights.aclose()
        await self._answers.aclose()

    def _refuse(self, turn: Turn, error: UnderstudyError) -> Reply:
        if isinstance(error, UpstreamBusy):
            turn.reason = names.REASON_OVERLOADED
        elif isinstance(error, RequestError):
            turn.reason = names.REASON_REFUSED
        refusal = refusal_of(error)
        self._ledger.close_books(turn, refusal.status)
        return refused(refusal, turn.headers())
