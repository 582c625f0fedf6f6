"""From a language model's answer to what it is judged by when it is served (STATISTICS.md §6).

A streamed answer is judged at the commit point, by what is known of it there, or at its end if that comes first; a
whole one at its end. One confidence and one threshold stand for both, so that they share one grid.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from serving.beginning import begun
from serving.exchange import Json, StudentAnswer
from serving.served import ServedPlan

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Known:
    """What is known of an answer at one moment. `tokens`: how many of it there are by then."""

    tokens: int
    score: float
    signals: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class AsServed:
    """What an answer is judged by: `judged`, and whether it had `ended` by then, so that its key is known.

    `early` is what was known at the checkpoints before, where it is given up if it is hopeless. `said` is the text of
    one that hadn't ended, up to there; None in logs that don't tell.
    """

    judged: Known
    ended: bool
    early: tuple[Known, ...]
    said: str | None = None


def as_served(answer: StudentAnswer, plan: ServedPlan, *, streamed: bool) -> AsServed:
    """How a complete answer is judged under a release's plan, for a streamed request or for a whole answer."""
    known = [Known(point["tokens"], point["score"], point["signals"]) for point in answer.checkpoints]
    early = tuple(point for point in known if point.tokens < plan.commit_tokens)
    committed = next((point for point in known if point.tokens == plan.commit_tokens), None)
    if streamed and committed is not None:
        spelled = next(
            point.get("bytes") for point in answer.checkpoints if point["tokens"] == committed.tokens
        )
        return AsServed(committed, False, early, None if spelled is None else begun(answer.choices, spelled))
    return AsServed(Known(_tokens(answer), answer.score, answer.signals), True, early)


def columns(known: Sequence[Known | None]) -> tuple[Floats, dict[str, Floats]]:
    """Scores float[n] and signals float[n] by name; NaN where there is none.

    A score that isn't finite is −∞: nothing is known of it, but it was there.
    """
    scores = np.array(
        [np.nan if one is None else one.score if math.isfinite(one.score) else -np.inf for one in known]
    )
    signals: dict[str, Floats] = {}
    for index, one in enumerate(known):
        for name, value in ({} if one is None else one.signals).items():
            signals.setdefault(name, np.full(len(known), np.nan))[index] = value
    return scores, signals


def _tokens(answer: StudentAnswer) -> int:
    usage: Json = answer.usage or {}
    counted = usage.get("completion_tokens")
    return counted if type(counted) is int else 0
