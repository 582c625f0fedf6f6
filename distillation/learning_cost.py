"""What learning costs: the cores that it keeps busy, and the answers that it asks a student for."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

from serving.exchange import Json, StudentAnswer
from serving.student_choice import StudentChoice
from serving.student_price import StudentPrices
from serving.student_settings import StudentSettings


@dataclass(frozen=True, slots=True)
class LearningCost:
    """What so many looks took: seconds of cores here, seconds of what a student that was asked runs on, and USD."""

    looks: int
    core_s: float
    student_s: float
    usd: float

    @classmethod
    def of(
        cls,
        core_s: float,
        asked: Sequence[StudentAnswer],
        student: StudentSettings,
        choice: StudentChoice,
    ) -> LearningCost:
        """That of one look, for which the student was `asked` for these answers."""
        prices = StudentPrices(student)
        return cls(
            looks=1,
            core_s=core_s,
            student_s=sum(answer.took_s for answer in asked),
            usd=core_s * student.usd_per_hour / 3600
            + sum(prices.usd(answer, choice.kind, choice) for answer in asked),
        )

    def to_json(self) -> Json:
        """As the journal and the report card hold it."""
        return asdict(self)


def core_seconds() -> float:
    """CPU time that this process and those of its children that have ended have used so far, all threads together."""
    return sum(os.times()[:4])


def all_of(entries: Iterable[Json]) -> LearningCost | None:
    """What the looks of a journal took together, as far as they say so; None: none does."""
    found = [cost for entry in entries if (cost := _read(entry.get("learning"))) is not None]
    if not found:
        return None
    return LearningCost(
        looks=sum(cost.looks for cost in found),
        core_s=sum(cost.core_s for cost in found),
        student_s=sum(cost.student_s for cost in found),
        usd=sum(cost.usd for cost in found),
    )


def _read(data: object) -> LearningCost | None:
    if not isinstance(data, dict):
        return None
    try:
        cost = LearningCost(
            int(data["looks"]), float(data["core_s"]), float(data["student_s"]), float(data["usd"])
        )
    except (KeyError, TypeError, ValueError, OverflowError):
        return None
    return cost if math.isfinite(cost.core_s + cost.student_s + cost.usd) else None
