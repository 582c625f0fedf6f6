"""The promise of one release: P(disagreement among accepted > α) ≤ δ, on i.i.d. traffic (STATISTICS.md §3).

Levels of coverage are tested from strict to loose, each at the full δ, until the first that fails (fixed-sequence
testing: Angelopoulos et al., "Learn then Test", arXiv 2110.01052). The test of a level is the exact binomial one, so
nothing is approximated; labels with unequal propensities are thinned to a simple random sample first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

COVERAGES: tuple[float, ...] = tuple(round(0.05 * step, 2) for step in range(8, 21))
"""40, 45, … 100 %. Starting stricter dies at the first, since a handful of labels proves nothing."""


@dataclass(frozen=True, slots=True)
class Level:
    """One threshold that was tested, or skipped because so few accepted labels could prove nothing.

    `coverage` is the share of traffic that is accepted there (more than the grid aims at where scores tie, less where
    answers are refused), `accepted` the number of labels tested at `threshold` and `disagreements` how many of them
    disagreed. `p_value` is None for a skipped level.
    """

    coverage: float
    threshold: float
    accepted: int
    disagreements: int
    p_value: float | None
    passed: bool


@dataclass(frozen=True, slots=True)
class Admission:
    """What came of testing all levels. `threshold` and `coverage` are None when none passed."""

    threshold: float | None
    coverage: float | None
    levels: list[Level]


class Promise:
    """At most `max_disagreement` (α) of what is accepted disagrees, with probability `certainty` (1−δ).

    Both are in (0, 1); ValueError otherwise. `seed` is of the thinning's coins, which know nothing of the labels.
    """

    def __init__(self, max_disagreement: float, certainty: float, *, seed: int = 0) -> None:
        check_terms(max_disagreement, certainty)
        self.max_disagreement = max_disagreement
        self.certainty = certainty
        self.seed = seed

    @property
    def least_accepted(self) -> int:
        """The accepted labels without which no level can pass: ln δ / ln(1−α), all of them agreeing."""
        return math.ceil(math.log(1.0 - self.certainty) / math.log1p(-self.max_disagreement) - 1e-9)

    def threshold(
        self,
        confidence: ArrayLike,
        agreed: ArrayLike,
        *,
        propensity: ArrayLike | None = None,
        grid: Sequence[float] | None = None,
    ) -> float | None:
        """The lowest threshold of the grid that keeps the promise, or None when none qualifies.

        `confidence` float[n] ranks the labelled exchanges and must not have been fitted on them; what isn't finite is
        never accepted, as in the router. `agreed` bool[n] says which student answers agreed; a missing label is False.
        `propensity` float[n] in (0, 1] is the probability with which each came to be labelled; None is the reference
        test, on labels that are a simple random sample of the traffic. `grid` are coverages in (0, 1], strict to
        loose; None: 40 to 100 % by 5.
        """
        return self.admit(confidence, agreed, propensity=propensity, grid=grid).threshold

    def admit(
        self,
        confidence: ArrayLike,
        agreed: ArrayLike,
        *,
        propensity: ArrayLike | None = None,
        grid: Sequence[float] | None = None,
        refused: Callable[[Bools], Bools] | None = None,
        shown: Callable[[Bools], Bools] | None = None,
    ) -> Admission:
        """As `threshold`, with every level that was tested. Raises ValueError for arrays that don't fit together.

        `refused` is asked at each level, given which labels lie at or above its threshold, bool[n], for those whose
        answers wouldn't be served all the same; no label may have had a hand in its own refusal (routers/slices.py).

        `shown` is asked the same for the requests that the student is shown at all (routers/foresight.py). A level
        then passes only if it does with all that is served, shown or not, *and* with what is shown alone (an
        intersection–union test: Berger, 1982): the release keeps its promise whether or not it skips. The p-value is
        the larger one.
        """
        scores = np.asarray(confidence, dtype=np.float64)
        agreeing = _booleans(agreed)
        chances = np.ones(scores.shape) if propensity is None else np.asarray(propensity, dtype=np.float64)
        _check(scores, agreeing, chances)
        if len(scores) == 0:
            return Admission(None, None, [])
        scores = np.where(np.isfinite(scores), scores, -np.inf)
        kept = self._thinned(chances)
        weights = 1.0 / chances
        delta = 1.0 - self.certainty
        levels: list[Level] = []
        best: Level | None = None
        for cut in cuts(scores, chances, COVERAGES if grid is None else grid):
            considered = served = scores >= cut
            enough = int((kept & served).sum()) >= self.least_accepted
            if refused is not None:
                served = served & ~refused(served)
            tested = kept & served
            coverage = float(weights[served].sum() / weights.sum())
            accepted = int(tested.sum())
            disagreements = int((tested & ~agreeing).sum())
            if not enough:
                # Known from scores alone. One that is short of labels only after refusals fails: agreement
                # decided on those, and may not decide which levels are tested.
                levels.append(Level(coverage, cut, accepted, disagreements, None, False))
                continue
            p_value = binomial_tail(disagreements, accepted, self.max_disagreement)
            if shown is not None:
                left = tested & shown(considered)
                wrong, right = int((left & ~agreeing).sum()), int((left & agreeing).sum())
                p_value = max(p_value, binomial_tail(wrong, wrong + right, self.max_disagreement))
            levels.append(Level(coverage, cut, accepted, disagreements, p_value, p_value <= delta))
            if p_value > delta:
                break
            best = levels[-1]
        if best is None:
            return Admission(None, None, levels)
        return Admission(best.threshold, best.coverage, levels)

    def sample(self, propensity: ArrayLike) -> Bools:
        """Which labels with these propensities are tested, bool[n]: a simple random sample of the traffic."""
        return self._thinned(np.asarray(propensity, dtype=np.float64))

    def _thinned(self, chances: Floats) -> Bools:
        """A subset in which every exchange of the traffic had the same chance to be: the smallest propensity.

        Keeping a label with probability π_min/π is rejection sampling. What it gives away in labels it more than
        earns back by the exact test that becomes possible: betting e-values on the weighted labels passed a third
        less often in simulation (docs/lab-notes.md).
        """
        least = chances.min()
        if least == chances.max():
            return np.ones(len(chances), dtype=np.bool_)
        kept: Bools = np.random.default_rng(self.seed).random(len(chances)) < least / chances
        return kept


def check_terms(max_disagreement: float, certainty: float) -> None:
    """Raise ValueError for an α or a certainty that isn't in (0, 1)."""
    for name, value in (("max_disagreement", max_disagreement), ("certainty", certainty)):
        if not 0.0 < value < 1.0:
            raise ValueError(f"{name} must lie between 0 and 1, got {value}")


def binomial_tail(disagreements: int, accepted: int, alpha: float) -> float:
    """P(X ≤ disagreements) for X ~ Binomial(accepted, alpha): the exact p-value of "disagreement ≥ alpha"."""
    if disagreements >= accepted:
        return 1.0
    k = np.arange(disagreements)
    # Each term from the one before: P(k+1)/P(k) = (n−k)/(k+1) · α/(1−α).
    steps = np.log((accepted - k) / (k + 1.0)) + (math.log(alpha) - math.log1p(-alpha))
    log_terms = accepted * math.log1p(-alpha) + np.concatenate([[0.0], np.cumsum(steps)])
    largest = float(log_terms.max())
    return min(1.0, math.exp(largest) * float(np.exp(log_terms - largest).sum()))


def cuts(scores: Floats, chances: Floats, grid: Sequence[float]) -> list[float]:
    """The score at each coverage, by the labels' share of the traffic (weight 1/propensity); equal ones once.

    Where less than a coverage has a finite score, the cut is the lowest of them.
    """
    order = np.argsort(-scores, kind="stable")
    ranked = scores[order]
    weights = 1.0 / chances[order]
    share = np.cumsum(weights) / weights.sum()
    usable = int(np.isfinite(ranked).sum())
    found: list[float] = []
    for coverage in grid:
        if not 0.0 < coverage <= 1.0:
            raise ValueError(f"a coverage must lie in (0, 1], got {coverage}")
        place = min(int(np.searchsorted(share, coverage - 1e-9)), usable - 1)
        if place >= 0 and (not found or ranked[place] < found[-1]):
            found.append(float(ranked[place]))
    return found


def _booleans(agreed: ArrayLike) -> Bools:
    given = np.asarray(agreed)
    # NaN is truthy: a label that is missing in a table would count as agreement.
    if given.dtype != np.bool_ and not np.isin(given, (0, 1)).all():
        raise ValueError(
            "agreed must hold booleans (a label that is missing is False: it counts as disagreement)"
        )
    return given.astype(np.bool_)


def _check(scores: Floats, agreeing: Bools, chances: Floats) -> None:
    if not scores.ndim == agreeing.ndim == chances.ndim == 1 or not len(scores) == len(agreeing) == len(
        chances
    ):
        raise ValueError(
            "confidence, agreed and propensity must be one-dimensional and equally long, "
            f"got shapes {scores.shape}, {agreeing.shape} and {chances.shape}"
        )
    if not ((chances > 0.0) & (chances <= 1.0)).all():  # also false for NaN
        raise ValueError("every propensity must lie in (0, 1]")
