"""Rows as a student that saw none of their labels answers them: what a look judges, whatever the student is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from distillation.dataset import Row
from serving.closed_answers import KnownAnswer, Prediction


@dataclass(frozen=True, slots=True)
class Scored:
    """One student's answers to n labelled rows, each scored as it would be served.

    `scores` float[n], `signals` float[n] by name (NaN where there is none), `predicted` the keys of the answers (None
    where it isn't known yet when an answer is judged, or answers have no normal form) and `agreed` bool[n] (a missing
    label never agrees).
    """

    scores: NDArray[np.float64]
    signals: dict[str, NDArray[np.float64]]
    predicted: Sequence[str | None]
    agreed: NDArray[np.bool_]

    @classmethod
    def of(
        cls, rows: Sequence[Row], predicted: Mapping[str, Prediction], answers: Sequence[KnownAnswer]
    ) -> Scored:
        """What a student that knows these `answers` predicted, by the ids of the rows.

        A row that it didn't is one that it can't read: never accepted.
        """
        scores = np.full(len(rows), -np.inf)
        signals: dict[str, NDArray[np.float64]] = {}
        keys: list[str | None] = [None] * len(rows)
        for place, row in enumerate(rows):
            prediction = predicted.get(row.id)
            if prediction is None:
                continue
            scores[place] = prediction.score
            keys[place] = answers[prediction.index].key
            for name, value in prediction.signals.items():
                signals.setdefault(name, np.full(len(rows), np.nan))[place] = value
        agreed = np.array(
            [key is not None and key == row.answer for key, row in zip(keys, rows, strict=True)],
            dtype=np.bool_,
        )
        return cls(scores, signals, keys, agreed)
