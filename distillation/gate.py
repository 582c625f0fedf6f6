"""One look: may a student fitted on today's labels go live, and from which confidence on? Pure: no files, no clock.

`understudy learn` and the simulator both come through here, so what is simulated is what is done.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Generic, TypeVar

import numpy as np

from distillation.cross_fit import cross_fit
from distillation.dataset import Dataset
from distillation.past import Past, PastRelease, propensity_of
from distillation.scored import Scored
from routers.calibration import PlattCalibrator
from routers.confidence import Confidence
from routers.looks import spent, tested_grid
from routers.promise import Admission, Promise
from routers.router import Router
from serving.agreement import comparison
from serving.settings import TaskPolicy

R_co = TypeVar("R_co", bound=Past, covariant=True)

AsRelease = Callable[[Router, Mapping[str, tuple[float, str]]], R_co]
"""Makes a release of a router and the rank and answer key of each row it was fitted on, by the row's id."""


@dataclass(frozen=True, slots=True)
class Look(Generic[R_co]):
    """What a look found. `candidate` is the release to be, None when no level passed.

    `delta` is what the look spent. `coverage` is the share of all traffic at or above the threshold: the level's
    own, or more where scores tie (a student with a single answer scores all texts the same). `agreement` is the
    share of all traffic on which the cross-fitted students agree with the teacher (weighted by 1/propensity);
    `worst` the answers the student gives that agree least often.
    """

    number: int
    labels: int
    delta: float
    admission: Admission
    coverage: float | None
    agreement: float
    worst: list[tuple[str, int, float]]
    candidate: R_co | None


def take_look(
    dataset: Dataset,
    past: Mapping[str, Past],
    policy: TaskPolicy,
    *,
    number: int,
    seed: int,
    progress: Callable[[str], None] = lambda _: None,
) -> Look[PastRelease]:
    """Fit linear students, score out of fold, and test the promise with what look `number` may spend.

    `past` holds every release the dataset's traffic met (see `Dataset.without_period`). `seed` deals folds and thins.
    The dataset is what a student sees that sees as `policy` says. Raises ValueError when there is nothing to learn
    from.
    """
    fitted = cross_fit(dataset.rows, seed=seed, sees=policy.student.sees, progress=progress)
    release = partial(PastRelease, fitted.student)
    return judge(dataset, fitted, release, past, policy, number=number, seed=seed, progress=progress)


def judge(
    dataset: Dataset,
    fitted: Scored,
    as_release: AsRelease[R_co],
    past: Mapping[str, Past],
    policy: TaskPolicy,
    *,
    number: int,
    seed: int,
    progress: Callable[[str], None] = lambda _: None,
) -> Look[R_co]:
    """Test the promise of a student whose answers to the dataset's rows are `fitted`, as `take_look` does."""
    propensity = propensity_of(dataset, past)
    delta = spent(number, 1.0 - policy.certainty)
    forbidden = _forbidden(policy)
    calibrator = PlattCalibrator().fit(fitted.scores, fitted.agreed, 1.0 / propensity)
    confidence = Confidence.of_score(calibrator.slope_, calibrator.offset_)
    ranks = confidence.ranks(fitted.scores, fitted.signals, fitted.predicted)
    # Answers that always go to the teacher are never served: they rank below everything.
    served = np.where([key in forbidden for key in fitted.predicted], -np.inf, ranks)
    progress("testing the promise")
    promise = Promise(policy.max_disagreement, 1.0 - delta, seed=seed)
    grid = tested_grid(float((propensity.min() / propensity).sum()), promise.least_accepted)
    admission = promise.admit(served, fitted.agreed, propensity=propensity, grid=grid)
    candidate, coverage = None, None
    if admission.threshold is not None:
        coverage = float(np.average(served >= admission.threshold, weights=1.0 / propensity))
        held_out = {
            row.id: (float(rank), key)
            for row, rank, key in zip(dataset.rows, ranks, fitted.predicted, strict=True)
            if np.isfinite(rank)
        }
        candidate = as_release(Router(confidence, admission.threshold, forbidden), held_out)
    return Look(
        number=number,
        labels=len(dataset.rows),
        delta=delta,
        admission=admission,
        coverage=coverage,
        agreement=float(np.average(fitted.agreed, weights=1.0 / propensity)),
        worst=_worst(fitted),
        candidate=candidate,
    )


def _forbidden(policy: TaskPolicy) -> frozenset[str]:
    """The answers that only the teacher may give, in the normal form answers are compared in."""
    comparing = comparison(policy.agreement)
    written = [[{"message": {"content": text}, "finish_reason": "stop"}] for text in policy.always_escalate]
    return frozenset(key for key in map(comparing.key, written) if key is not None)


def _worst(fitted: Scored, most: int = 10) -> list[tuple[str, int, float]]:
    """The student's answers that agree least: (answer, times given, share that agreed), worst first."""
    given = Counter(fitted.predicted)
    agreed = Counter(key for key, ok in zip(fitted.predicted, fitted.agreed, strict=True) if ok)
    shares = [(key, count, agreed[key] / count) for key, count in given.items() if count >= 5]
    return sorted(shares, key=lambda item: (item[2], -item[1], item[0]))[:most]
