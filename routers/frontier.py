"""What quality costs: the share of requests passed to the teacher against the quality of all answers.

The measures are RouteLLM's (Ong et al., arXiv 2406.18665). With M_r(c) the quality when the share c of the traffic,
the least confident first, goes to the teacher:

- performance gap recovered, PGR(c) = (M_r(c) − student) / (teacher − student)
- APGR, its area over c from 0 to 1. As in their code by the trapezoidal rule at c = 0, 10, …, 100 %, so that figures
  compare; the curve itself is exact
- CPT(x), the least share of calls with PGR(c) ≥ x

A *quality* float[n] is of one answer each: 1 where it is right (or agrees with the teacher), else 0, or any number
that is better when larger. Confidence and weight are as in `routers.measures`; equal confidences are passed on
together, in a random order.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

_STEPS = 10


@dataclass(frozen=True, slots=True)
class Frontier:
    """The quality at every share of teacher calls, both float[k] and straight lines in between.

    `calls` rises from 0 (the student alone) to 1 (the teacher alone).
    """

    calls: Floats
    quality: Floats

    @property
    def student(self) -> float:
        """The quality of the student alone."""
        return float(self.quality[0])

    @property
    def teacher(self) -> float:
        """The quality of the teacher alone."""
        return float(self.quality[-1])

    def at(self, calls: float) -> float:
        """The quality when the share `calls` of the traffic goes to the teacher."""
        return float(np.interp(calls, self.calls, self.quality))

    def recovered(self) -> Floats | None:
        """PGR at each of `calls`. None where the teacher is no better than the student: there is no gap."""
        gap = self.teacher - self.student
        return (self.quality - self.student) / gap if gap > 0.0 else None

    def apgr(self) -> float | None:
        """The average performance gap recovered; ½ is what a random order gets. None without a gap."""
        recovered = self.recovered()
        if recovered is None:
            return None
        steps = np.linspace(0.0, 1.0, _STEPS + 1)
        return float(np.trapezoid(np.interp(steps, self.calls, recovered), steps))

    def cpt(self, recovered_share: float) -> float | None:
        """CPT(x): the least share of calls that recovers x of the gap, from 0 to 1. None without a gap."""
        recovered = self.recovered()
        if recovered is None:
            return None
        enough = np.flatnonzero(recovered >= recovered_share - 1e-12)
        last = int(enough[0])  # the teacher alone recovers all of it, so there is one
        if last == 0:
            return 0.0
        low, high = float(recovered[last - 1]), float(recovered[last])
        left, right = float(self.calls[last - 1]), float(self.calls[last])
        return min(right, left + (recovered_share - low) / (high - low) * (right - left))


def frontier(
    confidence: ArrayLike,
    student_quality: ArrayLike,
    teacher_quality: ArrayLike,
    weight: ArrayLike | None = None,
) -> Frontier:
    """The frontier of a ranking. Raises ValueError for arrays that don't fit together, or without labels."""
    scores = np.asarray(confidence, dtype=np.float64)
    student = np.asarray(student_quality, dtype=np.float64)
    teacher = np.asarray(teacher_quality, dtype=np.float64)
    weights = np.ones(scores.shape) if weight is None else np.asarray(weight, dtype=np.float64)
    if (
        scores.ndim != 1
        or len(scores) == 0
        or len({a.shape for a in (scores, student, teacher, weights)}) > 1
    ):
        raise ValueError(
            "confidence, qualities and weight must be one-dimensional, equally long and not empty, "
            f"got shapes {scores.shape}, {student.shape}, {teacher.shape} and {weights.shape}"
        )
    if not (np.isfinite(student) & np.isfinite(teacher) & np.isfinite(weights) & (weights > 0.0)).all():
        raise ValueError("qualities must be finite, and weights finite and above 0")
    scores = np.where(np.isfinite(scores), scores, -np.inf)
    levels, level = np.unique(scores, return_inverse=True)
    mass = np.bincount(level, weights=weights, minlength=len(levels))
    gain = np.bincount(level, weights=weights * (teacher - student), minlength=len(levels))
    total = mass.sum()
    calls = np.concatenate([[0.0], np.cumsum(mass) / total])
    quality = float(np.average(student, weights=weights)) + np.concatenate([[0.0], np.cumsum(gain) / total])
    calls[-1], quality[-1] = 1.0, float(np.average(teacher, weights=weights))
    return Frontier(calls, quality)


def oracle_frontier(
    student_quality: ArrayLike, teacher_quality: ArrayLike, weight: ArrayLike | None = None
) -> Frontier:
    """The best frontier there can be: passed on first is what gains most by it, as if that were known beforehand."""
    student = np.asarray(student_quality, dtype=np.float64)
    return frontier(student - np.asarray(teacher_quality, dtype=np.float64), student, teacher_quality, weight)
