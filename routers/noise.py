"""The teacher's own noise: how often it disagrees with itself when it is asked the same twice (STATISTICS.md §5).

Whoever imitates a teacher that wavers is measured against one draw of its answers. A promise below the teacher's own
noise is hence one that a perfect copy of it breaks. The bound doesn't say that no student can keep it: one that gives
the likelier answer each time disagrees down to half as often (1 − max p ≥ (1 − Σp²)/2), and one that answers only where
the teacher is steady less still. It says that what is promised is less than what the teacher keeps itself.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from routers.intervals import at_least


@dataclass(frozen=True, slots=True)
class Noise:
    """Of `asked` requests that the teacher answered twice, it `differed` from itself on so many."""

    asked: int
    differed: int

    @classmethod
    def of(cls, steady: Iterable[bool | None]) -> Noise:
        """Count the pairs, each `True` where it said the same. None: there is no second answer, which says nothing."""
        known = [one for one in steady if one is not None]
        return cls(len(known), known.count(False))

    def floor(self, certainty: float) -> float:
        """The exact lower bound of its disagreement with itself, so `certain`; 0 where it wasn't asked twice."""
        return at_least(self.differed, self.asked, certainty) if self.asked else 0.0
