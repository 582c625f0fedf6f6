"""What a replay showed: counted from what the client saw, and from the gateway's log where it can be read."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from loadtest.learner import Lesson
from loadtest.traffic import Outcome, gold_choices, recorded_choices
from serving.agreement import Comparison
from serving.exchange import Exchange, Json


@dataclass(frozen=True, slots=True)
class RouteShare:
    """How many requests went this way, for this reason."""

    route: str
    reason: str
    requests: int
    share: float


@dataclass(frozen=True, slots=True)
class ReleaseResult:
    """What one release did on the rest of the stream: its answers that were served, against the recording."""

    release: str
    served: int
    disagreed: int
    disagreement: float


@dataclass(frozen=True, slots=True)
class Latency:
    """Seconds, as the client saw them; percentiles by nearest rank."""

    p50_s: float
    p99_s: float


@dataclass(frozen=True, slots=True)
class Results:
    """Everything the table shows. Shares and rates are 0 to 1, None where nothing was there to count.

    `agreement` and `accuracy` are of all answers, `student_…` of the student's own, `teacher_accuracy` of the
    recorded teacher. `teacher_share` is of escalations and `audits` (None: unknown without log and metrics).
    `usd_per_request` has audits in it; `teacher_usd_per_request` is the mean cost of a teacher's answer.
    `oracle_share` is the share of teacher calls that the same student would have needed with its threshold
    known in hindsight and no audits: the floor.
    """

    requests: int
    failed: int
    failures: dict[str, int]
    routes: list[RouteShare]
    agreement: float | None
    student_agreement: float | None
    accuracy: float | None
    student_accuracy: float | None
    teacher_accuracy: float | None
    escalated: int
    audits: int | None
    teacher_share: float | None
    oracle_share: float | None
    releases: list[ReleaseResult]
    latency: dict[str, Latency]
    usd_per_request: float | None
    teacher_usd_per_request: float | None
    lessons: list[Lesson]
    seconds: float
    interrupted: bool

    def to_json(self) -> Json:
        """Return the results as plain JSON."""
        return dataclasses.asdict(self)


def summarise(
    outcomes: Sequence[Outcome],
    *,
    compare: Comparison,
    exchanges: Iterable[Exchange] = (),
    audits: int | None = None,
    oracle_share: float | None = None,
    lessons: Sequence[Lesson] = (),
    seconds: float = 0.0,
    interrupted: bool = False,
) -> Results:
    """Count `outcomes`.

    `exchanges` are the gateway's log (those of other requests are left out); with them audits and their cost
    are known exactly. Without them `audits` is what the gateway's metrics counted, if they could be had.
    """
    answered = [outcome for outcome in outcomes if outcome.choices is not None]
    students = [outcome for outcome in answered if outcome.route == "student"]
    escalated = sum(outcome.route in ("teacher", None) for outcome in answered)
    ours = {outcome.request_id for outcome in answered}
    logged = [exchange for exchange in exchanges if exchange.request_id in ours]
    audited = [exchange for exchange in logged if exchange.audit != "none" and exchange.by_student]
    if logged:
        audits = len(audited)
    calls = None if audits is None else escalated + audits
    agrees = _agreement(compare)
    right = _accuracy(compare)
    return Results(
        requests=len(outcomes),
        failed=len(outcomes) - len(answered),
        failures=dict(Counter(outcome.error for outcome in outcomes if outcome.error is not None)),
        routes=_routes(answered),
        agreement=_share(answered, agrees),
        student_agreement=_share(students, agrees),
        accuracy=_share(answered, right),
        student_accuracy=_share(students, right),
        teacher_accuracy=_share(outcomes, _teacher_accuracy(compare)),
        escalated=escalated,
        audits=audits,
        teacher_share=None if calls is None or not answered else calls / len(answered),
        oracle_share=oracle_share,
        releases=_releases(students, agrees),
        latency=_latency(answered),
        usd_per_request=_cost(answered, audited),
        teacher_usd_per_request=_teacher_cost(answered, logged),
        lessons=list(lessons),
        seconds=seconds,
        interrupted=interrupted,
    )


Judge = Callable[[Outcome], "bool | None"]
"""Whether an outcome is as wanted; None: can't be said, and isn't counted."""


def _agreement(compare: Comparison) -> Judge:
    def judge(outcome: Outcome) -> bool | None:
        return compare.agree(outcome.choices or [], recorded_choices(outcome.row))

    return judge


def _accuracy(compare: Comparison) -> Judge:
    def judge(outcome: Outcome) -> bool | None:
        if outcome.row.gold is None:
            return None
        return compare.agree(outcome.choices or [], gold_choices(outcome.row))

    return judge


def _teacher_accuracy(compare: Comparison) -> Judge:
    def judge(outcome: Outcome) -> bool | None:
        if outcome.row.gold is None:
            return None
        return compare.agree(recorded_choices(outcome.row), gold_choices(outcome.row))

    return judge


def _share(outcomes: Iterable[Outcome], judge: Judge) -> float | None:
    judged = [verdict for outcome in outcomes if (verdict := judge(outcome)) is not None]
    return sum(judged) / len(judged) if judged else None


def _routes(answered: Sequence[Outcome]) -> list[RouteShare]:
    counts = Counter((outcome.route or "unknown", outcome.reason or "unknown") for outcome in answered)
    return [
        RouteShare(route, reason, count, count / len(answered))
        for (route, reason), count in sorted(counts.items())
    ]


def _releases(students: Sequence[Outcome], agrees: Judge) -> list[ReleaseResult]:
    served = Counter(outcome.release or "unknown" for outcome in students)
    disagreed = Counter(outcome.release or "unknown" for outcome in students if not agrees(outcome))
    return [
        ReleaseResult(name, count, disagreed[name], disagreed[name] / count)
        for name, count in sorted(served.items())
    ]


def _latency(answered: Sequence[Outcome]) -> dict[str, Latency]:
    by_route: dict[str, list[float]] = {}
    for outcome in answered:
        by_route.setdefault(outcome.route or "unknown", []).append(outcome.latency_s)
    return {
        route: Latency(percentile(seconds, 0.5), percentile(seconds, 0.99))
        for route, seconds in sorted(by_route.items())
    }


def percentile(values: Sequence[float], q: float) -> float:
    """Return the q-quantile by nearest rank; `values` isn't empty."""
    ordered = sorted(values)
    return ordered[max(0, -(-int(q * 1000) * len(ordered) // 1000) - 1)]


def _cost(answered: Sequence[Outcome], audited: Sequence[Exchange]) -> float | None:
    """Return the mean of what was spent, audits included; None when no cost is known."""
    known = [outcome.cost_usd for outcome in answered if outcome.cost_usd is not None]
    if not known:
        return None
    audits = sum(exchange.teacher.cost_usd or 0.0 for exchange in audited if exchange.teacher is not None)
    return sum(known) / len(known) + audits / len(answered)


def _teacher_cost(answered: Sequence[Outcome], logged: Sequence[Exchange]) -> float | None:
    """Return the mean cost of the teacher's answers: from the log, else from the headers of escalations."""
    known = [e.teacher.cost_usd for e in logged if e.teacher is not None and e.teacher.cost_usd is not None]
    if not known:
        known = [o.cost_usd for o in answered if o.route == "teacher" and o.cost_usd is not None]
    return sum(known) / len(known) if known else None
