"""Which generations are given up before they are judged, since they will hardly be accepted (STATISTICS.md §6)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from routers.held_out import HeldOutConfidence
from routers.stopping import expected_threshold, stop_below

Floats = NDArray[np.float64]

Early = tuple[Floats, Mapping[str, Floats]]
"""What was known at one checkpoint before answers are judged: as in `Scored`, NaN where it wasn't reached."""


@dataclass(frozen=True, slots=True)
class Hopeless:
    """`below` is the rank at a checkpoint below which a generation is given up, None: none is.

    `given_up` bool[n] says which of the rows, `at` int[n] at which checkpoint (−1: it went on). `wrongly` is the share
    of the traffic that would have been accepted, by what the ranks say, and is given up.
    """

    below: float | None
    given_up: NDArray[np.bool_]
    at: NDArray[np.int64]
    wrongly: float


def find_hopeless(
    confidence: HeldOutConfidence,
    early: Sequence[Early],
    ranks: Floats,
    max_disagreement: float,
    propensity: Floats,
    *,
    seed: int,
) -> Hopeless:
    """Learn the rule from the ranks at the checkpoints and those in the end, float[n]; from no label of a row's own.

    An answer's key isn't known early, so that its offset is left out. Where a checkpoint was reached and nothing can be
    said there, the rank is −∞: it is given up if anything is.
    """
    none = Hopeless(None, np.zeros(len(ranks), bool), np.full(len(ranks), -1, np.int64), 0.0)
    expected = expected_threshold(ranks, max_disagreement, propensity=propensity)
    if expected is None or not early:
        return none
    ranked = [_ranked(confidence, scores, signals) for scores, signals in early]
    accepted = ranks >= expected
    below = stop_below(np.min(ranked, axis=0), accepted, propensity=propensity, seed=seed)
    if below is None:
        return none
    hits = np.array(ranked) < below
    given_up: NDArray[np.bool_] = np.any(hits, axis=0)
    weights = 1.0 / propensity
    return Hopeless(
        below=below,
        given_up=given_up,
        at=np.where(given_up, hits.argmax(axis=0), -1),
        wrongly=float(weights[given_up & accepted].sum() / weights[accepted].sum()),
    )


def _ranked(confidence: HeldOutConfidence, scores: Floats, signals: Mapping[str, Floats]) -> Floats:
    """The ranks at a checkpoint, float[n]; +∞ for answers that ended before it."""
    reached = ~np.isnan(scores)
    ranks = confidence.ranks(scores, signals, [None] * len(scores))
    return np.where(reached, ranks, np.inf)
