"""The report card: what was tested, what was spent, what passed and why. It goes live with the release."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict

from distillation.dataset import Dataset
from distillation.gate import Look
from distillation.outlook import labels_per_hour, shortfalls
from distillation.past import Past
from distillation.teachers import requested_of
from routers.evalues import betting_tail
from routers.looks import spent, unseen_chance
from routers.promise import binomial_tail
from serving.exchange import Json
from serving.task_settings import TaskPolicy

_MOST_SLICES = 100


def report_card(look: Look[Past], dataset: Dataset, policy: TaskPolicy, *, releases_so_far: int) -> Json:
    """The card of a look, passed or not, as JSON. `releases_so_far` doesn't count the one this look may make.

    `slices` are the answers that aren't named in `prove`, the worst first, at most 100 of them. `short` says what
    missed its test by how many labels, and when they will be there (distillation/outlook.py).
    """
    delta = 1.0 - policy.certainty
    releases = releases_so_far + (look.candidate is not None)
    router = look.candidate.router if look.candidate is not None else None
    verdict = look.verdict
    next_delta, p_value = spent(1 if look.candidate is not None else look.number + 1, delta), binomial_tail
    if policy.admission == "e-process":
        next_delta, p_value = look.delta, betting_tail  # the same bets go on
    standings = Counter(one.standing for one in verdict.slices)
    by_request: dict[str, Counter[str]] = {}
    for row in dataset.rows:
        if row.teacher_model is not None and row.request is not None:
            by_request.setdefault(requested_of(row.request), Counter())[row.teacher_model] += 1
    models = Counter(row.teacher_model for row in dataset.rows if row.teacher_model is not None)
    return {
        "student": policy.student.kind,
        "agreement_kind": policy.agreement.kind,
        "max_disagreement": policy.max_disagreement,
        "certainty": policy.certainty,
        "admission": policy.admission,
        "look": look.number,
        "delta": look.delta,
        "labels": look.labels,
        "missing": sum(1 for row in dataset.rows if row.choices is None),
        "answers": len(set(dataset.answers)),
        "unseen_chance": unseen_chance(dataset.answers),
        "agreement": look.agreement,
        "coverage": look.coverage,
        "confidence": {"model": look.model, "log_losses": dict(look.losses)},
        "confidence_spread": look.spread.to_json() if look.spread is not None else None,
        "skipping": look.skipping,
        "rank_threshold": verdict.whole.threshold,
        "threshold": router.threshold if router is not None else None,
        "levels": [asdict(level) for level in verdict.whole.levels],
        "levels_delta": verdict.delta,
        "named": {
            answer: {
                "max_disagreement": policy_bound,
                "delta": verdict.named_delta,
                "proven": answer in verdict.proven,
                "given": verdict.given[answer],
                "levels": [asdict(level) for level in verdict.named[answer].levels],
            }
            for answer, policy_bound in look.terms.named.items()
        },
        "labels_per_hour": labels_per_hour(dataset.rows),
        "short": [
            one.to_json()
            for one in shortfalls(
                verdict, look.terms, policy.max_disagreement, next_delta, dataset.rows, p_value
            )
        ],
        "always_escalate": sorted(look.terms.always_escalate),
        "slices": [asdict(one) for one in verdict.slices[:_MOST_SLICES]],
        "standings": {standing: standings[standing] for standing in ("vetoed", "unproven", "shown")},
        "teacher_models": dict(models),
        "teacher_models_by_request": {name: dict(counted) for name, counted in by_request.items()},
        "teacher_noise": {**asdict(dataset.noise), "at_least": dataset.noise.floor(policy.certainty)},
        "left_out": dict(dataset.left_out),
        "releases": releases,
        "expected_broken": releases * delta,
    }
