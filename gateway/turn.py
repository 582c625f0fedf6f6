"""One request on its way through the gateway: what it asked, what was decided, who answered."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass, field

from gateway import names
from gateway.auth import Caller
from gateway.cache_entry import CachedAnswer
from gateway.generation import Generation
from gateway.hedge import Hedge
from gateway.live import LiveRelease
from routers.router import Decision
from serving.assembler import Assembler
from serving.chat import ChatRequest
from serving.exchange import Audit, Exchange, Json, Origin, Route, StudentAnswer, TeacherAnswer
from serving.task_settings import RESERVED_TASKS, TaskSettings


@dataclass(frozen=True, slots=True)
class Arrival:
    """A chat request as it came in.

    `task` and `route` are its x-understudy headers, `retries` is the client's count; `headers` are all of
    them, with lower-case names.
    """

    raw: bytes
    request_id: str
    caller: Caller
    headers: list[tuple[str, str]] = field(default_factory=list)
    task: str | None = None
    route: str | None = None
    retries: int = 0


@dataclass(slots=True)
class Turn:
    """What is known of one chat request so far. Times are in seconds; `started` is of the monotonic clock.

    `newcomer` is the name of the task that its prompt may become once the teacher has answered; until then
    `task` is `other`. `eligible` is said of the request, `spoiled` of the way its answer came about: what is
    either not eligible or spoiled counts for nothing (STATISTICS.md §1).
    `asks_twice`: the coin fell by which the teacher is asked once more, whatever it answers (STATISTICS.md §5).
    `origin` says of an answer from the cache who once gave it.
    `asking`: the teacher is being asked (not: waited for, in a line or before a retry) and its answer isn't whole;
    `received` is what has come of a stream.
    `generation` is an answer of the student's that isn't whole yet, `hedge` the teacher that was started beside the
    student, and `hedge_usd` what one cost that wasn't needed.
    `student_usd` is what the student cost so far, whatever came of it (None: it wasn't asked), and `device_s` for how
    long what it runs on was at it.
    `shared`: its answer is made for others as well, by a flight, which also closes its account if it has
    `left` in the meantime.
    `status` is there once the request is over: what its books say, which of a stream that broke off isn't
    the status that was sent. `failure` says why the teacher's answer couldn't be had.
    """

    arrival: Arrival
    chat: ChatRequest
    task: str
    policy: TaskSettings
    release: LiveRelease | None
    storable: bool
    eligible: bool
    spoiled: bool = False
    newcomer: str | None = None
    coin: bool = False
    audit_rate: float = 0.0
    asks_twice: bool = False
    supersedes: str | None = None
    route: Route = "teacher"
    origin: Origin | None = None
    reason: str = names.REASON_NO_RELEASE
    student: StudentAnswer | None = None
    decision: Decision | None = None
    generation: Generation | None = None
    hedge: Hedge | None = None
    hedge_usd: float = 0.0
    teacher: TeacherAnswer | None = None
    asking: bool = False
    received: Assembler | None = None
    shared: bool = False
    left: bool = False
    student_usd: float | None = None
    device_s: float = 0.0
    cost_usd: float | None = None
    waited_s: float = 0.0
    overhead_s: float | None = None
    logged: bool = False
    lost: bool = False
    status: int | None = None
    failure: str | None = None
    id: str = field(default_factory=lambda: new_id())
    created: float = field(default_factory=time.time)
    started: float = field(default_factory=time.perf_counter)

    def elapsed_s(self) -> float:
        """Return the time since the request came in."""
        return time.perf_counter() - self.started

    def is_asking(self, asking: bool) -> None:
        """Note that the teacher is being asked, or that the attempt failed and there is nothing to be billed."""
        self.asking = asking

    @property
    def by_student(self) -> bool:
        """Whether the answer originates from the student, replays included."""
        return "student" in (self.route, self.origin)

    @property
    def given(self) -> StudentAnswer | TeacherAnswer | None:
        """The answer the client gets, if it is known."""
        return self.student if self.by_student else self.teacher

    @property
    def counts(self) -> bool:
        """Whether the exchange is one of those that the promise speaks of (STATISTICS.md §1)."""
        return self.eligible and not self.spoiled

    def replay(self, answer: CachedAnswer, reason: str) -> None:
        """Take over an answer given to another request: a request of its own, with a coin of its own.

        Of an answer of the student's the teacher's is left out: whether it was audited is for this request's
        coin to say.
        """
        self.route = "cache"
        self.origin = answer.origin
        self.reason = f"{reason}:{answer.origin}"
        self.spoiled = not answer.eligible
        self.student = answer.student
        self.teacher = answer.teacher if answer.origin == "teacher" else None
        if answer.confidence is not None:
            accepted = answer.origin == "student"
            self.decision = Decision(accepted, answer.confidence, answer.threshold, self.reason)

    def kept(self, completion: Json, *, at: float) -> CachedAnswer:
        """Return the answer given, as others may be given it. `at`: seconds since the epoch."""
        return CachedAnswer(
            completion=completion,
            origin="student" if self.by_student else "teacher",
            release=self.release.name if self.release else None,
            confidence=self.decision.confidence if self.decision else None,
            threshold=self.decision.threshold if self.decision else None,
            eligible=not self.spoiled,
            student=self.student,
            teacher=self.teacher,
            stored_at=at,
        )

    def audit(self) -> Audit:
        """Say what the coin asks for: nothing, an answer that is still owed, or one that is there already."""
        if not (self.coin and self.counts):
            return "none"
        return "pending" if self.by_student else "answered"

    def repeats(self) -> bool:
        """Whether the teacher, which has answered, is to be asked once more: only where that can be learned from."""
        answered = self.route == "teacher" and self.teacher is not None and self.teacher.trainable
        return self.asks_twice and self.counts and answered and self.task not in RESERVED_TASKS

    def propensity(self) -> float | None:
        """Return the probability with which this exchange comes to have both answers (STATISTICS.md §2)."""
        if not self.counts:
            return None
        return self.audit_rate if self.by_student else 1.0

    def agreement(self) -> bool | None:
        """Compare the two answers, if both are known."""
        if self.release is None or self.student is None or self.teacher is None or not self.student.complete:
            return None
        return self.release.comparison.agree(self.student.choices, self.teacher.choices)

    def exchange(self) -> Exchange:
        """Return the exchange as it goes into the log."""
        return Exchange(
            id=self.id,
            request_id=self.arrival.request_id,
            created=self.created,
            task=self.task,
            tenant=self.arrival.caller.tenant,
            request=self.chat.body,
            route=self.route,
            reason=self.reason,
            release=self.release.name if self.release else None,
            teacher=self.teacher,
            student=self.student,
            confidence=self.decision.confidence if self.decision else None,
            threshold=self.decision.threshold if self.decision else None,
            eligible=self.counts,
            coin=self.coin,
            audit_rate=self.audit_rate,
            audit=self.audit(),
            propensity=self.propensity(),
            agreement=self.agreement(),
            cost_usd=self.cost_usd,
            origin=self.origin,
        )

    def headers(self) -> list[tuple[str, str]]:
        """Return what the client is told about how its request was answered."""
        told = [
            (names.ROUTE_HEADER, self.route),
            (names.REASON_HEADER, self.reason),
            (names.TASK_HEADER, self.task),
        ]
        if self.release is not None:
            told.append((names.RELEASE_HEADER, self.release.name))
        if self.decision is not None:
            told.append((names.CONFIDENCE_HEADER, f"{self.decision.confidence:.4f}"))
        if self.cost_usd is not None and not self.chat.stream:
            told.append((names.COST_HEADER, f"{self.cost_usd:.9f}"))
        return told


def new_id() -> str:
    """Make an id for an exchange: milliseconds since the epoch, then randomness; ids sort by time.

    It has to be unique, not secret: the system's own randomness would cost a system call.
    """
    return f"{time.time_ns() // 1_000_000:012x}{random.getrandbits(64):016x}"
