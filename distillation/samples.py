"""The samples an evaluation is made of: labels of the log, each with its weight, and the rows of a recording."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import numpy as np

from distillation.dataset import Dataset, Row, build_dataset
from distillation.judgement import Floats, Judgement, Sample, judge
from distillation.past import Past, PastRelease, Redone, propensity_of, read_past, redoable
from distillation.split import Split
from serving.agreement import Comparison
from serving.engines import Engines
from serving.errors import UnderstudyError
from serving.exchange import Exchange, Json
from serving.recording import Recorded, Recording
from serving.releases import ReleaseStore
from serving.sight import seen_text

_BY_RANK = ("confident", "low_confidence")
"""Reasons of the router that speak of the rank alone; any other is a rule that no rank overcomes."""


@dataclass(frozen=True, slots=True)
class Labelled:
    """Rows of the log, what the release makes of each, and what each weighs."""

    rows: list[Row]
    redone: list[Redone]
    weights: Floats


class ClosedSource:
    """Labels for a release whose student lies in it and knows its answers, by what that student sees."""

    def __init__(
        self, store: ReleaseStore, task: str, name: str, comparing: Comparison, engines: Engines
    ) -> None:
        self._engines = engines
        self.past = read_past(store, task, name, engines)
        self._store = store
        self._task = task
        self._name = name
        self._comparing = comparing

    def dataset(self, exchanges: Sequence[Exchange]) -> Dataset:
        """What of the log this release can be judged on: nothing that may have trained it, nor those before it."""
        met = {exchange.release for exchange in exchanges}
        judges = Split.after(self._task, self._store, {*met, self._name}).judges
        return build_dataset(exchanges, self._comparing, self.past.student.sees, judges=judges)

    def redo(
        self, dataset: Dataset, exchanges: Sequence[Exchange], note: Callable[[str], None]
    ) -> tuple[Past, Mapping[str, Past]]:
        """The release, and those that the dataset's traffic met as far as they can be read; `note` hears of others."""
        read = partial(read_past, self._store, self._task, engines=self._engines)
        return self.past, redoable(read, self._task, dataset, note)[0]


class LabelSource(Protocol):
    """Where the labels for one release come from; its kind decides what it takes to redo decisions."""

    def dataset(self, exchanges: Sequence[Exchange]) -> Dataset:
        """What of the log this release can be judged on."""
        ...

    def redo(
        self, dataset: Dataset, exchanges: Sequence[Exchange], note: Callable[[str], None]
    ) -> tuple[Past, Mapping[str, Past]]:
        """The release, and those that the dataset's traffic met as far as they can be read; `note` hears of others.

        `exchanges` are all there are. Raises UnderstudyError where it can't be judged.
        """
        ...


def weigh(dataset: Dataset, past: Past, met: Mapping[str, Past]) -> Labelled:
    """The labels of a dataset, judged by the release `past`.

    Leaves out the traffic of releases that aren't among those `met`, and what `past` can't serve. Raises
    UnderstudyError where an exchange could never have been labelled.
    """
    for name in [name for name in dataset.traffic if name is not None and name not in met]:
        dataset = dataset.without_period(name)
    if not dataset.rows:
        return Labelled([], [], np.zeros(0))
    try:
        weights = 1.0 / propensity_of(dataset, met)
    except ValueError as error:  # a log that no gateway wrote: each of ours has an audit rate
        raise UnderstudyError(f"the labels can't be weighed: {error}") from error
    made = [past.redo(row) for row in dataset.rows]
    kept = [place for place, one in enumerate(made) if one is not None]
    return Labelled(
        [dataset.rows[place] for place in kept], [one for one in made if one is not None], weights[kept]
    )


def sample_of(redone: Sequence[Redone], weights: Floats) -> Sample:
    """Arrays of what a release makes of labels that weigh `weights`."""
    return Sample(
        ranks=np.array([made.rank for made in redone], dtype=np.float64),
        barred=np.array([made.decision.reason not in _BY_RANK for made in redone], dtype=np.bool_),
        accepted=np.array([made.decision.accepted for made in redone], dtype=np.bool_),
        keys=[made.key for made in redone],
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
    for number, recorded in enumerate(recording.rows):
        row = _row(number, recorded, past, comparing)
        if row.text in fitted_on:
            seen += 1
            continue
        made = past.redo(row)
        if made is None:
            raise UnderstudyError(f"this student can't answer messages as they stand in {recording.path}")
        redone.append(made)
        gold = _key(comparing, recorded.gold, None)
        no_gold += recorded.gold is None
        right.append((made.key == gold, row.answer == gold))
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


def _row(number: int, recorded: Recorded, past: PastRelease, comparing: Comparison) -> Row:
    """A recorded message as if it had been a request to the teacher."""
    request: Json = {"messages": [{"role": "user", "content": recorded.text}]}
    return Row(
        id=f"recorded {number}",
        text=seen_text(request, past.student.sees),
        answer=_key(comparing, recorded.teacher, recorded.tool_calls),
        choices=None,
        prompt_tokens=None,
        completion_tokens=None,
        teacher_model=None,
        release=None,
        request=request,
    )


def _key(comparing: Comparison, text: str | None, tool_calls: list[Json] | None) -> str | None:
    message: Json = {"role": "assistant", "content": text}
    if tool_calls:
        message["tool_calls"] = tool_calls
    return comparing.key([{"index": 0, "message": message, "finish_reason": "stop"}])
