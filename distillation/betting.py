"""Learning with `admission = "e-process"`: a candidate is fixed, and labels that come afterwards test it, one by one.

Pure: no files, no clock. `understudy learn` and the simulator both come through here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import numpy as np

from distillation.candidate import Candidate
from distillation.cross_fit import cross_fit
from distillation.dataset import Dataset, Row
from distillation.features import FeaturesOf
from distillation.gate import Look, closed_release, held_out_of, rank_held_out, spread_of
from distillation.hopeless import Hopeless
from distillation.linear_training import TermCounts
from distillation.named_answers import answer_terms
from distillation.past import Past, PastRelease, propensity_of
from routers.candidate import bet, fix_levels
from routers.looks import spent
from routers.router import Router
from serving.task_settings import TaskPolicy


def freeze(
    dataset: Dataset,
    past: Mapping[str, Past],
    policy: TaskPolicy,
    *,
    number: int,
    serial: int,
    after: float,
    features_of: FeaturesOf = TermCounts,
    progress: Callable[[str], None] = lambda _: None,
) -> Candidate:
    """Fix a candidate by everything known at the time `after`. Arguments otherwise as those of `take_look`."""
    fitted = cross_fit(
        dataset.rows, seed=serial, sees=policy.student.sees, features_of=features_of, progress=progress
    )
    propensity = propensity_of(dataset, past)
    confidence = rank_held_out(fitted, 1.0 / propensity, serial)
    ranks = confidence.ranks(fitted.scores, fitted.signals, fitted.predicted)
    terms = answer_terms(policy)
    levels = fix_levels(
        ranks,
        fitted.predicted,
        fitted.agreed,
        propensity,
        max_disagreement=policy.max_disagreement,
        delta=spent(number, 1.0 - policy.certainty),
        level=1.0 - policy.certainty,
        terms=terms,
        seed=serial,
    )
    router = Router(confidence.estimator_.confidence_, np.inf, always_escalate=terms.always_escalate)
    release = closed_release(fitted.student, router, held_out_of(dataset, ranks, fitted))
    return Candidate(release, levels, number, len(dataset.rows), after, serial)


def peek(candidate: Candidate, dataset: Dataset, policy: TaskPolicy) -> Look[PastRelease]:
    """What the labels say of it that came after it was fixed. May be asked as often as one likes.

    The look's `candidate` is the release to be: None where no level has passed, or none but those that are out.
    """
    rows: list[Row] = []
    answers = []
    for row in dataset.rows:
        redone = candidate.release.redo(row) if row.created > candidate.after else None
        if redone is not None:
            rows.append(row)
            answers.append(redone)
    delta = spent(candidate.number, 1.0 - policy.certainty)
    terms = answer_terms(policy)
    agreed = np.array([one.agreed for one in answers], dtype=np.bool_)
    propensity = np.array([row.propensity for row in rows], dtype=np.float64)
    verdict = bet(
        candidate.levels,
        np.array([one.rank for one in answers], dtype=np.float64),
        [one.key for one in answers],
        agreed,
        propensity,
        np.array([row.least_propensity for row in rows], dtype=np.float64),
        max_disagreement=policy.max_disagreement,
        delta=delta,
        level=1.0 - policy.certainty,
        terms=terms,
        seed=candidate.serial,
    )
    router = replace(
        candidate.release.router,
        rank_threshold=verdict.rank_threshold,
        vetoed=verdict.vetoed,
        unproven=verdict.unproven,
        proven=verdict.proven,
    )
    weights = partial(np.average, weights=1.0 / propensity)
    return Look(
        number=candidate.number,
        labels=len(rows),
        delta=delta,
        terms=terms,
        verdict=verdict,
        coverage=float(weights(verdict.accepted)) if verdict.passed else None,
        agreement=float(weights(agreed)) if rows else 0.0,
        model=router.confidence.model,
        losses={},
        hopeless=Hopeless(None, np.zeros(len(rows), bool), np.full(len(rows), -1, np.int64), 0.0),
        skipping={
            "on": False,
            "why": "a candidate's rules are fixed before it is tested, and this is none of them",
        },
        spread=spread_of(np.array([one.rank for one in answers], dtype=np.float64), propensity),
        candidate=replace(candidate.release, router=router)
        if verdict.passed and router != candidate.served
        else None,
    )
