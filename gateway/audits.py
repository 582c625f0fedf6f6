"""Audits: asking the teacher about answers the student gave, after the client has them (STATISTICS.md §2).

Nothing is ever dropped: an audit that this process can't finish stays pending in the log, and the keeper of
this or the next process takes it up.

The teacher's own noise is measured on the way (STATISTICS.md §5): of a few requests that it answered it is asked once
more. Such a repeat is owed to nobody. One that can't be made at once, or that its process doesn't live to see, is
dropped: whether it is doesn't depend on what the teacher would have said.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from gateway.auth import Caller
from gateway.ledger import Ledger
from gateway.live import LiveReleases
from gateway.metrics import Metrics
from gateway.tasks import Tasks
from serving import events
from serving.errors import UpstreamError, UpstreamRefused, UpstreamUnavailable
from serving.exchange import Exchange, TeacherAnswer
from serving.slots import UpstreamBusy
from serving.teacher import Teacher
from serving.upstream import Headers, NothingSent

log = logging.getLogger("understudy.audits")

_CONCURRENCY = 8
_MOST_WAITING = 1000
WAITS_FOR_S = 3600.0
"""How long an audit waits for a teacher that isn't there; later it counts as missing anyway."""
_LOOK_AGAIN_S = 10.0
_HAND_OVER_S = 60.0
"""So old an audit doesn't wait any more in the worker that began it: the keeper takes up what is left over."""
_WORTH_REPEATING = frozenset({408, 409, 429})
KEEPER_TENANT = Caller(tenant="keeper")


@dataclass(slots=True)
class _Audit:
    """One audit; `asking` while the teacher may be at work on it. `until` is of the monotonic clock.

    `again`: it is a repeat, of a question that the teacher has answered.
    """

    exchange: Exchange
    caller: Caller
    headers: Headers
    until: float = field(default_factory=lambda: time.monotonic() + WAITS_FOR_S)
    again: bool = False
    asking: bool = False
    task: asyncio.Task[None] | None = None


class Audits:
    """Runs audits in the background, a few at a time, behind everything that clients wait for.

    `delays` are the seconds between attempts that failed. While the teacher can't be reached or is left alone
    by its breaker, an audit waits. `keeper_can_audit`: whether one that waits long may be left to the keeper.
    `under_way` are the exchanges that this process audits, whatever configuration they began with.
    """

    def __init__(
        self,
        *,
        teacher: Teacher,
        ledger: Ledger,
        live: LiveReleases,
        tasks: Tasks,
        metrics: Metrics,
        client_keys: bool,
        keeper_can_audit: bool = True,
        delays: Sequence[float] = (2.0, 10.0),
        under_way: set[str] | None = None,
    ) -> None:
        self._teacher = teacher
        self._ledger = ledger
        self._live = live
        self._tasks = tasks
        self._metrics = metrics
        self._client_keys = client_keys
        self._keeper_can_audit = keeper_can_audit
        self._delays = delays
        self._slots = asyncio.Semaphore(_CONCURRENCY)
        self._running: dict[str, _Audit] = {}
        self._under_way = set() if under_way is None else under_way
        self._successor: Audits | None = None

    def start(self, exchange: Exchange, caller: Caller, headers: Headers = ()) -> None:
        """Audit one exchange in the background. With too many waiting it is left to the keeper.

        `headers` are the client's (lower-case names): they choose among accounts of the teacher's. The log doesn't
        hold them, so that the keeper asks without.
        """
        self._begin(_Audit(exchange, caller, headers))

    def repeat(self, exchange: Exchange, caller: Caller, headers: Headers = ()) -> None:
        """Ask the teacher once more what it has answered, in the background. Dropped where it can't be done at once."""
        if self._successor is None:  # else that one's teacher may be another
            self._begin(_Audit(exchange, caller, headers, again=True))

    def hand_over(self, successor: Audits) -> None:
        """Let the audits of a reloaded configuration go on with those that wait; what is being asked comes to its end.

        Else they would wait for a teacher that may have been replaced. `successor` must share `under_way`. Repeats are
        dropped: another teacher isn't asked twice.
        """
        self._successor = successor
        for audit in list(self._running.values()):
            if not audit.asking and audit.task is not None:
                audit.task.cancel()

    def _begin(self, audit: _Audit) -> None:
        if self._successor is not None:
            self._successor._begin(audit)
            return
        name = audit.exchange.id
        if name in self._under_way or len(self._running) >= _MOST_WAITING:
            return
        audit.task = asyncio.get_running_loop().create_task(self._audit(audit))
        audit.task.add_done_callback(lambda task: self._over(audit, task))
        self._running[name] = audit
        self._under_way.add(name)

    def _over(self, audit: _Audit, task: asyncio.Task[None]) -> None:
        self._running.pop(audit.exchange.id, None)
        self._under_way.discard(audit.exchange.id)
        # One that was cancelled while the teacher was asked would be paid for twice.
        waits = not audit.asking and not audit.again
        if task.cancelled() and self._successor is not None and waits:
            self._successor._begin(audit)

    def take_up(self, leftovers: Iterable[Exchange]) -> int:
        """Take up audits that other processes left pending; how many there were.

        In client-key mode the key is gone with the process that had it, and of a request that was redacted what
        it asked: such audits are missing.
        """
        taken = 0
        for exchange in leftovers:
            if exchange.id in self._under_way:
                continue
            taken += 1
            if self._client_keys or "request" in exchange.redacted:
                self._finish(exchange, None)
            else:
                self.start(exchange, KEEPER_TENANT)
        return taken

    async def aclose(self, grace_s: float | None = 5.0) -> None:
        """Give what is running a few seconds; the rest stays pending in the log. None: all the time it takes."""
        running = {audit.task: audit.again for audit in self._running.values() if audit.task is not None}
        if not running:
            return
        _, unfinished = await asyncio.wait(running, timeout=grace_s)
        for task in unfinished:
            task.cancel()
        if unfinished:
            await asyncio.wait(unfinished)
            pending = sum(not running[task] for task in unfinished)
            log.info("%d audits stay pending for the next start", pending)

    async def _audit(self, audit: _Audit) -> None:
        exchange = audit.exchange
        try:
            answer = await self._ask(audit)
        except _NotNow:
            return
        except Exception:
            log.exception("audit of exchange %s failed", exchange.id)
            answer = None
        if audit.again:
            self._note_repeat(exchange, answer)
        else:
            self._finish(exchange, answer)

    async def _ask(self, audit: _Audit) -> TeacherAnswer | None:
        """Return the teacher's answer, or None when it can't be had.

        A teacher that isn't there is waited for; one that was asked and failed is asked a few times.
        Raises _NotNow when waiting any longer is the keeper's, and for a repeat that would have to wait.
        """
        exchange, caller = audit.exchange, audit.caller
        delays = iter(self._delays)
        while True:
            try:
                async with self._slots:
                    if self._is_keepers(exchange, caller):
                        # It has waited behind so many others that the keeper may be at it by now.
                        raise _NotNow
                    audit.asking = True
                    reply = await self._teacher.complete(
                        exchange.request,
                        authorization=caller.authorization,
                        request_id=exchange.request_id,
                        headers=audit.headers,
                        background=True,
                    )
                return reply.answer
            except UpstreamError as error:
                audit.asking = False
                if _was_not_asked(error):
                    told = error.retry_after_s if isinstance(error, UpstreamUnavailable) else _LOOK_AGAIN_S
                    delay: float | None = told * random.uniform(1.0, 1.5)
                    if time.monotonic() > audit.until:
                        delay = None
                    elif audit.again or self._is_keepers(exchange, caller):
                        raise _NotNow from None
                else:
                    self._metrics.record_upstream_error("teacher", error.kind)
                    delay = next(delays, None) if _may_pass(error) else None
                if delay is None:
                    what = "repeat of" if audit.again else "audit of"
                    log.warning("%s exchange %s: %s; it counts as missing", what, exchange.id, error)
                    return None
            if self._successor is not None:
                raise asyncio.CancelledError  # handed over while the teacher was asked
            await asyncio.sleep(delay)

    def _is_keepers(self, exchange: Exchange, caller: Caller) -> bool:
        """Whether an audit that waits is better left to the keeper, lest two processes ask."""
        mine = caller is KEEPER_TENANT or not self._keeper_can_audit
        return not mine and time.time() - exchange.created > _HAND_OVER_S

    def _finish(self, exchange: Exchange, answer: TeacherAnswer | None) -> None:
        agreed = None
        if answer is not None and exchange.student is not None:
            agreed = self._tasks.comparison(exchange.task).agree(exchange.student.choices, answer.choices)
        requested = exchange.request.get("model")
        self._ledger.later(
            exchange.task,
            events.audited(
                exchange.id,
                teacher=answer,
                agreement=agreed,
                at=time.time(),
                requested=requested if isinstance(requested, str) else None,
            ),
        )
        self._metrics.record_audit(
            exchange.task,
            agreed,
            answer.cost_usd if answer else None,
            answer.usage if answer else None,
            exchange.route,
        )
        release = self._live.get(exchange.task)
        if release is not None and release.name == exchange.release:
            release.accepted_audits += 1

    def _note_repeat(self, exchange: Exchange, answer: TeacherAnswer | None) -> None:
        agreed = None
        if answer is not None and exchange.teacher is not None:
            agreed = self._tasks.comparison(exchange.task).agree(exchange.teacher.choices, answer.choices)
        self._ledger.later(exchange.task, events.repeated(exchange.id, teacher=answer, at=time.time()))
        self._metrics.record_repeat(
            exchange.task, agreed, answer.cost_usd if answer else None, answer.usage if answer else None
        )


class _NotNow(Exception):
    """The teacher isn't asked any more: an audit stays pending in the log, for the keeper; a repeat is dropped."""


def _was_not_asked(error: UpstreamError) -> bool:
    """Whether the teacher can't have worked on it, so that nothing was paid for."""
    if isinstance(error, UpstreamRefused):
        return error.status == 429
    return isinstance(error, UpstreamUnavailable | UpstreamBusy | NothingSent)


def _may_pass(error: UpstreamError) -> bool:
    return not isinstance(error, UpstreamRefused) or error.status >= 500 or error.status in _WORTH_REPEATING
