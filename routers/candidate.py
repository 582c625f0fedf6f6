"""A candidate: a student whose thresholds and rules of answers are fixed, tested by the labels that come afterwards.

That is what makes an e-process one: its hypotheses stand still while the labels come in, so that they may be looked at
after each (STATISTICS.md §3, "E-process"). What the candidate was fitted on decides on its levels and their vetoes, and
tests nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from routers.admission import AnswerTerms, Verdict
from routers.evalues import BettingPromise
from routers.looks import tested_grid
from routers.promise import Admission, cuts
from routers.slices import SliceVeto, slices
from serving.exchange import Json

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class FixedLevels:
    """The levels of a candidate, strict to loose.

    `others` are those of all answers but the named ones: a rank, and what is vetoed there; `named` each one's ranks.
    """

    others: tuple[tuple[float, frozenset[str]], ...]
    named: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    def to_json(self) -> Json:
        """The levels as plain JSON."""
        return {
            "others": [[cut, sorted(vetoed)] for cut, vetoed in self.others],
            "named": {key: list(ranks) for key, ranks in self.named.items()},
        }

    @classmethod
    def from_json(cls, data: Any) -> FixedLevels:
        """Read what `to_json` wrote. Raises KeyError, TypeError or ValueError for what are no levels."""
        levels = cls(
            tuple((float(cut), frozenset(str(key) for key in vetoed)) for cut, vetoed in data["others"]),
            {str(key): tuple(float(rank) for rank in ranks) for key, ranks in dict(data["named"]).items()},
        )
        for ranks in ([cut for cut, _ in levels.others], *levels.named.values()):
            if not all(map(math.isfinite, ranks)) or any(a <= b for a, b in pairwise(ranks)):
                raise ValueError(f"levels must be finite and strictly decreasing, got {ranks}")
        return levels


def fix_levels(
    rank: ArrayLike,
    answer: Sequence[str | None],
    agreed: ArrayLike,
    propensity: ArrayLike,
    *,
    max_disagreement: float,
    delta: float,
    level: float,
    terms: AnswerTerms,
    seed: int,
) -> FixedLevels:
    """The levels of a student, from n labels that it hasn't seen; arguments as in `admit`.

    A named answer's levels are shares of its own traffic, all others' of all traffic; below 40 % only where as many
    labels again would be plenty (`tested_grid`).
    """
    ranks, chances = np.asarray(rank, dtype=np.float64), np.asarray(propensity, dtype=np.float64)
    agreeing, keys = np.asarray(agreed, dtype=np.bool_), _keys(answer)
    ranks = np.where(np.isfinite(ranks), ranks, -np.inf)
    named, (whole_delta, named_delta) = terms.named, terms.shares(delta)
    others = ~np.isin(keys, [*named, *terms.always_escalate])

    def grid(labels: Floats, bound: float, spends: float) -> list[float]:
        comparable = float((labels.min() / labels).sum()) if len(labels) else 0.0
        return tested_grid(comparable, BettingPromise(bound, 1.0 - spends).least_accepted)

    veto = SliceVeto(max_disagreement, level=level, seed=seed)
    levels = []
    for cut in cuts(np.where(others, ranks, -np.inf), chances, grid(chances, max_disagreement, whole_delta)):
        judged = others & (ranks >= cut)
        veto.fit(keys[judged], agreeing[judged], chances[judged])
        levels.append((cut, frozenset(veto.answers_[veto.vetoed_].tolist())))
    own: dict[str, tuple[float, ...]] = {}
    for key, bound in named.items():
        at = keys == key
        own[key] = tuple(cuts(ranks[at], chances[at], grid(chances[at], bound, named_delta)))
    return FixedLevels(tuple(levels), own)


def bet(
    levels: FixedLevels,
    rank: ArrayLike,
    answer: Sequence[str | None],
    agreed: ArrayLike,
    propensity: ArrayLike,
    least: ArrayLike,
    *,
    max_disagreement: float,
    delta: float,
    level: float,
    terms: AnswerTerms,
    seed: int,
) -> Verdict:
    """What n labels that came after the levels were fixed, in that order, say of them. May be asked at any time.

    `delta` is shared as in `admit`; `propensity` and `least` are as in `BettingPromise.admit`. A named answer without
    levels (the candidate didn't know it) stays unproven.
    """
    ranks = np.asarray(rank, dtype=np.float64)
    agreeing, keys = np.asarray(agreed, dtype=np.bool_), _keys(answer)
    chances, floors = np.asarray(propensity, dtype=np.float64), np.asarray(least, dtype=np.float64)
    named, (whole_delta, named_delta) = terms.named, terms.shares(delta)
    others = ~np.isin(keys, [*named, *terms.always_escalate])
    promise = BettingPromise(max_disagreement, 1.0 - whole_delta)
    whole = promise.admit(
        np.where(others, ranks, -np.inf),
        agreeing,
        [cut for cut, _ in levels.others],
        propensity=chances,
        least=floors,
        refused=[np.isin(keys, list(vetoed)) for _, vetoed in levels.others],
    )
    tests: dict[str, Admission] = {}
    for key, bound in named.items():
        own = keys == key
        tests[key] = BettingPromise(bound, 1.0 - named_delta).admit(
            ranks[own],
            agreeing[own],
            levels.named.get(key, ()),
            propensity=chances[own],
            least=floors[own],
        )
    shown = max(sum(one.passed for one in whole.levels) - 1, 0)
    cut, vetoed = levels.others[shown] if levels.others else (math.inf, frozenset[str]())
    judged = others & (ranks >= cut)
    report = SliceVeto(max_disagreement, level=level, seed=seed)
    report.fit(keys[judged], agreeing[judged], chances[judged])
    refused = judged & np.isin(keys, list(vetoed))
    accepted: Bools = judged & ~refused & (whole.threshold is not None)
    for key, test in tests.items():
        if test.threshold is not None:
            accepted |= (keys == key) & (ranks >= test.threshold)
    given = {key: int((keys == key).sum()) for key in named}
    found = slices(report, level)
    return Verdict(whole, tests, given, whole_delta, named_delta, vetoed, found, accepted, refused)


def _keys(answer: Sequence[str | None]) -> NDArray[Any]:
    """The answers' keys; what has none is the empty one."""
    return np.array([key or "" for key in answer], dtype=str)
