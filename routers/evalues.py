"""The promise tested by betting: evidence that may be looked at after every label (STATISTICS.md §3, "E-process").

Whoever bets against "at least α of what is accepted disagrees" at fair odds, and has multiplied the stake by 1/δ at any
time, has evidence of level δ: under that hypothesis the stake is a nonnegative supermartingale, which ever reaches 1/δ
with probability δ at the most (Ville, 1939; Waudby-Smith & Ramdas, arXiv 2010.09686). The hypothesis has to stand still
meanwhile. So a level is a threshold of a candidate that was fixed before the first label that is bet on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from routers.promise import Admission, Level, check_terms
from routers.shortfall import MOST, labels_short

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

FRACTIONS: Floats = np.array([0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 0.9, 1.0])
"""The shares of the stake that are bet, in equal parts. The best one for a rate of disagreement p is 1 − p/α."""


def log_evidence(gain: ArrayLike, worst: ArrayLike) -> Floats:
    """The logarithm of the stake after each bet, float[n]; it begins at 0.

    `gain` float[n] has a mean of 0 or less under the hypothesis, whatever came before, and `worst` float[n] > 0 is the
    most that could be lost at that moment, known before it was: gain ≥ −worst. ValueError where one is below.
    """
    gains, losses = np.asarray(gain, dtype=np.float64), np.asarray(worst, dtype=np.float64)
    if gains.shape != losses.shape or gains.ndim != 1:
        raise ValueError(
            f"gain and worst must be one-dimensional and equally long, got {gains.shape}, {losses.shape}"
        )
    if not ((losses > 0.0) & (gains >= -losses * (1.0 + 1e-12)) & np.isfinite(gains)).all():
        raise ValueError("no gain may be below what could be lost at the most: worst > 0 and gain >= -worst")
    factors = 1.0 + np.multiply.outer(FRACTIONS, np.maximum(gains / losses, -1.0))
    with np.errstate(divide="ignore"):  # who bets everything may lose everything
        stakes = np.cumsum(np.log(factors), axis=1)
    largest = stakes.max(axis=0, initial=-np.inf)
    evidence: Floats = largest + np.log(np.exp(stakes - largest).mean(axis=0))
    return evidence


def betting_tail(disagreements: int, accepted: int, alpha: float) -> float:
    """1 over the stake after so many labels of equal propensity, in whatever order: the p-value of bets on them."""
    agreed = accepted - disagreements
    with np.errstate(divide="ignore", invalid="ignore"):
        won = agreed * np.log1p(FRACTIONS * alpha / (1.0 - alpha))
        lost = np.where(disagreements > 0, disagreements * np.log1p(-FRACTIONS), 0.0)
    stakes = won + lost
    largest = float(stakes.max())
    return math.exp(-max(0.0, largest + math.log(float(np.exp(stakes - largest).mean()))))


class BettingPromise:
    """At most `max_disagreement` (α) of what is accepted disagrees, with probability `certainty` (1−δ), at any time.

    The counterpart of `routers.promise.Promise` for thresholds that were fixed beforehand and labels that come one by
    one. Both are in (0, 1); ValueError otherwise.
    """

    def __init__(self, max_disagreement: float, certainty: float) -> None:
        check_terms(max_disagreement, certainty)
        self.max_disagreement = max_disagreement
        self.certainty = certainty

    @property
    def least_accepted(self) -> int:
        """The accepted labels of equal propensity, all agreeing, without which no level can pass."""
        clean, _ = labels_short(0, 0, self.max_disagreement, 1.0 - self.certainty, betting_tail)
        return MOST if clean is None else clean

    def admit(
        self,
        rank: ArrayLike,
        agreed: ArrayLike,
        levels: Sequence[float],
        *,
        propensity: ArrayLike | None = None,
        least: ArrayLike | None = None,
        refused: Sequence[ArrayLike] | None = None,
    ) -> Admission:
        """Test the thresholds `levels`, strict to loose, on labels in the order in which they came.

        `rank` float[n] (what isn't finite is never accepted) and `agreed` bool[n] are those of labels that came after
        the levels were fixed; `propensity` float[n] is the probability with which each was labelled and `least` the
        smallest that any request could have had at that moment (both None: all the same, the reference test).
        `refused` holds bool[n] a level: whose answers wouldn't be served there, by rules fixed with the levels. A level
        passes for good once its evidence has reached 1/δ; its `p_value` is 1 over the most it ever had.
        """
        ranks, agreeing = np.asarray(rank, dtype=np.float64), np.asarray(agreed, dtype=np.bool_)
        chances = np.ones(len(ranks)) if propensity is None else np.asarray(propensity, dtype=np.float64)
        floors = np.ones(len(ranks)) if least is None else np.asarray(least, dtype=np.float64)
        if not len(ranks) == len(agreeing) == len(chances) == len(floors):
            raise ValueError("rank, agreed, propensity and least must be equally long")
        if not ((floors > 0.0) & (floors <= chances) & (chances <= 1.0)).all():
            raise ValueError("every propensity must lie in (0, 1], none below the least possible at its time")
        weights = 1.0 / chances
        total = float(weights.sum())
        alpha = self.max_disagreement
        tested: list[Level] = []
        best: Level | None = None
        for place, cut in enumerate(levels):
            accepted = np.isfinite(ranks) & (ranks >= cut)
            if refused is not None:
                accepted &= ~np.asarray(refused[place], dtype=np.bool_)
            gain = weights[accepted] * np.where(agreeing[accepted], alpha, alpha - 1.0)
            evidence = log_evidence(gain, (1.0 - alpha) / floors[accepted])
            p_value = math.exp(-max(0.0, float(evidence.max(initial=0.0))))
            passed = p_value <= 1.0 - self.certainty + 1e-12
            coverage = float(weights[accepted].sum()) / total if total else 0.0
            disagreements = int((~agreeing[accepted]).sum())
            tested.append(Level(coverage, cut, int(accepted.sum()), disagreements, p_value, passed))
            if not passed:
                break
            best = tested[-1]
        if best is None:
            return Admission(None, None, tested)
        return Admission(best.threshold, best.coverage, tested)
