"""How a release's answers compare with the teacher's, and with the truth where it is known: measures of one sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from routers.frontier import Frontier, frontier, oracle_frontier
from routers.intervals import Share, effective, share
from routers.measures import (
    Bin,
    Slice,
    accept,
    aurc,
    expected_calibration_error,
    reliability,
    risk_coverage,
    select,
    worst_slices,
)
from routers.newton import sigmoid
from serving.exchange import Json

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

_COVERAGES = np.linspace(0.05, 1.0, 20)
_CALLS = np.linspace(0.0, 1.0, 101)
_CONFIDENCES = np.linspace(0.0, 1.0, 21)


@dataclass(frozen=True, slots=True)
class Sample:
    """Answers of one release that can be judged, all arrays of length n.

    `ranks` are the log-odds of agreement (−∞: can't be ranked), `barred` says which answers the router passes on
    whatever their rank, `accepted` which it serves, `keys` what they are (None: not to be told apart). `agreed` is with
    the teacher; a missing label is False. `weights` are 1/propensity. `student_right` and `teacher_right` are by the
    truth, None where it isn't known.
    """

    ranks: Floats
    barred: Bools
    accepted: Bools
    keys: Sequence[str | None]
    agreed: Bools
    weights: Floats
    student_right: Bools | None = None
    teacher_right: Bools | None = None


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Shares of answers that are right.

    `student` and `teacher` are of each alone, `served` of both together as the release divides the requests;
    `student_where_served` and `teacher_where_served` are of the requests that the student answers.
    """

    student: Share
    teacher: Share
    served: Share
    student_where_served: Share
    teacher_where_served: Share


@dataclass(frozen=True, slots=True)
class Ranking:
    """RouteLLM's measures of a ranking (see `routers.frontier`); None where the teacher is no better."""

    apgr: float | None
    cpt50: float | None
    cpt80: float | None

    @classmethod
    def of(cls, curve: Frontier) -> Ranking:
        """The measures of one frontier."""
        return cls(curve.apgr(), curve.cpt(0.5), curve.cpt(0.8))


@dataclass(frozen=True, slots=True)
class CoverageLevel:
    """What a threshold that answers about so much would do. `threshold` is a confidence."""

    coverage: float
    threshold: float
    disagreement: Share


@dataclass(frozen=True, slots=True)
class ConfidenceCount:
    """The share of the traffic with a confidence from `low` to `high`, served by the student and passed on."""

    low: float
    high: float
    served: float
    passed_on: float


@dataclass(frozen=True, slots=True)
class Judgement:
    """Every measure of one sample; `docs/evaluation.md` says what each means.

    `labels` are as good as `effective` ones of equal weight. `quality` names what `ranking` and the frontiers are
    about: `gold` where the truth is known, else `agreement`. The frontiers are points (teacher calls, quality).
    """

    labels: int
    effective: float
    agreement: Share
    coverage: Share
    disagreement: Share
    accuracy: Accuracy | None
    quality: str
    aurc: float
    aurc_best: float
    ranking: Ranking
    ranking_best: Ranking
    ece: float
    ece_equal_width: float
    reliability: list[Bin]
    levels: list[CoverageLevel]
    frontier: list[tuple[float, float]]
    frontier_best: list[tuple[float, float]]
    confidences: list[ConfidenceCount]
    worst_answers: list[Slice]

    def to_json(self) -> Json:
        """The judgement as plain JSON."""
        return asdict(self)


def judge(sample: Sample) -> Judgement | None:
    """Measure a sample; None if it is empty."""
    if len(sample.ranks) == 0:
        return None
    agreed, weights = sample.agreed, sample.weights
    confidence = sigmoid(sample.ranks)
    served = accept(sample.accepted, agreed, weights)
    student, teacher, quality = agreed.astype(np.float64), np.ones(len(agreed)), "agreement"
    if sample.student_right is not None and sample.teacher_right is not None:
        student, teacher, quality = (
            sample.student_right.astype(np.float64),
            sample.teacher_right.astype(np.float64),
            "gold",
        )
    found = frontier(sample.ranks, student, teacher, weights)
    best = oracle_frontier(student, teacher, weights)
    bins = reliability(confidence, agreed, weights)
    return Judgement(
        labels=len(agreed),
        effective=effective(weights),
        agreement=share(agreed, weights),
        coverage=served.coverage,
        disagreement=served.risk,
        accuracy=_accuracy(sample),
        quality=quality,
        aurc=aurc(sample.ranks, agreed, weights) or 0.0,
        aurc_best=aurc(agreed, agreed, weights) or 0.0,
        ranking=Ranking.of(found),
        ranking_best=Ranking.of(best),
        ece=expected_calibration_error(bins) or 0.0,
        ece_equal_width=expected_calibration_error(
            reliability(confidence, agreed, weights, kind="equal_width")
        )
        or 0.0,
        reliability=bins,
        levels=_levels(sample),
        frontier=[(float(calls), found.at(calls)) for calls in _CALLS],
        frontier_best=[(float(calls), best.at(calls)) for calls in _CALLS],
        confidences=_confidences(confidence, sample),
        worst_answers=_worst_answers(sample),
    )


def _worst_answers(sample: Sample) -> list[Slice]:
    told = [
        (place, key) for place, key in enumerate(sample.keys) if key is not None and sample.accepted[place]
    ]
    places = np.array([place for place, _ in told], dtype=np.intp)
    return worst_slices([key for _, key in told], sample.agreed[places], sample.weights[places])


def _accuracy(sample: Sample) -> Accuracy | None:
    student, teacher, weights = sample.student_right, sample.teacher_right, sample.weights
    if student is None or teacher is None:
        return None
    taken = sample.accepted
    return Accuracy(
        student=share(student, weights),
        teacher=share(teacher, weights),
        served=share(np.where(taken, student, teacher), weights),
        student_where_served=share(student[taken], weights[taken]),
        teacher_where_served=share(teacher[taken], weights[taken]),
    )


def _levels(sample: Sample) -> list[CoverageLevel]:
    ranks = np.where(sample.barred, -np.inf, sample.ranks)
    curve = risk_coverage(ranks, sample.agreed, sample.weights)
    levels: list[CoverageLevel] = []
    for coverage in _COVERAGES:
        place = int(np.searchsorted(curve.coverage, coverage - 1e-9))
        if place >= len(curve.coverage):
            break
        cut = float(curve.threshold[place])
        threshold = float(sigmoid(np.array([cut]))[0])
        if levels and levels[-1].threshold == threshold:
            continue
        risk = select(ranks, sample.agreed, cut, sample.weights).risk
        levels.append(CoverageLevel(float(curve.coverage[place]), threshold, risk))
    return levels


def _confidences(confidence: Floats, sample: Sample) -> list[ConfidenceCount]:
    shares = sample.weights / sample.weights.sum()
    served, passed_on = (
        np.histogram(confidence[which], _CONFIDENCES, weights=shares[which])[0]
        for which in (sample.accepted, ~sample.accepted)
    )
    return [
        ConfidenceCount(float(low), float(high), float(taken), float(rest))
        for (low, high), taken, rest in zip(pairwise(_CONFIDENCES), served, passed_on, strict=True)
    ]
