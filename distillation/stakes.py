"""What is at stake in a request, by the log: what student and teacher take and cost."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from routers.foresight_fit import Stakes
from serving.exchange import Exchange, StudentAnswer
from serving.student_choice import StudentChoice
from serving.student_price import StudentPrices
from serving.student_settings import StudentSettings


def stakes_of(
    exchanges: Iterable[Exchange],
    given: Sequence[StudentAnswer],
    student: StudentSettings,
    choice: StudentChoice,
) -> Stakes | None:
    """The averages, by the answers a student has `given`; None as long as one of them isn't known.

    A client waits for the whole of an answer, and pays for its share of what the student runs on.
    """
    teachers = [
        exchange.teacher
        for exchange in exchanges
        if exchange.teacher is not None and not exchange.replayed  # then nobody was asked
    ]
    priced = [teacher for teacher in teachers if teacher.cost_usd is not None]
    if not given or not priced:
        return None
    prices = StudentPrices(student)
    return Stakes(
        student_s=float(np.mean([answer.latency_s for answer in given])),
        student_usd=float(np.mean([prices.usd(answer, choice.kind, choice) for answer in given])),
        teacher_s=float(np.mean([teacher.latency_s for teacher in priced])),
        teacher_usd=float(np.mean([teacher.cost_usd or 0.0 for teacher in priced])),
        waiting_usd_per_s=student.waiting_usd_per_hour / 3600,
    )
