"""What is at stake in a request, by the log: what student and teacher take and cost."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from routers.foresight_fit import Stakes
from serving.exchange import Exchange
from serving.settings import StudentSettings


def stakes_of(
    exchanges: Iterable[Exchange], student_s: Sequence[float], student: StudentSettings
) -> Stakes | None:
    """The averages, given how long the student took for its answers; None as long as one of them isn't known."""
    teachers = [
        exchange.teacher
        for exchange in exchanges
        if exchange.teacher is not None and not exchange.replayed  # then nobody was asked
    ]
    priced = [teacher for teacher in teachers if teacher.cost_usd is not None]
    if not student_s or not priced:
        return None
    seconds = float(np.mean(student_s))
    return Stakes(
        student_s=seconds,
        student_usd=seconds * student.usd_per_hour / 3600,
        teacher_s=float(np.mean([teacher.latency_s for teacher in priced])),
        teacher_usd=float(np.mean([teacher.cost_usd or 0.0 for teacher in priced])),
        waiting_usd_per_s=student.waiting_usd_per_hour / 3600,
    )
