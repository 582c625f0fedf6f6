"""One look: may a student fitted on today's labels go live, and from which confidence on? Pure: no files, no clock.

`understudy learn` and the simulator both come through here, so what is simulated is what is done.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from distillation.ahead import Ahead
from distillation.cross_fit import cross_fit
from distillation.dataset import Dataset
from distillation.features import FeaturesOf
from distillation.foreseeing import Foreseeing
from distillation.hopeless import Early, Hopeless, find_hopeless
from distillation.linear_training import TermCounts
from distillation.named_answers import answer_terms
from distillation.past import Past, PastRelease, propensity_of
from distillation.refused import Refused
from distillation.scored import Scored
from routers.admission import AnswerTerms, Verdict, admit
from routers.drift import Spread
from routers.foresight_fit import Stakes
from routers.held_out import HeldOutConfidence
from routers.looks import spent
from routers.newton import sigmoid
from routers.promise import Promise
from routers.router import Router
from serving.closed_answers import ClosedStudent
from serving.exchange import Json
from serving.task_settings import TaskPolicy

R_co = TypeVar("R_co", bound=Past, covariant=True)

HeldOut = dict[str, tuple[float, str | None]]
"""The rank and answer key with which each row was tested, by the row's id; −∞: it can't be accepted."""

AsRelease = Callable[[Router, HeldOut, float | None, Ahead, Refused], R_co]
"""Makes a release of a router, what was held out, the rank below which generations are given up, what stands before its
student, and which rows other rows' vetoes refuse."""


@dataclass(frozen=True, slots=True)
class Look(Generic[R_co]):
    """What a look found. `candidate` is the release to be, None when nothing passed.

    `delta` is what the look spent, `verdict` says on what, under the owner's `terms`. `coverage` is the share of all
    traffic that would be answered, by the rules the release has; `agreement` the share on which students that hadn't
    seen the rows agree with the teacher (both weighted by 1/propensity). `losses` is the cross-validated log-loss of
    each model of confidence that was tried, `model` the one that was chosen. `hopeless` says which generations would be
    given up, `skipping` which requests the student wouldn't be shown, and why (`distillation.foreseeing`). `spread` is
    how confidence is distributed over all traffic that has one, None without any.
    """

    number: int
    labels: int
    delta: float
    terms: AnswerTerms
    verdict: Verdict
    coverage: float | None
    agreement: float
    model: str
    losses: Mapping[str, float]
    hopeless: Hopeless
    candidate: R_co | None
    skipping: Json
    spread: Spread | None


def take_look(
    dataset: Dataset,
    past: Mapping[str, Past],
    policy: TaskPolicy,
    *,
    number: int,
    seed: int,
    stakes: Stakes | None = None,
    features_of: FeaturesOf = TermCounts,
    progress: Callable[[str], None] = lambda _: None,
) -> Look[PastRelease]:
    """Fit linear students, score out of fold, and test the promise with what look `number` may spend.

    `past` holds every release the dataset's traffic met (see `Dataset.without_period`). `seed` deals folds and thins.
    `stakes` is what an answer of student and teacher takes and costs; None: not known, so that nothing is skipped.
    `features_of` makes of the texts what students are fitted to. The dataset is what a student sees that sees as
    `policy` says. Raises ValueError when there is nothing to learn
    from.
    """
    fitted = cross_fit(
        dataset.rows, seed=seed, sees=policy.student.sees, features_of=features_of, progress=progress
    )

    release = partial(closed_release, fitted.student)
    return judge(
        dataset, fitted, release, past, policy, number=number, seed=seed, stakes=stakes, progress=progress
    )


def closed_release(
    student: ClosedStudent,
    router: Router,
    held_out: HeldOut,
    _: float | None = None,
    ahead: Ahead | None = None,
    refused: Refused | None = None,
    *,
    taught: frozenset[str] = frozenset(),
) -> PastRelease:
    """A release of a student with a closed answer space. Rows that can't be accepted aren't remembered.

    `taught` are the ids of what trained a student that wasn't cross-fitted.
    """
    known = {id: (rank, key) for id, (rank, key) in held_out.items() if key is not None and np.isfinite(rank)}
    return PastRelease(student, router, known, ahead or Ahead(), refused or Refused(), taught)


def judge(
    dataset: Dataset,
    fitted: Scored,
    as_release: AsRelease[R_co],
    past: Mapping[str, Past],
    policy: TaskPolicy,
    *,
    number: int,
    seed: int,
    early: Sequence[Early] = (),
    stakes: Stakes | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> Look[R_co]:
    """Test the promise of a student whose answers to the dataset's rows are `fitted`, as `take_look` does.

    `early` is what was known at the checkpoints before they are judged. Which generations are given up there is learned
    without their labels and tested with the rest: given up is escalated.
    """
    propensity = propensity_of(dataset, past)
    delta = spent(number, 1.0 - policy.certainty)
    terms = answer_terms(policy)
    progress("fitting its confidence")
    held_out_confidence = rank_held_out(fitted, 1.0 / propensity, seed)
    estimator = held_out_confidence.estimator_
    ranks = held_out_confidence.ranks(fitted.scores, fitted.signals, fitted.predicted)
    hopeless = find_hopeless(
        held_out_confidence, early, ranks, policy.max_disagreement, propensity, seed=seed
    )
    ranks = np.where(hopeless.given_up, -np.inf, ranks)
    progress("testing the promise")
    sampled = Promise(policy.max_disagreement, policy.certainty, seed=seed).sample(propensity)
    # Answers that always go to the teacher are never served: they rank below everything.
    served = np.where([key in terms.always_escalate for key in fitted.predicted], -np.inf, ranks)
    ahead = Foreseeing(dataset.rows, served, 1.0 / propensity, sampled, policy, stakes, seed)
    verdict = admit(
        ranks,
        fitted.predicted,
        fitted.agreed,
        propensity,
        max_disagreement=policy.max_disagreement,
        delta=delta,
        level=1.0 - policy.certainty,
        terms=terms,
        seed=seed,
        skipping=ahead.skipped if ahead.may_skip else None,
    )
    candidate, coverage = None, None
    if verdict.passed:
        coverage = float(np.average(verdict.accepted, weights=1.0 / propensity))
        held_out = held_out_of(dataset, ranks, fitted)
        router = Router(
            estimator.confidence_,
            verdict.rank_threshold,
            always_escalate=terms.always_escalate,
            vetoed=verdict.vetoed,
            unproven=verdict.unproven,
            proven=verdict.proven,
        )
        refused = Refused(
            frozenset(row.id for row, one in zip(dataset.rows, verdict.refused, strict=True) if one)
        )
        candidate = as_release(router, held_out, hopeless.below, ahead.before(verdict.accepted), refused)
    return Look(
        number=number,
        labels=len(dataset.rows),
        delta=delta,
        terms=terms,
        verdict=verdict,
        coverage=coverage,
        agreement=float(np.average(fitted.agreed, weights=1.0 / propensity)),
        model=estimator.confidence_.model,
        losses=estimator.losses_,
        hopeless=hopeless,
        candidate=candidate,
        skipping=ahead.report(verdict.accepted),
        spread=spread_of(ranks, propensity),
    )


def spread_of(ranks: NDArray[np.float64], propensity: NDArray[np.float64]) -> Spread | None:
    """How what people read of ranks is distributed over the traffic that has one.

    What a student can't read, a text that is too long, has none when it is served either: nothing is followed of it.
    """
    ranked = np.isfinite(ranks)
    if not ranked.any():
        return None
    return Spread.of(sigmoid(ranks[ranked]), 1.0 / propensity[ranked])


def rank_held_out(fitted: Scored, weights: NDArray[np.float64], seed: int) -> HeldOutConfidence:
    """The confidence to be released, and those that rank rows whose labels they haven't seen."""
    with threadpool_limits(1):  # small matrices: threads that wait for one another cost more than they save
        return HeldOutConfidence(seed=seed).fit(
            fitted.scores, fitted.signals, fitted.predicted, fitted.agreed, weights
        )


def held_out_of(dataset: Dataset, ranks: NDArray[np.float64], fitted: Scored) -> HeldOut:
    """How the dataset's rows were ranked and answered, by their ids."""
    return {
        row.id: (float(rank), key)
        for row, rank, key in zip(dataset.rows, ranks, fitted.predicted, strict=True)
    }
