"""An early warning that needs no labels: whether live requests are as easy for the student as those of the test.

What a release was tested on has a distribution of confidence; so has what it sees now. Their distance tells of other
inputs long before enough audits have disagreed, and of inputs only: a teacher who answers otherwise doesn't show, and
a distance breaks no promise by itself. So it warns and withdraws nothing (STATISTICS.md §5).
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from serving.exchange import Json

_BINS = 10
_MEMORY = 1000
"""The present distribution is of about so many requests; older ones fade."""


@dataclass(frozen=True, slots=True)
class Spread:
    """How confidence was distributed over the traffic of the test: `shares` of it lie between the `cuts`."""

    cuts: tuple[float, ...]
    shares: tuple[float, ...]

    @classmethod
    def of(cls, confidence: ArrayLike, weight: ArrayLike) -> Spread:
        """The deciles of `confidence` float[n], each weighted by `weight` float[n] > 0; equal ones once.

        What isn't finite counts as 0. ValueError without any.
        """
        values = np.nan_to_num(np.asarray(confidence, dtype=np.float64), nan=0.0, posinf=1.0, neginf=0.0)
        weights = np.asarray(weight, dtype=np.float64)
        if not len(values):
            raise ValueError("no confidence to describe")
        order = np.argsort(values, kind="stable")
        below = np.cumsum(weights[order]) / weights.sum()
        places = np.searchsorted(below, np.arange(1, _BINS) / _BINS)
        cuts = np.unique(values[order][places])
        bins = np.searchsorted(cuts, values, side="right")
        shares = np.bincount(bins, weights=weights, minlength=len(cuts) + 1) / weights.sum()
        return cls(tuple(map(float, cuts)), tuple(map(float, shares)))

    def to_json(self) -> Json:
        """The spread as a report card holds it."""
        return {"cuts": list(self.cuts), "shares": list(self.shares)}

    @classmethod
    def from_json(cls, data: object) -> Spread | None:
        """Read what `to_json` wrote; None for anything else, such as the card of an older release."""
        match data:
            case {"cuts": [*cuts], "shares": [*shares]} if len(shares) == len(cuts) + 1:
                if all(isinstance(one, int | float) and math.isfinite(one) for one in (*cuts, *shares)):
                    return cls(tuple(map(float, cuts)), tuple(map(float, shares)))
        return None


class Drift:
    """Follows the confidence of live requests. Costs about a microsecond a request."""

    def __init__(self, spread: Spread) -> None:
        self._spread = spread
        self._shares = list(spread.shares)

    def observe(self, confidence: float) -> None:
        """Take in one request's confidence. One that isn't finite is the lowest there is."""
        place = bisect_right(self._spread.cuts, confidence) if math.isfinite(confidence) else 0
        kept = 1.0 - 1.0 / _MEMORY
        self._shares = [share * kept for share in self._shares]
        self._shares[place] += 1.0 / _MEMORY

    @property
    def distance(self) -> float:
        """The share of requests whose confidence lies elsewhere than it did: total variation, from 0 to 1.

        It begins at 0. Chance alone makes it some hundredths.
        """
        return 0.5 * _absolute(self._shares, self._spread.shares)


def _absolute(now: Sequence[float], then: Sequence[float]) -> float:
    return sum(abs(a - b) for a, b in zip(now, then, strict=True))
