"""What the audits of one release showed, one after the other: the one sample that nothing was chosen by."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from routers.intervals import Share, share
from routers.watch import Watch
from serving.exchange import Exchange

_MOST_POINTS = 200


@dataclass(frozen=True, slots=True)
class AuditPoint:
    """How things stood after an audit. `evidence` is the watch's e-value against the promise."""

    at: float
    audits: int
    disagreements: int
    evidence: float


@dataclass(frozen=True, slots=True)
class AuditRecord:
    """The audits of answers that a release gave, in the order the requests came.

    `disagreement` has an exact interval; `missing` ones, which got no teacher answer, count as disagreements in it.
    `pending` ones don't count yet. `alarm_at` is the evidence that withdraws the release.
    """

    audits: int
    missing: int
    pending: int
    disagreement: Share
    evidence: float
    alarm_at: float
    alarmed: bool
    points: list[AuditPoint]


def audit_record(
    exchanges: Iterable[Exchange],
    release: str,
    *,
    max_disagreement: float,
    certainty: float,
    since: float = 0.0,
) -> AuditRecord:
    """The record of `release` in a task's exchanges, oldest first.

    The watch is run over them anew, and begins once more with the request that came first after `since` (seconds since
    the epoch), for there the release went live again. Before such a request came, it has seen nothing.
    """
    watch, began = Watch(max_disagreement, certainty), False
    points: list[AuditPoint] = []
    missing = pending = 0
    outcomes: list[bool] = []
    for exchange in exchanges:
        if exchange.release != release or not _counts(exchange):
            continue
        if exchange.audit == "pending":
            pending += 1
            continue
        missing += exchange.audit == "missing"
        outcomes.append(exchange.agreement is not True)
        if exchange.created >= since and not began:
            watch, began = Watch(max_disagreement, certainty), True
        watch.observe(not outcomes[-1])
        points.append(AuditPoint(exchange.created, len(outcomes), sum(outcomes), watch.evidence))
    if not began and since > 0.0:
        watch = Watch(max_disagreement, certainty)
    return AuditRecord(
        audits=len(outcomes),
        missing=missing,
        pending=pending,
        disagreement=share(outcomes),
        evidence=watch.evidence,
        alarm_at=1.0 / (1.0 - certainty),
        alarmed=watch.alarmed,
        points=_thinned(points),
    )


def _counts(exchange: Exchange) -> bool:
    """Whether it is an audited answer of the student's, replays included (STATISTICS.md §1 and §2)."""
    return (
        exchange.eligible
        and exchange.by_student
        and exchange.audit != "none"
        and exchange.superseded_by is None
        and not exchange.cancelled
    )


def _thinned(points: list[AuditPoint]) -> list[AuditPoint]:
    """At most `_MOST_POINTS` of them, the last included."""
    if len(points) <= _MOST_POINTS:
        return points
    step = (len(points) - 1) / (_MOST_POINTS - 1)
    return [points[round(step * place)] for place in range(_MOST_POINTS)]
