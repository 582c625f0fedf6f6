"""The samples an evaluation is made of: labels of the log, each with its weight, and the rows of a recording."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from distillation.dataset import Dataset, Row
from distillation.judgement import Floats, Judgement, Sample, judge
from distillation.past import Past, PastRelease, Redone, propensity_of, redoable
from serving.agreement import Comparison
from serving.errors import UnderstudyError
from serving.exchange import Json
from serving.recording import Recorded, Recording
from serving.releases import ReleaseStore
from serving.sight import seen_text, unsupported

_BY_RANK = ("confident", "low_confidence")
"""Reasons of the router that speak of the rank alone; any other is a rule that no rank overcomes."""


@dataclass(frozen=True, slots=True)
class Labelled:
    """Rows of the log, what the release makes of each, and what each weighs."""

    rows: list[Row]
    redone: list[Redone]
    weights: Floats


def read_labels(
    store: ReleaseStore, task: str, dataset: Dataset, past: Past, note: Callable[[str], None]
) -> Labelled:
    """The labels of a task's dataset, judged by the release `past`.

    Leaves out the traffic of releases that can't be read any more (`note` is told) and what `past` can't serve.
    Raises UnderstudyError where an exchange could never have been labelled.
    """
    met, usable = redoable(store, task, dataset, note)
    if not usable.rows:
        return Labelled([], [], np.zeros(0))
    try:
        weights = 1.0 / propensity_of(usable, met)
    except ValueError as error:  # a log that no gateway wrote: each of ours has an audit rate
        raise UnderstudyError(f"the labels of task {task} can't be weighed: {error}") from error
    rows, redone, kept = [], [], []
    for place, row in enumerate(usable.rows):
        made = past.redo(row)
        if made is not None:
            rows.append(row)
            redone.append(made)
            kept.append(place)
    return Labelled(rows, redone, weights[kept])


def sample_of(redone: Sequence[Redone], weights: Floats) -> Sample:
    """Arrays of what a release makes of labels that weigh `weights`."""
    return Sample(
        ranks=np.array([made.rank for made in redone], dtype=np.float64),
        barred=np.array([made.decision.reason not in _BY_RANK for made in redone], dtype=np.bool_),
        accepted=np.array([made.decision.accepted for made in redone], dtype=np.bool_),
        keys=[made.key or "" for made in redone],
        agreed=np.array([made.agreed for made in redone], dtype=np.bool_),
        weights=weights,
    )


def judge_recording(
    recording: Recording, past: PastRelease, comparing: Comparison, fitted_on: set[str], notes: list[str]
) -> tuple[Judgement | None, int]:
    """The judgement by a file, and how many of its rows are left out: those the release was `fitted_on`.

    Every other row counts once. Against the truth only where all of them have a gold answer; `notes` are added to.
    Raises UnderstudyError where the student can't be asked.
    """
    redone: list[Redone] = []
    right: list[tuple[bool, bool]] = []
    seen = no_gold = 0
    for recorded in recording.rows:
        text = _seen(recorded, past)
        if text in fitted_on:
            seen += 1
            continue
        rank, key = past.rank(text)
        teacher = _key(comparing, recorded.teacher, recorded.tool_calls)
        redone.append(Redone(rank, key, key == teacher, past.router.judge(rank, key)))
        gold = _key(comparing, recorded.gold, None)
        no_gold += recorded.gold is None
        right.append((key == gold, teacher == gold))
    if seen:
        notes.append(
            f"{seen:,} rows of {recording.path} are left out: the release was fitted on the same messages"
        )
    sample = sample_of(redone, np.ones(len(redone)))
    if not redone or no_gold == len(recording.rows):
        return judge(sample), seen
    if no_gold:
        notes.append(f"{no_gold:,} rows of {recording.path} have no gold answer: only agreement is judged")
        return judge(sample), seen
    student, teacher_right = np.array(right, dtype=np.bool_).T
    return judge(replace(sample, student_right=student, teacher_right=teacher_right)), seen


def _seen(recorded: Recorded, past: PastRelease) -> str:
    request: Json = {"messages": [{"role": "user", "content": recorded.text}]}
    feature = unsupported(request, past.student.sees)
    if feature is not None:
        raise UnderstudyError(f"this student can't answer the messages of a recording: {feature}")
    return seen_text(request, past.student.sees)


def _key(comparing: Comparison, text: str | None, tool_calls: list[Json] | None) -> str | None:
    message: Json = {"role": "assistant", "content": text}
    if tool_calls:
        message["tool_calls"] = tool_calls
    return comparing.key([{"index": 0, "message": message, "finish_reason": "stop"}])
