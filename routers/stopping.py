"""When a generation is hopeless: which rank before the commit point says that it won't be accepted (STATISTICS.md §6).

Stopping it there saves the tokens that would follow. A generation that would have been accepted is stopped rarely: the
cut is a one-sided tolerance limit (Wilks, "Determination of sample sizes for setting tolerance limits", Annals of
Mathematical Statistics 12, 1941), which holds for any distribution and for a cut that is chosen by looking.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

MOST_STOPPED = 0.01
"""At most this share of the generations that would be accepted is stopped …"""

CERTAINTY = 0.95
"""… so surely."""


def expected_threshold(
    ranks: ArrayLike, max_disagreement: float, *, propensity: ArrayLike | None = None
) -> float | None:
    """The lowest rank from which on at most `max_disagreement` would disagree, if the ranks are right; None: none is.

    `ranks` float[n] are log-odds of agreement; no label is looked at. Which threshold passes isn't known before the
    test, and a stop rule has to be part of what is tested.
    """
    ranked = np.asarray(ranks, dtype=np.float64)
    weights = np.ones(len(ranked)) if propensity is None else 1.0 / np.asarray(propensity, dtype=np.float64)
    usable = np.isfinite(ranked)
    ranked, weights = ranked[usable], weights[usable]
    order = np.argsort(-ranked, kind="stable")
    ranked, weights = ranked[order], weights[order]
    disagreeing = weights / (1.0 + np.exp(np.clip(ranked, -700.0, 700.0)))
    kept = np.flatnonzero(np.cumsum(disagreeing) <= max_disagreement * np.cumsum(weights))
    return float(ranked[kept[-1]]) if len(kept) else None


def stop_below(
    early: ArrayLike,
    accepted: ArrayLike,
    *,
    propensity: ArrayLike | None = None,
    seed: int = 0,
    most_stopped: float = MOST_STOPPED,
    certainty: float = CERTAINTY,
) -> float | None:
    """The rank below which a generation is stopped, or None: too few were accepted to know, or none would be stopped.

    `early` float[n] is the lowest rank of each generation at its checkpoints before the commit point (+∞: it had none,
    NaN: it can't be trusted and counts as lowest), `accepted` bool[n] whether it would be accepted if it went on.
    `propensity` float[n] in (0, 1] as in `routers.promise`: what was labelled more often than the rest is thinned, by
    coins of `seed`. Of accepted generations at most `most_stopped` lie below, with probability `certainty`.
    """
    ranks = np.asarray(early, dtype=np.float64)
    ranks = np.where(np.isnan(ranks), -np.inf, ranks)
    taken = np.asarray(accepted, dtype=np.bool_)
    if ranks.shape != taken.shape or ranks.ndim != 1:
        raise ValueError(
            f"early and accepted must be equally long, got shapes {ranks.shape} and {taken.shape}"
        )
    sample = np.sort(ranks[taken & _thinned(len(ranks), propensity, seed)])
    below = _may_lie_below(len(sample), most_stopped, 1.0 - certainty)
    if below is None or not (ranks < sample[below]).any():
        return None
    # An infinite cut would stop whatever has a checkpoint at all.
    return float(sample[below]) if math.isfinite(sample[below]) else None


def _thinned(size: int, propensity: ArrayLike | None, seed: int) -> NDArray[np.bool_]:
    if propensity is None:
        return np.ones(size, dtype=np.bool_)
    chances = np.asarray(propensity, dtype=np.float64)
    if chances.shape != (size,) or not ((chances > 0.0) & (chances <= 1.0)).all():
        raise ValueError("propensity must hold a number in (0, 1] for every generation")
    kept: NDArray[np.bool_] = np.random.default_rng(seed).random(size) < chances.min(initial=1.0) / chances
    return kept


def _may_lie_below(size: int, share: float, delta: float) -> int | None:
    """The largest k such that the k+1 smallest of `size` draws bound the `share` quantile from below: P(Bin ≤ k) ≤ δ.

    None if not even k = 0 does: fewer than ln δ / ln(1−share) draws.
    """
    total, log_term, found = 0.0, size * math.log1p(-share), None
    log_odds = math.log(share) - math.log1p(-share)
    for k in range(size):
        total += math.exp(log_term)
        if total > delta:
            break
        found = k
        log_term += math.log(size - k) - math.log(k + 1) + log_odds
    return found
