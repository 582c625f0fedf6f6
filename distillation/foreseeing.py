"""Which requests the next release won't show its student, and whether that pays. Pure: no files, no clock.

Foresight is fitted on the cross-fitted ranks of all labelled rows, whether the student was asked when they came in or
not: it is computed for every one of them. So skipping blinds nothing, and no request has to be shown to the student for
the sake of learning.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from distillation.ahead import Ahead, foreseen_text
from distillation.dataset import Row
from routers.calibration import PlattCalibrator
from routers.foresight import Foresight
from routers.foresight_fit import (
    ForesightRegression,
    Skipping,
    Stakes,
    choose_skipping,
    design,
    foreseen_out_of_fold,
    shares_below,
)
from serving.exchange import Json
from serving.task_settings import TaskPolicy

LEAST_STUDENT_S = 1e-3
"""A student that answers within a millisecond isn't worth foreseeing: nobody would notice what is spared."""

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


@dataclass(slots=True)
class Foreseeing:
    """What foresight makes of the rows of one look; it is fitted only once somebody asks what for.

    `ranks` float[n] are cross-fitted, −∞ for answers that are never served; `weights` are 1/propensity, and `sampled`
    says which rows are a simple random sample of the traffic. `chosen` is where the release will stop asking its
    student: what `skipped` said last when it was given all rows.
    """

    rows: Sequence[Row]
    ranks: Floats
    weights: Floats
    sampled: Bools
    policy: TaskPolicy
    stakes: Stakes | None
    seed: int
    chosen: Skipping | None = None
    _X: Floats | None = None
    _foreseen: Floats | None = None

    @property
    def may_skip(self) -> bool:
        """Whether skipping is worth a thought: it is allowed, and the student takes time."""
        slow = self.stakes is not None and self.stakes.student_s >= LEAST_STUDENT_S
        return self.policy.student.skip == "auto" and slow

    def skipped(self, accepted: Bools, among: Bools | None) -> Bools:
        """Which rows the student isn't shown, bool[n], by which of the rows `among` (None: all) would be accepted."""
        looked_at = np.ones(len(self.rows), dtype=np.bool_) if among is None else among
        foreseen = self._out_of_fold()
        chosen = None
        if self.may_skip and self.stakes is not None and looked_at.any():
            chosen = choose_skipping(
                foreseen[looked_at],
                accepted[looked_at],
                self.sampled[looked_at],
                self.weights[looked_at],
                at_most=self.policy.student.skip_at_most,
                certainty=self.policy.certainty,
                stakes=self.stakes,
            )
        if among is None:
            self.chosen = chosen
        skipped: Bools = foreseen < (-np.inf if chosen is None else chosen.below)
        return skipped

    def before(self, accepted: Bools) -> Ahead:
        """What stands before the student of the release; `accepted` bool[n] is what the release will answer."""
        if self.chosen is None and not self.policy.student.hedge:
            return Ahead()
        foreseen = self._out_of_fold()
        if not np.isfinite(foreseen).any():
            return Ahead()
        calibrator = PlattCalibrator().fit(foreseen, accepted, self.weights)
        shares = shares_below(self.ranks, self.weights)
        with threadpool_limits(1):
            fitted = ForesightRegression().fit(self._design(), shares, self.weights)
        foresight = Foresight(
            weights=tuple(fitted.weights_.tolist()),
            bias=fitted.bias_,
            slope=calibrator.slope_,
            offset=calibrator.offset_,
            skip_below=None if self.chosen is None else self.chosen.below,
            student_s=0.0 if self.stakes is None else self.stakes.student_s,
        )
        below = -np.inf if self.chosen is None else self.chosen.below
        left_out = zip(self.rows, foreseen, strict=True)
        return Ahead(foresight, {row.id: float(share) for row, share in left_out if share < below})

    def report(self, accepted: Bools) -> Json:
        """What a report card says of skipping; `accepted` bool[n] is what will be answered.

        Shares are of the traffic, seconds and USD a request, on average.
        """
        card: Json = {"on": self.chosen is not None, "why": self._why(accepted)}
        if self.stakes is not None:
            card |= {
                "student_s": self.stakes.student_s,
                "student_usd": self.stakes.student_usd,
                "teacher_s": self.stakes.teacher_s,
                "teacher_usd": self.stakes.teacher_usd,
                "at_best_usd": self._at_best_usd(accepted),
            }
        if self.chosen is not None and self.stakes is not None:
            card |= {
                "skipped": self.chosen.skipped,
                "lost": self.chosen.lost,
                "of": self.chosen.of,
                "lost_at_most": self.chosen.lost_at_most,
                "spared_s": self.chosen.skipped * self.stakes.student_s,
                "worth_usd": self.chosen.worth_usd,
            }
        return card

    def _why(self, accepted: Bools) -> str:
        stakes, student = self.stakes, self.policy.student
        if student.skip == "never":
            return 'student.skip is "never"'
        if stakes is None:
            return "the log knows no student's time yet, or no price of the teacher's"
        if stakes.student_s < LEAST_STUDENT_S:
            return (
                f"the student takes {stakes.student_s * 1e3:.2f} ms: at best, skipping all that is escalated and "
                f"nothing else, it would be worth {self._at_best_usd(accepted) * 1e6:+.3f} USD per million requests"
            )
        if not accepted.any():
            return "no level passed"
        if self.chosen is None:
            return (
                "no kind of request is escalated so surely that leaving out the student pays and loses at most "
                f"{student.skip_at_most:.1%} of what it would answer"
            )
        return "it pays"

    def _at_best_usd(self, accepted: Bools) -> float:
        escalated = float(self.weights[~accepted].sum() / self.weights.sum())
        return 0.0 if self.stakes is None else self.stakes.worth(escalated, 0.0)

    def _design(self) -> Floats:
        if self._X is None:
            self._X = design([foreseen_text(row) for row in self.rows])
        return self._X

    def _out_of_fold(self) -> Floats:
        if self._foreseen is None:
            shares = shares_below(self.ranks, self.weights)
            with threadpool_limits(1):  # the other cores are the gateway's
                self._foreseen = foreseen_out_of_fold(self._design(), shares, self.weights, seed=self.seed)
        return self._foreseen
