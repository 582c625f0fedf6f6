"""Scores that no label had a hand in: cross-fitting (STATISTICS.md §3).

Each labelled exchange is scored by a student fitted on the other folds, one text at a time and by the same code and
arrays that would be served.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from distillation.dataset import Row, known_answers, token_estimate
from distillation.features import FeaturesOf
from distillation.linear_training import TermCounts
from distillation.scored import Scored
from serving.closed_answers import ClosedStudent
from serving.sight import Sees

FOLDS = 5


@dataclass(frozen=True, slots=True)
class CrossFit(Scored):
    """What students that hadn't seen a row make of it; `student`, fitted on all rows, is the one to be released."""

    student: ClosedStudent


def cross_fit(
    rows: Sequence[Row],
    *,
    seed: int,
    sees: Sees = "message",
    features_of: FeaturesOf = TermCounts,
    progress: Callable[[str], None] = lambda _: None,
) -> CrossFit:
    """Fit `FOLDS` students and the one for release. `seed` deals the rows into folds; `sees` is how they were seen.

    `features_of` makes of the texts what students are fitted to. A text that can't be read teaches nothing, and keeps
    −∞: no answer to it is ever accepted. Raises ValueError when no row has an answer a student could give.
    """
    known = known_answers(rows)
    if not known:
        raise ValueError("no row has an answer a student could give")
    tokens = token_estimate(rows)
    place = {answer.key: index for index, answer in enumerate(known)}
    # A missing label (None) isn't the empty answer: it teaches nothing.
    answers = np.array(
        [-1 if row.answer is None else place.get(row.answer, -1) for row in rows], dtype=np.int64
    )
    features = features_of([row.text for row in rows])
    teaches = (answers >= 0) & features.readable
    folds = np.random.default_rng(seed).permutation(len(rows)) % FOLDS
    scores = np.full(len(rows), -np.inf)
    signals: dict[str, NDArray[np.float64]] = {}
    predicted = [""] * len(rows)
    for fold in range(FOLDS):
        progress(f"fitting on fold {fold + 1} of {FOLDS}")
        training = np.flatnonzero((folds != fold) & teaches)
        if len(training) == 0:
            continue  # nothing to learn from: its rows keep −∞ and are never accepted
        student = features.fit(training, answers[training], known, tokens, sees)
        for index in np.flatnonzero((folds == fold) & features.readable):
            prediction = student.predict(rows[int(index)].text)
            scores[index] = prediction.score
            for name, value in prediction.signals.items():
                signals.setdefault(name, np.full(len(rows), np.nan))[index] = value
            predicted[index] = student.answers[prediction.index].key
    progress("fitting the student on all labels")
    everything = np.flatnonzero(teaches)
    if len(everything) == 0:
        raise ValueError("no text with an answer can be read by the student")
    student = features.fit(everything, answers[everything], known, tokens, sees)
    agreed = np.array([key == row.answer for key, row in zip(predicted, rows, strict=True)], dtype=np.bool_)
    return CrossFit(scores, signals, predicted, agreed, student)
