"""From a student's score and signals to one untied rank: the log-odds that its answer agrees with the teacher's.

What `routers.confidence_fit` has fitted, as plain numbers: a sum of one piecewise-linear function a signal, and an
offset an answer (an additive logistic model: Hastie & Tibshirani, "Generalized Additive Models", 1986). A decision
takes a few microseconds without NumPy, whose calls cost more than such sums; `ranks` does the same for arrays, bit for
bit.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray

from serving.exchange import Json

SCORE = "score"
"""The name under which the student's own score goes, beside those of its signals."""

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Term:
    """What one signal adds to the rank: `intercepts[i] + slopes[i]·x` for x from `knots[i−1]` up to `knots[i]`.

    m knots, strictly increasing, make m+1 pieces.
    """

    name: str
    slopes: tuple[float, ...]
    intercepts: tuple[float, ...]
    knots: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Confidence:
    """The log-odds of agreement: `offset`, plus what every term adds, plus the answer's own offset in `answers`.

    The first term is that of the student's score and strictly increasing, so that answers whose signals are alike rank
    as their scores do, without ties. An answer that isn't in `answers` has none of its own. `model` names the kind of
    model that was chosen.
    """

    terms: tuple[Term, ...]
    offset: float = 0.0
    answers: Mapping[str, float] = field(default_factory=dict)
    model: str = SCORE

    @classmethod
    def of_score(cls, slope: float, offset: float) -> Confidence:
        """The score alone: log-odds slope·score + offset, slope > 0 (Platt, 1999)."""
        return cls((Term(SCORE, (slope,), (0.0,)),), offset)

    def rank(self, score: float, signals: Mapping[str, float], answer_key: str | None = None) -> float:
        """The untied log-odds of agreement; −∞, which is never trusted, where it needs what is no finite number.

        Never raises.
        """
        rank = self.offset
        try:
            for term in self.terms:
                value = score if term.name == SCORE else signals[term.name]
                if not math.isfinite(value):
                    return -math.inf
                piece = bisect_right(term.knots, value)
                rank += term.intercepts[piece] + term.slopes[piece] * value
        except (KeyError, TypeError, OverflowError):
            return -math.inf
        if answer_key is not None:
            rank += self.answers.get(answer_key, 0.0)
        # Numbers so large that their sum isn't finite are nothing a student says of itself.
        return rank if math.isfinite(rank) else -math.inf

    def ranks(
        self, score: ArrayLike, signals: Mapping[str, ArrayLike], answer_keys: Sequence[str | None]
    ) -> Floats:
        """As `rank`, for n answers: `score` and every signal float[n]. A missing signal is NaN."""
        scores = np.asarray(score, dtype=np.float64)
        total: Floats = np.full(len(scores), self.offset)
        nowhere = np.full(len(scores), np.nan)
        with np.errstate(all="ignore"):
            for term in self.terms:
                given = scores if term.name == SCORE else signals.get(term.name, nowhere)
                values = np.asarray(given, dtype=np.float64)
                piece = np.searchsorted(np.asarray(term.knots, dtype=np.float64), values, side="right")
                added = np.asarray(term.intercepts)[piece] + np.asarray(term.slopes)[piece] * values
                total = np.where(np.isfinite(values), total + added, np.nan)
            total = total + np.array(
                [0.0 if key is None else self.answers.get(key, 0.0) for key in answer_keys]
            )
        return np.where(np.isfinite(total), total, -np.inf)

    def to_json(self) -> Json:
        """The whole as plain JSON."""
        return {
            "model": self.model,
            "offset": self.offset,
            "terms": [
                {
                    "name": term.name,
                    "knots": list(term.knots),
                    "slopes": list(term.slopes),
                    "intercepts": list(term.intercepts),
                }
                for term in self.terms
            ],
            "answers": dict(self.answers),
        }

    @classmethod
    def from_json(cls, data: Json) -> Confidence:
        """Read what `to_json` wrote. Raises KeyError, TypeError or ValueError for anything that ranks nothing."""
        terms = tuple(
            Term(
                name=_text(term["name"]),
                slopes=_numbers(term["slopes"]),
                intercepts=_numbers(term["intercepts"]),
                knots=_numbers(term["knots"]),
            )
            for term in data["terms"]
        )
        answers = data["answers"]
        if not isinstance(answers, dict):
            raise TypeError("answers is no object")
        (offset,) = _numbers([data["offset"]])
        offsets = dict(zip(answers, _numbers(list(answers.values())), strict=True))
        confidence = cls(terms, offset, offsets, _text(data["model"]))
        confidence._check()
        return confidence

    def _check(self) -> None:
        names = [term.name for term in self.terms]
        if names[:1] != [SCORE] or len(set(names)) != len(names):
            raise ValueError(f"its terms are {names}; the first must be {SCORE!r}, and each stand there once")
        if not all(slope > 0.0 for slope in self.terms[0].slopes):
            raise ValueError(f"slope of {SCORE!r} must be > 0, got {list(self.terms[0].slopes)}")
        for term in self.terms:
            if not len(term.slopes) == len(term.intercepts) == len(term.knots) + 1:
                raise ValueError(
                    f"the term {term.name!r} has {len(term.knots)} knots, {len(term.slopes)} slopes and "
                    f"{len(term.intercepts)} intercepts"
                )
            if any(low >= high for low, high in zip(term.knots, term.knots[1:], strict=False)):
                raise ValueError(f"the knots of {term.name!r} don't increase: {list(term.knots)}")


def probability(rank: float) -> float:
    """The probability of agreement that a rank stands for: 1/(1+exp(−rank)). 0 for −∞."""
    return 1.0 / (1.0 + math.exp(-rank)) if rank >= 0 else math.exp(rank) / (1.0 + math.exp(rank))


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no name")
    return value


def _numbers(values: object) -> tuple[float, ...]:
    if not isinstance(values, list):
        raise TypeError(f"{values!r} is no list of numbers")
    numbers = []
    for value in values:
        if type(value) not in (int, float) or not math.isfinite(value):
            raise ValueError(f"{value!r} is no finite number")
        numbers.append(float(value))
    return tuple(numbers)
