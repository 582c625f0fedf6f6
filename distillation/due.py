"""Whether a look is due. Counts labels and the teacher's answers; never asks whether a student agrees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from distillation.dataset import Dataset, known_answers
from routers.looks import SEEN_ENOUGH, PastLook, half_is_known, labels_needed, unseen_chance
from routers.noise import Noise
from serving.task_settings import TaskPolicy


@dataclass(frozen=True, slots=True)
class NotDue:
    """Why no look is taken now. `declined`: more of the same traffic won't change it by itself.

    `needed` is the number of labels that was missed, None if the number isn't what is missing.
    """

    declined: bool
    message: str
    needed: int | None = None


def not_due(
    dataset: Dataset, past: Sequence[PastLook], policy: TaskPolicy, *, fence: float = 0.0
) -> NotDue | None:
    """Why the next look isn't due yet, or None: it is.

    A student that is trained here chooses among the answers it has seen, so that there must be few of them, seen often.
    One that is served elsewhere has its own: for it labels are counted and nothing else. `fence` is when a release was
    last withdrawn: the dataset begins there, and so do the looks.
    """
    chooses = not policy.student.served
    if chooses and policy.agreement.kind == "numeric":
        return NotDue(
            True,
            f"a student of kind {policy.student.kind} needs an agreement with a normal form: exact or json, "
            "not numeric",
        )
    labels = len(dataset.rows)
    until = past[-1].until if past else None
    kept = None if until is None else sum(row.created <= until for row in dataset.rows)
    needed = labels_needed(past, policy.max_disagreement, policy.certainty, fence=fence, kept=kept)
    begun = any(look.at >= fence for look in past)
    untrainable = dataset.left_out["teacher not marked trainable"]
    if labels == 0 and untrainable:
        return NotDue(
            True,
            f"none of {untrainable} answers may be used for training: set teacher.trainable = true "
            "if the provider's terms allow it",
        )
    noisy = too_noisy(dataset, policy)
    if noisy is not None:
        return NotDue(True, noisy)
    if labels < needed:
        return NotDue(
            False, f"{labels} labels; the {'next' if begun else 'first'} look needs {needed}", needed
        )
    if not chooses:
        return None
    answers = dataset.answers
    if not known_answers(dataset.rows):
        return NotDue(
            True,
            f"none of {labels} labels is an answer a student could give: the teacher refused, was cut off, called "
            f"tools, or wrote what isn't {'JSON' if policy.agreement.kind == 'json' else 'text'}",
        )
    unseen = unseen_chance(answers)
    if unseen > policy.max_disagreement:
        return NotDue(
            True,
            f"the answer space isn't closed: {len(set(answers))} distinct answers in {labels} labels, and the next "
            f"is new with probability {unseen:.1%} (Good–Turing), above α = {policy.max_disagreement:.1%}",
        )
    if not begun and not half_is_known(answers):
        return NotDue(
            False,
            f"{labels} labels; the first look waits until half of the traffic gets answers "
            f"seen {SEEN_ENOUGH} times",
        )
    return None


def too_noisy(dataset: Dataset, policy: TaskPolicy) -> str | None:
    """Why the teacher's own noise forbids what the task promises, or None: it isn't shown to (STATISTICS.md §5)."""
    noise = dataset.noise
    floor = noise.floor(policy.certainty)
    if floor <= policy.max_disagreement:
        return None
    return (
        f"the teacher disagrees with itself on at least {floor:.1%} ({noise.differed:,} of {noise.asked:,} asked "
        f"twice, {policy.certainty:.0%} certain): max_disagreement = {policy.max_disagreement:g} can't be promised; "
        "raise it, or make the teacher steadier (temperature 0, a clearer prompt)"
    )


def noise_line(noise: Noise) -> str:
    """How often the teacher agreed with itself, for a person."""
    return f"asked twice {noise.asked:,} times, the teacher disagreed with itself {noise.differed:,} times"
