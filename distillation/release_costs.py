"""What a thousand requests cost with the teacher alone and with a release before it, by the log's real costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from distillation.dataset import Row
from distillation.economics import cost_of
from distillation.judgement import Bools, Floats
from serving.exchange import Exchange


@dataclass(frozen=True, slots=True)
class Costs:
    """USD per thousand requests; None where no price is known.

    The first three are projections on all traffic, without a cache: what the teacher asked for each labelled request,
    weighted by 1/propensity, is counted for all of them (`teacher_only`), for those that the release passes on plus
    what the student takes for every request (`with_student`), and plus what audits at `audit_rate` take
    (`with_audits`). `measured` is what the `requests` cost that came while the release was live: cache, audits and
    failures included. `unpriced` counts labels whose teacher's answer has no price.
    """

    teacher_only: float | None
    with_student: float | None
    with_audits: float | None
    audit_rate: float
    measured: float | None
    requests: int
    unpriced: int


def release_costs(
    exchanges: Sequence[Exchange],
    release: str,
    rows: Sequence[Row],
    accepted: Bools,
    weights: Floats,
    audit_rate: float,
) -> Costs:
    """The costs of `release`, which would serve the student's answer to the `accepted` ones of the labelled `rows`."""
    by_id: Mapping[str, Exchange] = {exchange.id: exchange for exchange in exchanges}
    prices = np.array([_teacher_price(by_id[row.id]) for row in rows], dtype=np.float64)
    known = np.isfinite(prices)
    met = [exchange for exchange in exchanges if exchange.release == release]
    answers = [e.student for e in met if e.student is not None and not e.replayed]
    student = sum(answer.cost_usd or 0.0 for answer in answers) / len(answers) if answers else 0.0
    teacher_only = with_student = with_audits = None
    if known.any():
        paid, share = prices[known], weights[known] / weights[known].sum()
        served = float((paid * share)[accepted[known]].sum())
        teacher_only = 1000.0 * float(paid @ share)
        with_student = teacher_only - 1000.0 * served + 1000.0 * student
        with_audits = with_student + 1000.0 * audit_rate * served
    return Costs(
        teacher_only=teacher_only,
        with_student=with_student,
        with_audits=with_audits,
        audit_rate=audit_rate,
        measured=1000.0 * sum(map(cost_of, met)) / len(met) if met and known.any() else None,
        requests=len(met),
        unpriced=sum(by_id[row.id].teacher is not None and not k for row, k in zip(rows, known, strict=True)),
    )


def _teacher_price(exchange: Exchange) -> float:
    """What the teacher asked for its answer; NaN where it gave none or no price is known."""
    if exchange.teacher is None or exchange.teacher.cost_usd is None:
        return float("nan")
    return exchange.teacher.cost_usd
