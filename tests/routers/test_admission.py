"""Testing a student: the whole, the vetoes within it, and the answers that are named."""

from __future__ import annotations

import math
import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import binom, binomtest

from routers.admission import AnswerTerms, Verdict, admit
from routers.promise import Promise

ALPHA = DELTA = 0.1


def verdict(
    answer: NDArray[Any], agreed: NDArray[np.bool_], *, ranks: NDArray[np.float64] | None = None, **more: Any
) -> Verdict:
    terms = AnswerTerms(frozenset(more.pop("always_escalate", ())), more.pop("prove", {}))
    chances = more.pop("propensity", np.ones(len(answer)))
    ranks = np.random.default_rng(9).random(len(answer)) if ranks is None else ranks
    asked = {"max_disagreement": ALPHA, "delta": DELTA, "level": DELTA, "seed": 1, **more}
    return admit(ranks, answer.tolist(), agreed, chances, terms=terms, **asked)


def drawn(
    seed: int, labels: int, rates: dict[str, float], shares: list[float] | None = None
) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    rng = np.random.default_rng(seed)
    answer = rng.choice(list(rates), labels, p=shares)
    return answer, rng.random(labels) >= np.array([rates[key] for key in answer])


def test_without_rules_it_is_the_promise() -> None:
    answer, agreed = drawn(1, 600, {"a": 0.03, "b": 0.03})
    ranks = np.random.default_rng(3).random(600)
    found = verdict(answer, agreed, ranks=ranks)
    alone = Promise(ALPHA, 1 - DELTA, seed=1).threshold(ranks, agreed)
    assert found.rank_threshold == alone
    assert found.passed and found.vetoed == frozenset() and found.proven == {}
    assert (found.accepted == (ranks >= found.rank_threshold)).all()
    assert (found.delta, found.named_delta) == (DELTA, 0.0)


def test_a_bad_answer_is_vetoed_and_the_rest_goes_live() -> None:
    answer, agreed = drawn(2, 900, {"a": 0.02, "b": 0.02, "bad": 0.5})
    assert Promise(ALPHA, 1 - DELTA).threshold(np.random.default_rng(9).random(900), agreed) is None
    found = verdict(answer, agreed)
    assert found.vetoed == {"bad"}
    assert found.whole.threshold is not None
    assert found.accepted.sum() == ((answer != "bad") & (found.accepted)).sum() > 500
    assert found.slices[0].answer == "bad"
    assert found.whole.coverage == pytest.approx(found.accepted.mean(), abs=0.02)


def test_an_answer_that_must_prove_itself() -> None:
    rates, shares = {"a": 0.03, "refund": 0.0}, [0.7, 0.3]
    few = verdict(*drawn(3, 300, rates, shares), prove={"refund": 0.01})
    assert few.unproven == {"refund"} and few.proven == {} and few.whole.threshold is not None
    assert few.delta == DELTA / 2 and few.named_delta == DELTA / 2
    answer = drawn(3, 300, rates, shares)[0]
    assert not few.accepted[answer == "refund"].any()
    assert sum(level.accepted for level in few.whole.levels[-1:]) <= (answer != "refund").sum()
    many = verdict(*drawn(3, 2000, rates, shares), prove={"refund": 0.01})
    assert set(many.proven) == {"refund"} and many.unproven == frozenset()


def test_named_answers_share_their_half_of_delta() -> None:
    answer, agreed = drawn(4, 600, {"a": 0.0, "b": 0.0, "c": 0.0})
    found = verdict(answer, agreed, prove={"a": 0.1, "b": 0.05, "new": 0.05})
    assert found.named_delta == pytest.approx(DELTA / 2 / 3)
    assert found.given == {"a": (answer == "a").sum(), "b": (answer == "b").sum(), "new": 0}
    assert found.unproven == {"new"}
    assert found.named["new"].levels == []


def test_where_every_answer_is_named_what_passed_is_served_all_the_same() -> None:
    answer, agreed = drawn(5, 800, {"yes": 0.0, "no": 0.3})
    found = verdict(answer, agreed, prove={"yes": 0.05, "no": 0.05})
    assert found.passed and found.rank_threshold == math.inf
    assert set(found.proven) == {"yes"} and found.unproven == {"no"}
    assert set(answer[found.accepted]) == {"yes"}
    assert found.whole.threshold is None and found.slices == []


def test_a_named_answer_is_not_vetoed_and_what_escalates_is_neither() -> None:
    answer, agreed = drawn(6, 900, {"a": 0.0, "bad": 0.6, "worse": 0.9})
    found = verdict(answer, agreed, prove={"bad": 0.1, "worse": 0.1}, always_escalate=["worse"])
    assert found.vetoed == frozenset()
    assert found.unproven == {"bad"}, "what always escalates has nothing to prove"
    assert [one.answer for one in found.slices] == ["a"]


@pytest.mark.parametrize("labels", [0, 1, 10])
def test_a_handful_of_labels_proves_nothing(labels: int) -> None:
    answer, agreed = np.array(["a"] * labels, dtype=str), np.ones(labels, bool)
    found = verdict(answer, agreed, prove={"b": 0.05})
    assert not found.passed and not found.accepted.any() and found.vetoed == frozenset()


def test_one_long_answer_costs_its_own_length() -> None:
    """A language model writes what it likes: an array of strings would be as wide everywhere as the longest."""
    answer, agreed = drawn(2, 900, {"a": 0.02, "b": 0.02, "bad": 0.5})
    long = np.array(["x" * 200_000, *answer[1:]], dtype=object)
    tracemalloc.start()
    try:
        found = verdict(long, agreed)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert found.vetoed == {"bad"}
    assert peak < 20e6


@pytest.mark.parametrize("disagree", [False, True])
def test_one_class(disagree: bool) -> None:
    found = verdict(np.array(["only"] * 200), np.full(200, not disagree))
    assert found.passed is not disagree
    assert found.vetoed == ({"only"} if disagree else frozenset())


def test_what_has_no_rank_is_never_accepted() -> None:
    answer, agreed = drawn(7, 400, {"a": 0.0, "b": 0.0})
    ranks = np.where(np.arange(400) % 4 == 0, -np.inf, 1.0)
    found = verdict(answer, agreed, ranks=ranks, prove={"b": 0.05})
    assert not found.accepted[::4].any()
    assert found.passed


def test_arrays_that_dont_fit_are_refused() -> None:
    terms = AnswerTerms()
    with pytest.raises(ValueError, match="equally long"):
        admit(
            [0.0], ["a", "b"], [True], [1.0], max_disagreement=0.1, delta=0.1, level=0.1, terms=terms, seed=1
        )


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(50, 400))
def test_what_is_accepted_is_what_the_rules_let_through(seed: int, labels: int) -> None:
    answer, agreed = drawn(seed, labels, {"a": 0.02, "b": 0.05, "c": 0.3, "named": 0.0})
    ranks = np.random.default_rng(seed).random(labels)
    found = verdict(answer, agreed, ranks=ranks, prove={"named": 0.1}, always_escalate=["b"])
    for rank, key, accepted in zip(ranks, answer, found.accepted, strict=True):
        least = found.proven.get(key, math.inf if key in found.unproven else found.rank_threshold)
        refused = key == "b" or key in found.vetoed
        assert accepted == (not refused and rank >= least)


def test_every_promise_is_kept_at_once() -> None:
    """At the boundary everywhere: the whole at α, and two named answers at bounds of their own. δ covers them all."""
    rates = {"a": 0.1, "b": 0.1, "x": 0.05, "y": 0.1}
    lives, broken = 600, 0
    for seed in range(lives):
        answer, agreed = drawn(seed, 500, rates)
        ranks = np.random.default_rng(seed + 10**6).random(500)
        broken += verdict(
            answer, agreed, ranks=ranks, prove={"x": 0.05 - 1e-9, "y": 0.1 - 1e-9}, seed=seed
        ).passed
    assert binomtest(broken, lives, DELTA, alternative="greater").pvalue > 1e-3, f"{broken} of {lives}"
    assert binom.cdf(broken, lives, DELTA * 0.3) > 0.01, "not just because nothing ever passes"


def test_answers_without_a_key_are_nobodys_slice() -> None:
    """Their rules can't be applied when they are served, so they mustn't be when they are tested."""
    answer, agreed = drawn(2, 900, {"None": 0.02, "bad": 0.5})
    unknown = np.array([None if key == "bad" else key for key in answer], dtype=object)
    found = verdict(unknown, agreed, always_escalate=["bad"], prove={"None": 0.1})
    assert verdict(answer, agreed).vetoed == {"bad"}
    assert (found.vetoed, found.slices, found.whole.threshold) == (frozenset(), [], None)
    assert found.given == {"None": int((answer == "None").sum())}, "nor those of an answer called so"
    assert set(found.proven) == {"None"}
    assert not found.accepted[unknown == None].any()  # noqa: E711 - of each element


@pytest.mark.parametrize(
    ("good", "bad"),
    [(0.1, 0.4), (0.09, 0.2)],
    ids=["what is left sits at the boundary", "vetoes find some of them"],
)
def test_promises_are_kept_where_vetoes_decide(good: float, bad: float) -> None:
    rates = {f"{k}": bad if k < 2 else good for k in range(10)}
    lives, broken = 250, 0
    for seed in range(lives):
        answer, agreed = drawn(seed, 800, rates)
        found = verdict(answer, agreed, ranks=np.random.default_rng(seed + 10**6).random(800), seed=seed)
        left = [rate for key, rate in rates.items() if key not in found.vetoed]
        broken += found.passed and float(np.mean(left)) >= ALPHA - 1e-9
    assert binomtest(broken, lives, DELTA, alternative="greater").pvalue > 1e-3, f"{broken} of {lives}"
