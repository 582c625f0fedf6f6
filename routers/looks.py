"""When a promise may be tested, and how much of δ each test spends (STATISTICS.md §3, "Looks").

Testing whenever labels arrive is optional stopping. So a look is due only when the labels have grown by a fixed factor
since the last one, a rule that doesn't see whether answers agree, and the k-th look since the last release spends
6δ/(π²k²), which sums to δ. The promise of *each* release is thereby kept with its own δ: R releases in, δR broken ones
are to be expected at the most, and reports say so.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from routers.promise import Promise

GROWTH = 1.25
"""A look is due when there are this many times the labels of the last look."""

SEEN_ENOUGH = 10
"""An answer seen this often can have been learned; see `half_is_known`."""

GRID: tuple[float, ...] = tuple(round(0.05 * step, 2) for step in range(4, 21))
"""The coverages a look may test: 20, 25, … 100 %; see `tested_grid`."""

_FIRST_COVERAGE = 0.4
_ENOUGH_TO_ERR = 3


@dataclass(frozen=True, slots=True)
class PastLook:
    """A look that was taken: its number since the last release, the labels it had, and whether it made a release.

    `at` is when its labels were read, `until` when the request of the newest came (None: it isn't known), in seconds
    since the epoch.
    """

    look: int
    labels: int
    released: bool
    at: float = field(default=0.0, compare=False)
    until: float | None = field(default=None, compare=False)


def spent(look: int, delta: float) -> float:
    """The part of δ that look number `look` (from 1) spends."""
    return 6.0 * delta / (math.pi**2 * look**2)


def next_look(past: Sequence[PastLook]) -> int:
    """The number of the next look: counting starts again after a release."""
    return 1 if not past or past[-1].released else past[-1].look + 1


def labels_needed(
    past: Sequence[PastLook],
    max_disagreement: float,
    certainty: float,
    *,
    fence: float = 0.0,
    kept: int | None = None,
) -> int:
    """How many labels the next look needs.

    The first: enough for a level of 40 % to be able to pass. Later ones: `GROWTH` times those of the last, as far as
    they count today. `kept` is how many labels there are from before the last look (None: all that it had): another
    kind of student may be judged on fewer, one was trained on them, or they are too old to be kept. Else it would take
    many times the traffic until what is new is a quarter, or for ever. Labels from before `fence`, when a release was
    withdrawn, don't count any more, so that the first look after it is a first one again. What looks have spent stays
    spent.
    """
    fresh = [look for look in past if look.at >= fence]
    grown = math.ceil(fresh[-1].labels * GROWTH) if fresh else math.inf
    if fresh and (kept is None or kept >= fresh[-1].labels):
        return int(grown)
    promise = Promise(max_disagreement, 1.0 - spent(next_look(past), 1.0 - certainty))
    first = math.ceil(promise.least_accepted / _FIRST_COVERAGE)
    return int(min(grown, max(first, math.ceil((kept or 0) * GROWTH)))) if fresh else first


def tested_grid(labels: float, least_accepted: int) -> list[float]:
    """The coverages to test with so many labels (of equal propensity), strict to loose.

    Always 40 to 100 % by 5. Below that only where a level would have three times the labels without which it can't
    pass: a student that is still weak may then answer the easiest fifth, but a handful of labels, where a single
    disagreement fails the level and with it the whole sequence, is no place to begin (docs/lab-notes.md).
    """
    return [
        coverage
        for coverage in GRID
        if coverage >= _FIRST_COVERAGE or labels * coverage >= _ENOUGH_TO_ERR * least_accepted
    ]


def unseen_chance(answers: Sequence[str]) -> float:
    """The chance that the next answer is one never seen before: f₁/n (Good, 1953; Turing). 1 without answers."""
    if not answers:
        return 1.0
    return sum(1 for count in Counter(answers).values() if count == 1) / len(answers)


def half_is_known(answers: Sequence[str]) -> bool:
    """Whether half of the traffic gets answers that were seen at least `SEEN_ENOUGH` times.

    Before that hardly any student can be sure of enough of them, and a look would be wasted. Like Good–Turing this
    counts the teacher's answers only: it knows nothing of the student's.
    """
    seen = Counter(answers).values()
    return 2 * sum(count for count in seen if count >= SEEN_ENOUGH) >= sum(seen) > 0
