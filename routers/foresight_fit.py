"""Fitting foresight (`routers.foresight`), and choosing from where on the student isn't asked. NumPy only.

What is fitted is a ridge regression (Hoerl & Kennard, 1970) of the student's rank on the request's text. It knows no
threshold, so that one fit serves every level a look tests. No label has a hand in its own exchange: ranks are
cross-fitted, and what is foreseen of a row comes from the other folds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from routers.foresight import OWN_S, WIDTH, features
from routers.promise import binomial_tail

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

FOLDS = 5
_BATCH = 2000
_CUTS = 20
"""So many of the allowed cuts are weighed against each other."""


class ForesightRegression:
    """The share of traffic that ranks below, from texts. `penalty` is ridge's λ; the constant isn't penalised."""

    weights_: Floats
    bias_: float

    def __init__(self, penalty: float = 1.0) -> None:
        self.penalty = penalty

    def fit(self, X: Floats, y: Floats, sample_weight: Floats | None = None) -> Self:
        """Fit to features [n, WIDTH] (see `design`) and shares float[n] in [0, 1].

        The weights count relative to their mean, so that the penalty means the same whatever their scale. Raises
        ValueError without rows.
        """
        if len(X) == 0:
            raise ValueError("nothing to foresee from: there are no rows")
        weights = np.ones(len(X)) if sample_weight is None else sample_weight / sample_weight.mean()
        centre, level = np.average(X, axis=0, weights=weights), float(np.average(y, weights=weights))
        gram, moments = np.zeros((X.shape[1], X.shape[1])), np.zeros(X.shape[1])
        for begin in range(0, len(X), _BATCH):  # a copy of everything, weighted, would double the memory
            batch = slice(begin, begin + _BATCH)
            centred = X[batch] - centre
            weighted = centred * weights[batch, None]
            gram += weighted.T @ centred
            moments += weighted.T @ (y[batch] - level)
        gram[np.diag_indices_from(gram)] += self.penalty
        self.weights_ = np.asarray(np.linalg.solve(gram, moments), dtype=np.float64)
        self.bias_ = level - float(centre @ self.weights_)
        return self

    def predict(self, X: Floats) -> Floats:
        """What is foreseen of each row, float[n]."""
        foreseen: Floats = X @ self.weights_ + self.bias_
        return foreseen


def design(texts: Sequence[str]) -> Floats:
    """The features of texts as a matrix float[n, WIDTH]."""
    X = np.zeros((len(texts), WIDTH))
    for row, text in enumerate(texts):
        found = features(text)
        X[row, list(found)] = list(found.values())
    return X


def shares_below(ranks: Floats, weights: Floats) -> Floats:
    """For each row the share of all (by weight) that rank below it, float[n] in [0, 1); 0 for what isn't finite."""
    usable = np.where(np.isfinite(ranks), ranks, -np.inf)
    order = np.argsort(usable, kind="stable")
    below = np.concatenate([[0.0], np.cumsum(weights[order])])
    shares: Floats = below[np.searchsorted(usable[order], usable, side="left")] / below[-1]
    return shares


def foreseen_out_of_fold(X: Floats, shares: Floats, weights: Floats, *, seed: int) -> Floats:
    """What models that hadn't seen a row foresee of it, float[n]. `seed` deals the folds.

    A row whose fold is all there is gets +∞: nothing is known of it, and it is never skipped.
    """
    folds = np.random.default_rng(seed).permutation(len(X)) % FOLDS
    foreseen = np.full(len(X), np.inf)
    for fold in range(FOLDS):
        held_out = folds == fold
        if held_out.any() and not held_out.all():
            fitted = ForesightRegression().fit(X[~held_out], shares[~held_out], weights[~held_out])
            foreseen[held_out] = fitted.predict(X[held_out])
    return foreseen


@dataclass(frozen=True, slots=True)
class Stakes:
    """What is at stake a request, on average: seconds and USD of student and teacher, and USD a second of waiting."""

    student_s: float
    student_usd: float
    teacher_s: float
    teacher_usd: float
    waiting_usd_per_s: float

    def worth(self, skipped: float, lost: float) -> float:
        """USD a request that skipping is worth (below 0: that it costs).

        `skipped` and `lost` are shares of the traffic: not shown to the student, and those of them that it would have
        answered, for which the teacher is paid and waited for instead. Foreseeing takes `OWN_S` of every request.
        """
        spared = self.student_usd + self.student_s * self.waiting_usd_per_s
        instead = self.teacher_usd + self.teacher_s * self.waiting_usd_per_s
        own = OWN_S * (
            self.waiting_usd_per_s + (self.student_usd / self.student_s if self.student_s else 0.0)
        )
        return skipped * spared - lost * instead - own


@dataclass(frozen=True, slots=True)
class Skipping:
    """Where to stop asking the student: `below` what is foreseen.

    `skipped` is the share of the traffic, `lost` of `of` accepted labels are wrongly among them, and `lost_at_most` is
    the exact upper bound of the share of accepted traffic that is lost. `worth_usd` is what it is worth a request by
    that bound.
    """

    below: float
    skipped: float
    lost: int
    of: int
    lost_at_most: float
    worth_usd: float


def choose_skipping(
    foreseen: Floats,
    accepted: Bools,
    sampled: Bools,
    weights: Floats,
    *,
    at_most: float,
    certainty: float,
    stakes: Stakes,
) -> Skipping | None:
    """The cut that is worth most among those that provably lose little; None when none is worth anything.

    `sampled` bool[n] says which rows are a simple random sample of the traffic. Among those accepted the lost are
    counted: a cut is allowed when the one-sided Clopper–Pearson bound (1934) of their share is at most `at_most`.
    Cuts are tested from the lowest on until one fails, so that choosing among them costs no certainty (fixed sequence).
    Knows ranks and texts and no label: what it leaves accepted is for the promise to test.
    """
    tested = np.sort(foreseen[accepted & sampled])
    of = len(tested)
    share = float(weights[accepted].sum() / weights.sum())
    order = np.argsort(foreseen, kind="stable")
    ranked, below = foreseen[order], np.concatenate([[0.0], np.cumsum(weights[order])]) / weights.sum()
    best: Skipping | None = None
    allowed = 0
    while allowed < of and binomial_tail(allowed, of, at_most) <= 1.0 - certainty:
        allowed += 1
    for lost in sorted({(allowed - 1) * step // (_CUTS - 1) for step in range(_CUTS)} if allowed else ()):
        cut = float(tested[lost])  # strictly below it lie `lost` at most
        skipped = float(below[np.searchsorted(ranked, cut, side="left")])
        bound = upper_bound(lost, of, certainty)
        worth = stakes.worth(skipped, bound * share)
        if np.isfinite(cut) and worth > (0.0 if best is None else best.worth_usd):
            best = Skipping(cut, skipped, int((tested < cut).sum()), of, bound, worth)
    return best


def upper_bound(lost: int, of: int, certainty: float) -> float:
    """The one-sided Clopper–Pearson upper bound of a share: the largest that `lost` of `of` don't speak against."""
    if lost >= of:
        return 1.0
    low, high = lost / of, 1.0
    for _ in range(36):  # to 2e-11
        middle = (low + high) / 2.0
        low, high = (middle, high) if binomial_tail(lost, of, middle) > 1.0 - certainty else (low, middle)
    return high
