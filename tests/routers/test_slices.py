"""Slices: which answers are vetoed, how their rates are shrunk, and that no label vetoes what it then judges."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom, false_discovery_control

from routers.promise import Promise
from routers.slices import SliceVeto, refused_out_of_fold, shrunk, slices

ALPHA = DELTA = 0.1

counts = st.lists(st.tuples(st.integers(0, 40), st.floats(0, 1)), min_size=1, max_size=30)


def labels_of(made: list[tuple[int, int]]) -> tuple[list[str], list[bool]]:
    """Answers "00", "01", …, each with so many labels of which so many disagree."""
    answers = [f"{k:02}" for k, (labels, _) in enumerate(made) for _ in range(labels)]
    return answers, [i >= wrong for labels, wrong in made for i in range(labels)]


@given(counts)
def test_vetoes_are_benjamini_and_hochbergs_on_scipys_exact_p_values(drawn: list[tuple[int, float]]) -> None:
    made = [(labels, round(share * labels)) for labels, share in drawn]
    answers, agreed = labels_of(made)
    veto = SliceVeto(ALPHA, level=DELTA).fit(answers, agreed)
    known = [(n, d) for n, d in made if n]
    assert veto.labels_.tolist() == [n for n, _ in known]
    assert veto.disagreements_.tolist() == [d for _, d in known]
    if known:
        exact = np.array([binom.sf(d - 1, n, ALPHA) for n, d in known])
        worse = np.array([d > ALPHA * n for n, d in known])
        assert veto.worse_[worse] == pytest.approx(exact[worse], rel=1e-8)
        expected = false_discovery_control(np.where(worse, exact, 1.0)) <= DELTA
        assert veto.vetoed_.tolist() == expected.tolist()


def test_an_answer_too_rare_to_be_significant_takes_nothing_from_the_others() -> None:
    worse, rare = [(60, 13)], [(1, 1)] * 400
    alone = SliceVeto(0.1, level=0.05).fit(*labels_of(worse)).vetoed_
    among = SliceVeto(0.1, level=0.05).fit(*labels_of(worse + rare))
    assert alone.tolist() == [True]
    assert among.vetoed_.tolist() == [True] + [False] * 400


def test_small_slices_are_not_pooled() -> None:
    """Together ten answers are shown to be worse, none of them by itself: none is vetoed."""
    veto = SliceVeto(ALPHA, level=DELTA).fit(*labels_of([(10, 2)] * 10))
    assert binom.sf(19, 100, ALPHA) < 0.003
    assert not veto.vetoed_.any()
    assert {one.standing for one in slices(veto, DELTA)} == {"unproven"}


def test_standings() -> None:
    veto = SliceVeto(ALPHA, level=DELTA).fit(*labels_of([(60, 20), (10, 1), (60, 0)]))
    found = slices(veto, DELTA)
    assert [(one.answer, one.standing) for one in found] == [
        ("00", "vetoed"),
        ("01", "unproven"),
        ("02", "shown"),
    ]
    assert veto.refuses(["00", "01", "never seen"]).tolist() == [True, False, False]


@pytest.mark.parametrize("wrong", [0, 30])
def test_all_agree_and_all_disagree(wrong: int) -> None:
    veto = SliceVeto(ALPHA, level=DELTA).fit(*labels_of([(30, wrong), (30, wrong)]))
    assert veto.vetoed_.tolist() == [wrong > 0] * 2
    assert [one.estimate for one in slices(veto, DELTA)] == [wrong / 30] * 2


def test_nothing_at_all() -> None:
    veto = SliceVeto(ALPHA, level=DELTA).fit(np.array([], dtype=str), [], [])
    assert slices(veto, DELTA) == []
    assert not veto.refuses(["x"]).any()
    assert shrunk([], []).tolist() == []
    assert np.isnan(shrunk([0, 0], [0, 0])).all()


def test_labels_of_unequal_propensity_are_thinned_within_their_slice() -> None:
    """Of "a" all wrong answers came to light and one in ten of the right ones: 30 % look wrong, 4 % are."""
    rng = np.random.default_rng(0)
    wrong = rng.random(4000) < 0.04
    chances = np.where(wrong, 1.0, 0.1)
    seen = rng.random(4000) < chances
    answer = np.where(rng.random(4000) < 0.5, "a", "b")[seen]
    assert SliceVeto(ALPHA, level=DELTA).fit(answer, ~wrong[seen]).vetoed_.all()
    veto = SliceVeto(ALPHA, level=DELTA).fit(answer, ~wrong[seen], chances[seen])
    assert not veto.vetoed_.any()
    kept = chances[seen] == 0.1
    assert (veto.labels_ >= [(kept & (answer == key)).sum() for key in "ab"]).all(), "the rarest are all kept"
    # Each slice by its own smallest propensity: one that was always labelled keeps all it has.
    always = SliceVeto(ALPHA, level=DELTA).fit(
        np.append(answer, ["c"] * 50),
        np.append(~wrong[seen], [True] * 50),
        np.append(chances[seen], [1.0] * 50),
    )
    assert always.labels_[2] == 50


@given(st.lists(st.tuples(st.integers(0, 200), st.floats(0, 1)), min_size=1, max_size=30))
def test_a_shrunk_rate_lies_between_its_own_and_the_wholes(drawn: list[tuple[int, float]]) -> None:
    n = np.array([labels for labels, _ in drawn])
    d = np.array([round(labels * share) for labels, share in drawn])
    if n.sum() == 0:
        return
    whole = d.sum() / n.sum()
    own = np.divide(d, n, out=np.full(len(n), whole), where=n > 0)
    estimate = shrunk(n, d)
    slack = 1e-12
    assert (estimate >= np.minimum(own, whole) - slack).all()
    assert (estimate <= np.maximum(own, whole) + slack).all()


def test_shrinking_finds_the_rates_of_a_beta_prior() -> None:
    """200 slices of 30 labels from Beta(2, 18): the estimates miss the truth by less than either extreme does."""
    rng = np.random.default_rng(4)
    truth = rng.beta(2, 18, 200)
    n = np.full(200, 30)
    d = rng.binomial(n, truth)
    strength = 20  # a + b of the prior
    assert shrunk(n, d) == pytest.approx((d + strength * 0.1) / (n + strength), abs=0.03)
    miss = {
        name: float(np.mean((guess - truth) ** 2))
        for name, guess in {"own": d / n, "whole": d.sum() / n.sum(), "shrunk": shrunk(n, d)}.items()
    }
    assert miss["shrunk"] < 0.8 * min(miss["own"], miss["whole"])


def test_slices_that_differ_by_chance_alone_get_the_wholes_rate() -> None:
    n, d = [50, 50, 50, 50], [5, 4, 6, 5]
    assert shrunk(n, d) == pytest.approx([0.1] * 4)


def broken(*, own_labels: bool, lives: int = 100) -> int:
    """Lives in which what is left of 100 answers, 60 of them at 30 % and 40 at 0 %, is admitted and disagrees more."""
    count = 0
    for seed in range(lives):
        rng = np.random.default_rng(seed)
        rates = np.where(np.arange(100) < 60, 0.3, 0.0)
        answer = rng.integers(0, 100, 1500)
        agreed = rng.random(1500) >= rates[answer]
        chances = np.ones(1500)
        folds = rng.permutation(1500) % 5
        veto = SliceVeto(ALPHA, level=DELTA)

        def refused(
            served: np.ndarray[tuple[int], np.dtype[np.bool_]],
        ) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
            if own_labels:
                return veto.fit(answer[served], agreed[served]).refuses(answer)  # noqa: B023
            return refused_out_of_fold(veto, answer, agreed, chances, folds, served)  # noqa: B023

        admission = Promise(ALPHA, 1 - DELTA).admit(rng.random(1500), agreed, grid=[1.0], refused=refused)
        left = ~veto.fit(answer, agreed).refuses(np.arange(100))
        count += admission.threshold is not None and bool(rates[left].mean() > ALPHA)
    return count


def test_vetoes_by_the_labels_that_test_the_rest_would_break_the_promise() -> None:
    """What significance takes away is unlucky as well as bad, and what it leaves is lucky as well as good."""
    assert broken(own_labels=True) > 30
    assert binom.sf(broken(own_labels=False) - 1, 100, DELTA) > 1e-3


def test_a_label_has_no_hand_in_its_own_refusal() -> None:
    rng = np.random.default_rng(2)
    answer = rng.integers(0, 4, 300)
    agreed = rng.random(300) >= np.array([0.5, 0.3, 0.1, 0.0])[answer]
    folds = rng.permutation(300) % 5
    considered = rng.random(300) < 0.8
    veto = SliceVeto(ALPHA, level=DELTA)
    before = refused_out_of_fold(veto, answer, agreed, np.ones(300), folds, considered)
    assert before.any() and not before[~considered].any()
    for fold in range(5):
        turned = np.where(folds == fold, ~agreed, agreed)
        after = refused_out_of_fold(veto, answer, turned, np.ones(300), folds, considered)
        assert (after == before)[folds == fold].all()


def test_many_labels_of_one_answer_cost_no_precision() -> None:
    veto = SliceVeto(0.01, level=0.1).fit(["x"] * 50_000, np.arange(50_000) >= 560)
    assert veto.worse_[0] == pytest.approx(binom.sf(559, 50_000, 0.01), rel=1e-6)
    assert math.isfinite(veto.worse_[0])
