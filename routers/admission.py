"""Whether a student may go live, and with which rules: the promise, and the answers' own (STATISTICS.md §3 and §4).

Answers that are named with a bound of their own are tested each by itself, on its own labels alone, and all the others
together, less what is vetoed. No label counts in two of these tests, and a named answer's bound is at most α: when all
hold, what is served disagrees at most α, whichever of the named answers are among it. The tests share δ: with named
answers, half of it is theirs, in equal parts, and the rest the others'; without, all of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from numpy.typing import ArrayLike, NDArray

from routers.looks import tested_grid
from routers.promise import Admission, Promise
from routers.slices import Slice, SliceVeto, refused_out_of_fold, slices

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

FOLDS = 5

Skipped = Callable[[Bools, Bools | None], Bools]
"""Says which of n requests aren't shown to the student, bool[n], given which of those that may be looked at (the second
bool[n]; None: all) would be accepted."""

NAMED_SHARE = 0.5
"""The part of δ that the named answers' tests share."""


@dataclass(frozen=True, slots=True)
class AnswerTerms:
    """What a task's owner says about answers, by their keys.

    `always_escalate` are those only the teacher may give; `prove` are those that are served only once they have kept a
    bound of their own. One that is both is the teacher's.
    """

    always_escalate: frozenset[str] = frozenset()
    prove: Mapping[str, float] = field(default_factory=dict)

    @property
    def named(self) -> dict[str, float]:
        """The answers that have something to prove."""
        return {key: bound for key, bound in self.prove.items() if key not in self.always_escalate}

    def shares(self, delta: float) -> tuple[float, float]:
        """What of `delta` the test of all others may spend, and each of the named answers'."""
        if not self.named:
            return delta, 0.0
        return delta * (1.0 - NAMED_SHARE), delta * NAMED_SHARE / len(self.named)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What came of testing a student.

    `whole` is the test of the answers that aren't named, with `delta`; `named` that of each named one, with
    `named_delta` (coverage there is that of its own traffic), and `given` counts the labels whose answer it is.
    `vetoed` and `slices` are found on the labels at or above `whole`'s threshold, or, where no level passed, at or
    above the last one tested. `accepted` bool[n] says which of the labelled exchanges would be served, `refused` which
    aren't there by vetoes that labels of other folds give: those no label of theirs had a hand in.
    """

    whole: Admission
    named: dict[str, Admission]
    given: dict[str, int]
    delta: float
    named_delta: float
    vetoed: frozenset[str]
    slices: list[Slice]
    accepted: Bools
    refused: Bools

    @property
    def passed(self) -> bool:
        """Whether anything may be served."""
        return self.whole.threshold is not None or bool(self.proven)

    @property
    def rank_threshold(self) -> float:
        """The rank from which answers that aren't named are served; ∞ where no level passed."""
        return math.inf if self.whole.threshold is None else self.whole.threshold

    @property
    def proven(self) -> dict[str, float]:
        """The named answers that passed, with the rank from which each is served."""
        return {key: test.threshold for key, test in self.named.items() if test.threshold is not None}

    @property
    def unproven(self) -> frozenset[str]:
        """The named answers that didn't."""
        return frozenset(self.named) - frozenset(self.proven)


def admit(
    rank: ArrayLike,
    answer: Sequence[str | None],
    agreed: ArrayLike,
    propensity: ArrayLike,
    *,
    max_disagreement: float,
    delta: float,
    level: float,
    terms: AnswerTerms,
    seed: int,
    skipping: Skipped | None = None,
) -> Verdict:
    """Test n labelled exchanges: the `rank` and `answer` key a student gives that hasn't seen them, and if it `agreed`.

    `propensity` is as in `Promise`, `delta` what the tests together may spend. Vetoes allow a false discovery rate of
    `level`, and those that refuse a label come from folds without it; `seed` deals the folds as students are fitted on
    them (cross_fit), and thins. An answer without a key (None: it isn't known yet when the answer is judged) is no
    slice's: no rule about answers can be applied to it then. `skipping` says what the student isn't shown. Raises
    ValueError for arrays that don't fit together.
    """
    ranks = np.asarray(rank, dtype=np.float64)
    agreeing = np.asarray(agreed, dtype=np.bool_)
    chances = np.asarray(propensity, dtype=np.float64)
    folds = np.random.default_rng(seed).permutation(len(ranks)) % FOLDS
    # As objects: an array of strings is as wide everywhere as the longest answer of a language model.
    keys, place = np.unique(
        np.array(["" if key is None else key for key in answer], dtype=object), return_inverse=True
    )
    if len(ranks) != len(place):
        raise ValueError(f"rank and answer must be equally long, got {len(ranks)} and {len(place)}")
    known = np.array([key is not None for key in answer], dtype=np.bool_)
    named, (whole_delta, named_delta) = terms.named, terms.shares(delta)
    is_named = np.isin(keys, list(named))[place] & known & np.isfinite(ranks)
    ruled = np.isin(keys, [*named, *terms.always_escalate])[place] & known
    others = ~ruled & np.isfinite(ranks)
    promise = Promise(max_disagreement, 1.0 - whole_delta, seed=seed)
    veto = SliceVeto(max_disagreement, level=level, seed=seed)

    def accepted_by(considered: Bools, judging: Bools) -> Bools:
        """Which of the `judging` are accepted, by vetoes that come from them; named answers as if they had passed."""
        judged = considered & judging
        sliced = judged & known
        veto.fit(place[sliced], agreeing[sliced], chances[sliced])
        named_too: Bools = judging & is_named & (ranks >= ranks[considered].min())
        return (judged & ~(veto.refuses(place) & known)) | named_too

    def shown(skipping: Skipped, considered: Bools) -> Bools:
        """Whom the student is shown at a level, by what would be skipped for the labels of the other folds."""
        found: Bools = np.ones(len(ranks), dtype=np.bool_)
        for fold in range(FOLDS):
            judging = folds != fold
            found[~judging] = ~skipping(accepted_by(considered, judging), judging)[~judging]
        return found

    whole = promise.admit(
        # What isn't tested here ranks below everything.
        np.where(others, ranks, -np.inf),
        agreeing,
        propensity=chances,
        grid=_grid(chances, promise),
        refused=lambda served: refused_out_of_fold(veto, place, agreeing, chances, folds, served & known),
        shown=None if skipping is None else partial(shown, skipping),
    )
    left_out: Bools = np.zeros(len(ranks), dtype=np.bool_)
    if skipping is not None and whole.threshold is not None:
        # Named answers have no hand in it: their own tests may heed it.
        above = others & (ranks >= whole.threshold)
        left_out = skipping(accepted_by(above, np.ones(len(ranks), dtype=np.bool_)), None)
    tests: dict[str, Admission] = {}
    given: dict[str, int] = {}
    for key, bound in named.items():
        own = (keys == key)[place] & known
        given[key] = int(own.sum())
        proof = Promise(bound, 1.0 - named_delta, seed=seed)
        tests[key] = proof.admit(
            ranks[own],
            agreeing[own],
            propensity=chances[own],
            grid=_grid(chances[own], proof),
            shown=partial(_always, ~left_out[own]),
        )
    tested = [one.threshold for one in whole.levels if one.p_value is not None]
    cut = whole.threshold if whole.threshold is not None else tested[-1] if tested else -np.inf
    judged = others & (ranks >= cut)
    sliced = judged & known
    refused = refused_out_of_fold(veto, place, agreeing, chances, folds, sliced)
    veto.fit(place[sliced], agreeing[sliced], chances[sliced])
    accepted = judged & ~(veto.refuses(place) & known) & (whole.threshold is not None)
    for key, test in tests.items():
        if test.threshold is not None:
            accepted |= (keys == key)[place] & known & (ranks >= test.threshold)
    accepted &= ~left_out
    vetoed = frozenset(keys[veto.answers_[veto.vetoed_]].tolist())
    # The report counts and names answers, not their places.
    veto.answers_ = keys[veto.answers_]
    return Verdict(
        whole, tests, given, whole_delta, named_delta, vetoed, slices(veto, level), accepted, refused
    )


def _always(shown: Bools, _: Bools) -> Bools:
    return shown


def _grid(chances: Floats, promise: Promise) -> list[float]:
    """The levels worth testing with so many labels of unequal propensity."""
    labels = float((chances.min() / chances).sum()) if len(chances) else 0.0
    return tested_grid(labels, promise.least_accepted)
