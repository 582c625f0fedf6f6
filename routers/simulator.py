"""A task's life without HTTP: exchanges in, decisions out, by the code that decides in the gateway.

The simulator plays one stream of requests through coin, student, router and look exactly as gateway and `understudy
learn` do, and returns what became of it. What learns is handed in, since learning lies outside this package; planted
failures (STATISTICS.md) are learners and policies that break one rule.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

from routers.coin import audit_rate
from routers.router import Router
from routers.watch import Watch
from serving.exchange import Exchange, Json, StudentAnswer, TeacherAnswer


@dataclass(frozen=True, slots=True)
class Message:
    """One request of a stream: what the user says, what the teacher would answer, and what is right (if known)."""

    text: str
    teacher: str
    gold: str | None = None


class LiveStudent(Protocol):
    """What a release is to the simulator."""

    @property
    def router(self) -> Router:
        """The release's router."""
        ...

    def skips(self, text: str) -> bool:
        """Whether the student isn't asked about a text, since an escalation is foreseen."""
        ...

    def predict(self, text: str) -> tuple[str, float, Mapping[str, float]]:
        """The student's answer to a text, its score and its signals."""
        ...


class Learner(Protocol):
    """What `understudy learn` is to the simulator."""

    def learn(self, exchanges: Sequence[Exchange]) -> tuple[str, LiveStudent] | None:
        """A new release and its name, from everything logged so far; None: what is live stays."""
        ...


@dataclass(frozen=True, slots=True)
class Served:
    """What became of one message: the answer the client got, who gave it, and whether the teacher was called."""

    answer: str
    release: str | None
    by_student: bool
    teacher_called: bool


@dataclass(slots=True)
class Kept:
    """One release judged by hindsight, on all messages after it, whatever was live then.

    `answered` of them it would have answered, `disagreed` of those against the teacher.
    """

    release: str
    after: int
    rest: int
    answered: int
    disagreed: int

    @property
    def disagreement(self) -> float:
        """The share of its answers that disagree; 0 where it answers nothing."""
        return self.disagreed / self.answered if self.answered else 0.0


@dataclass(slots=True)
class Run:
    """One simulated stream, message by message, and its releases by hindsight.

    `withdrawn` are the releases that the watch took away, with the number of messages before that; `live` is the one
    that answers in the end.
    """

    served: list[Served] = field(default_factory=list)
    releases: list[Kept] = field(default_factory=list)
    withdrawn: list[tuple[str, int]] = field(default_factory=list)
    live: str | None = None

    def teacher_share(self, last: int | None = None) -> float:
        """The share of messages (of the `last` ones) for which the teacher was called, audits included."""
        counted = self.served if last is None else self.served[-last:]
        return sum(one.teacher_called for one in counted) / len(counted)


def simulate(
    messages: Sequence[Message],
    learner: Learner,
    *,
    learn_every: int,
    seed: int,
    rate: float | None = None,
    missing: Callable[[Message], float] = lambda message: 0.0,
    watching: Callable[[], Watch] | None = None,
    withdrawn: Callable[[float], None] = lambda at: None,
) -> Run:
    """Play `messages` in order, from a cold start.

    The learner is asked after every `learn_every` messages. `rate` overrides the audit rate; `missing` is the chance
    that an audit of a message gets no answer from the teacher. `seed` is of the coins. `watching` makes the watch of
    each release (None: nothing is withdrawn). After an alarm `withdrawn` is told when that was, as exchanges tell time:
    what came until then is in the log all the same, and is for the learner to leave out.
    """
    coins = random.Random(seed)
    run = Run()
    log: list[Exchange] = []
    live: LiveStudent | None = None
    name: str | None = None
    audits = 0
    watch: Watch | None = None
    for number, message in enumerate(messages):
        audit = audit_rate(audits, rate)
        coin = coins.random() < audit
        exchange = _arrived(number, message, name, coin, audit)
        accepted = False
        if live is not None and live.skips(message.text):
            exchange = replace(exchange, reason="skipped")
        elif live is not None:
            answer, score, signals = live.predict(message.text)
            decision = live.router.decide(score, signals, answer)
            exchange = replace(
                exchange,
                student=_student(answer, score, signals),
                confidence=decision.confidence,
                reason=decision.reason,
            )
            accepted = decision.accepted
            if accepted:
                lost = coin and coins.random() < missing(message)
                run.served.append(Served(answer, name, True, coin))
                audits += coin
                log.append(
                    replace(
                        exchange,
                        route="student",
                        propensity=audit,
                        teacher=_teacher(message) if coin and not lost else None,
                        audit="missing" if lost else "answered" if coin else "none",
                    )
                )
                if coin and watch is not None and watch.observe(not lost and answer == message.teacher):
                    run.withdrawn.append((name or "", number + 1))
                    live = name = watch = None
                    withdrawn(exchange.created)
        if not accepted:
            run.served.append(Served(message.teacher, name, False, True))
            log.append(replace(exchange, route="teacher", propensity=1.0, teacher=_teacher(message)))
        if (number + 1) % learn_every == 0:
            released = learner.learn(log)
            if released is not None:
                name, live = released
                audits = 0
                watch = None if watching is None else watching()
                run.releases.append(_hindsight(name, live, messages[number + 1 :], number + 1))
    run.live = name
    return run


def _hindsight(name: str, live: LiveStudent, rest: Sequence[Message], after: int) -> Kept:
    kept = Kept(name, after, len(rest), 0, 0)
    for message in rest:
        if live.skips(message.text):
            continue
        answer, score, signals = live.predict(message.text)
        if live.router.decide(score, signals, answer).accepted:
            kept.answered += 1
            kept.disagreed += answer != message.teacher
    return kept


def _arrived(number: int, message: Message, release: str | None, coin: bool, rate: float) -> Exchange:
    request: Json = {"model": "teacher", "messages": [{"role": "user", "content": message.text}]}
    return Exchange(
        id=f"{number:08d}",
        request_id=f"{number:08d}",
        created=float(number),
        task="simulated",
        tenant="",
        request=request,
        route="teacher",
        reason="no_release",
        release=release,
        coin=coin,
        audit_rate=rate,
    )


def _choices(answer: str) -> list[Json]:
    return [{"index": 0, "message": {"role": "assistant", "content": answer}, "finish_reason": "stop"}]


def _teacher(message: Message) -> TeacherAnswer:
    return TeacherAnswer("teacher", _choices(message.teacher), None, 0.0, trainable=True)


def _student(answer: str, score: float, signals: Mapping[str, float]) -> StudentAnswer:
    return StudentAnswer("student", _choices(answer), None, 0.0, score, signals=dict(signals))
