"""Slices: the answers a student gives, one by one (STATISTICS.md §4). An average hides which of them got worse.

Three things are done, and none of them pools small slices into one that then passes. *Veto*: an answer whose own labels
show it to be worse than the promise is left to the teacher. *Shrink*: each answer's rate of disagreement is estimated
between its own and the whole's, by how much answers differ at all. *List*: which answers haven't shown by themselves
what the whole has.

A veto is no part of the promise, so what is held down is the share of vetoes that are mistaken (the false discovery
rate: Benjamini & Hochberg, 1995; slices share no label, so their tests are independent): such a mistake costs one
answer's coverage, and only until the next look. What *is* part of the promise is that no label decides on a veto and
then judges what is left, for what is left would look better than it is: `refused_out_of_fold`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from routers.promise import binomial_tail

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Counts = NDArray[np.int64]
Answers = NDArray[Any]
"""One a label: strings, or numbers that stand for them."""

Standing = Literal["vetoed", "unproven", "shown"]
"""`vetoed`: shown to be worse than α. `shown`: by itself shown to be within it. `unproven`: neither."""


@dataclass(frozen=True, slots=True)
class Slice:
    """One answer among the labels it was judged by, thinned until each stands for as much traffic.

    `labels` and `disagreements` count them, `estimate` is the rate of disagreement shrunk towards the whole's.
    `worse` and `within` are the exact p-values of "at most α" and of "at least α", each slice for itself.
    """

    answer: str
    labels: int
    disagreements: int
    estimate: float
    worse: float
    within: float
    standing: Standing


class SliceVeto:
    """Finds the answers that disagree significantly more than `max_disagreement`, in scikit-learn's manner.

    `level` is the false discovery rate allowed, `seed` that of the thinning's coins. Learned, one entry an answer:
    `answers_`, `labels_`, `disagreements_` (both thinned within the slice), `worse_` (p-values) and `vetoed_`.
    """

    answers_: Answers
    labels_: Counts
    disagreements_: Counts
    worse_: Floats
    vetoed_: Bools

    def __init__(self, max_disagreement: float, *, level: float, seed: int = 0) -> None:
        self.max_disagreement = max_disagreement
        self.level = level
        self.seed = seed

    def fit(self, answer: ArrayLike, agreed: ArrayLike, propensity: ArrayLike | None = None) -> Self:
        """Judge `answer`[n] by `agreed` bool[n], labelled with `propensity` float[n] in (0, 1] (None: equally)."""
        given, agreeing = np.asarray(answer), np.asarray(agreed, dtype=np.bool_)
        self.answers_, place = np.unique(given, return_inverse=True)
        size = len(self.answers_)
        kept = np.ones(len(given), dtype=np.bool_)
        if propensity is not None:
            chances = np.asarray(propensity, dtype=np.float64)
            least = np.ones(size)
            np.minimum.at(least, place, chances)
            kept = np.random.default_rng(self.seed).random(len(given)) < least[place] / chances
        self.labels_ = np.bincount(place[kept], minlength=size).astype(np.int64)
        self.disagreements_ = np.bincount(place[kept & ~agreeing], minlength=size).astype(np.int64)
        self.worse_ = _worse(self.labels_, self.disagreements_, self.max_disagreement)
        self.vetoed_ = _discoveries(
            self.worse_,
            # What couldn't be significant even if all of it disagreed isn't tested: its size alone says so.
            self.max_disagreement**self.labels_ <= self.level,
            self.level,
        )
        return self

    def refuses(self, answer: ArrayLike) -> Bools:
        """Whether each of `answer`[n] is vetoed, bool[n]; what wasn't seen isn't."""
        return np.isin(np.asarray(answer), self.answers_[self.vetoed_])


def refused_out_of_fold(
    veto: SliceVeto, answer: Answers, agreed: Bools, propensity: Floats, folds: Counts, considered: Bools
) -> Bools:
    """Which labels are refused by vetoes that those of the *other* folds give, bool[n].

    Only `considered` labels (at or above a threshold) are judged and judge. `veto` is fitted anew for each fold.
    """
    refused: Bools = np.zeros(len(agreed), dtype=np.bool_)
    for fold in np.unique(folds[considered]):
        judged, judging = considered & (folds == fold), considered & (folds != fold)
        if judging.any():
            veto.fit(answer[judging], agreed[judging], propensity[judging])
            refused[judged] = veto.refuses(answer[judged])
    return refused


def slices(veto: SliceVeto, level: float) -> list[Slice]:
    """Every answer a fitted veto has seen, the worst estimate first; `level` is that of `shown`, each for itself."""
    estimates = shrunk(veto.labels_, veto.disagreements_)
    found = []
    for place, answer in enumerate(veto.answers_.tolist()):
        labels, disagreements = int(veto.labels_[place]), int(veto.disagreements_[place])
        within = binomial_tail(disagreements, labels, veto.max_disagreement)
        standing: Standing = "unproven"
        if veto.vetoed_[place]:
            standing = "vetoed"
        elif within <= level:
            standing = "shown"
        found.append(
            Slice(
                str(answer),
                labels,
                disagreements,
                float(estimates[place]),
                float(veto.worse_[place]),
                within,
                standing,
            )
        )
    return sorted(found, key=lambda one: (-one.estimate, -one.labels, one.answer))


def shrunk(labels: ArrayLike, disagreements: ArrayLike) -> Floats:
    """Each slice's rate of disagreement, float[k]: the mean of a beta-binomial posterior (empirical Bayes).

    The prior's mean is the whole's rate, its strength 1/φ − 1, where φ is the share of the variance that lies between
    slices, estimated by moments (Kleinman, 1973, JASA 68). Slices that differ no more than chance get the whole's rate.
    """
    n = np.asarray(labels, dtype=np.float64)
    d = np.asarray(disagreements, dtype=np.float64)
    total = n.sum()
    if total == 0:
        return np.full(len(n), np.nan)
    mean = d.sum() / total
    known = n > 0
    freedom = known.sum() - 1
    room = total - (n**2).sum() / total - freedom
    variance = mean * (1.0 - mean)
    if variance == 0.0 or room <= 0.0:
        return np.full(len(n), mean)
    spread = (n[known] * (d[known] / n[known] - mean) ** 2).sum()
    between = min((spread / variance - freedom) / room, 1.0)
    if between <= 0.0:
        return np.full(len(n), mean)
    strength = 1.0 / between - 1.0
    estimate: Floats = np.full(len(n), mean)
    np.divide(d + strength * mean, n + strength, out=estimate, where=n + strength > 0)
    return estimate


def _worse(labels: Counts, disagreements: Counts, alpha: float) -> Floats:
    """P(X ≥ disagreements), X ~ Binomial(labels, alpha); 1 where no more disagree than α of them: no need to know."""
    found = np.ones(len(labels))
    for place in np.flatnonzero(disagreements > alpha * labels):
        n, d = int(labels[place]), int(disagreements[place])
        found[place] = binomial_tail(n - d, n, 1.0 - alpha) if d < n else alpha**n
    return found


def _discoveries(p_values: Floats, tested: Bools, level: float) -> Bools:
    """Benjamini & Hochberg's step-up among the tested: the false discovery rate is at most `level`."""
    found: Bools = np.zeros(len(p_values), dtype=np.bool_)
    count = int(tested.sum())
    if count == 0:
        return found
    ranked = np.sort(p_values[tested])
    low = np.flatnonzero(ranked <= level * np.arange(1, count + 1) / count)
    if len(low):
        found = tested & (p_values <= ranked[low[-1]])
    return found
