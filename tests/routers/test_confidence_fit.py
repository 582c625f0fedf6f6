"""Which confidence is chosen, what it says where labels are few or all alike."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.optimize import minimize

from routers.confidence import SCORE, probability
from routers.confidence_fit import MODELS, ConfidenceEstimator
from routers.newton import fit_odds, log_loss, sigmoid
from routers.router import Router

Floats = NDArray[np.float64]


def task(
    count: int, seed: int = 0, **effects: float
) -> tuple[Floats, dict[str, Floats], list[str], NDArray[np.bool_]]:
    """Scores, one telling signal and one that is noise, one of ten answers, and labels drawn by their `effects`."""
    rng = np.random.default_rng(seed)
    score, telling, noise = rng.normal(size=(3, count))
    answers = rng.integers(0, 10, count)
    odds = (
        1.0
        + effects.get("score", 1.0) * score
        + effects.get("telling", 0.0) * telling
        + effects.get("bent", 0.0) * np.abs(telling)
        + effects.get("answer", 0.0) * np.where(answers < 3, -1.5, 0.5)
    )
    agreed = rng.random(count) < 1 / (1 + np.exp(-odds))
    return score, {"telling": telling, "noise": noise}, [f"a{k}" for k in answers], agreed


@pytest.mark.parametrize(
    ("effects", "wanted"),
    [
        ({}, {"score"}),
        ({"telling": 1.0}, {"linear"}),
        ({"bent": 2.5}, {"hinges"}),
        ({"answer": 1.5}, {"score+answers"}),
        ({"telling": 1.0, "answer": 1.5}, {"linear+answers"}),
    ],
)
def test_the_simplest_that_is_good_enough_is_chosen(effects: dict[str, float], wanted: set[str]) -> None:
    chosen = [ConfidenceEstimator(seed=s).fit(*task(2000, s, **effects)).confidence_.model for s in range(5)]
    assert sum(model in wanted for model in chosen) >= 4, chosen


def test_what_is_chosen_says_more_than_the_score_and_means_what_it_says() -> None:
    fitted = ConfidenceEstimator().fit(*task(3000, telling=1.0, answer=1.5))
    score, signals, keys, agreed = task(20_000, 1, telling=1.0, answer=1.5)
    alone = ConfidenceEstimator([SCORE]).fit(*task(3000, telling=1.0, answer=1.5))
    ranks = fitted.confidence_.ranks(score, signals, keys)
    better = log_loss(ranks, agreed.astype(float)).mean()
    assert (
        better < log_loss(alone.confidence_.ranks(score, signals, keys), agreed.astype(float)).mean() - 0.05
    )
    chance = sigmoid(ranks)
    for low in np.arange(0.1, 0.9, 0.2):
        band = (chance >= low) & (chance < low + 0.2)
        assert agreed[band].mean() == pytest.approx(chance[band].mean(), abs=0.04)


def test_weights_undo_a_sample_that_is_not_like_the_traffic() -> None:
    score, signals, keys, agreed = task(10_000, 3, telling=1.0)
    chance = np.where(agreed, 0.1, 1.0)
    kept = np.random.default_rng(4).random(len(score)) < chance
    sample = (
        score[kept],
        {n: c[kept] for n, c in signals.items()},
        np.array(keys)[kept].tolist(),
        agreed[kept],
    )
    fresh = task(20_000, 5, telling=1.0)
    weighted, unweighted = (
        sigmoid(ConfidenceEstimator().fit(*sample, weights).confidence_.ranks(*fresh[:3])).mean()
        for weights in (1 / chance[kept], None)
    )
    assert weighted == pytest.approx(fresh[3].mean(), abs=0.03)
    assert unweighted < fresh[3].mean() - 0.3


@pytest.mark.parametrize("count", [1, 10, 49, 400])
@pytest.mark.parametrize("agrees", [True, False])
def test_one_sided_labels_prove_no_certainty(count: int, agrees: bool) -> None:
    """n answers that all agree say (n+1)/(n+2) (Laplace), whatever they score."""
    score, signals, keys, _ = task(count)
    fitted = ConfidenceEstimator().fit(score, signals, keys, np.full(count, agrees))
    said = [probability(fitted.confidence_.rank(s, {})) for s in (-3.0, 0.0, 3.0)]
    assert said == pytest.approx([(count + 1) / (count + 2) if agrees else 1 / (count + 2)] * 3, rel=1e-3)
    assert fitted.confidence_.model == SCORE


def test_ten_labels_are_the_scores_alone_and_stay_modest() -> None:
    score, signals, keys, _ = task(10)
    agreed = score > np.median(score)  # perfectly apart, by chance
    fitted = ConfidenceEstimator().fit(score, signals, keys, agreed)
    assert fitted.confidence_.model == SCORE and fitted.losses_ == {}
    assert probability(fitted.confidence_.rank(float(score.min()), {})) > 0.05
    assert probability(fitted.confidence_.rank(float(score.max()), {})) < 0.95


@pytest.mark.parametrize("scores", [[], [math.nan, -math.inf]])
def test_without_a_usable_label_nothing_is_claimed(scores: list[float]) -> None:
    fitted = ConfidenceEstimator().fit(scores, {}, [None] * len(scores), [True] * len(scores))
    assert probability(fitted.confidence_.rank(1.0, {})) == pytest.approx(0.5, abs=1e-3)


def test_what_cant_be_ranked_isnt_fitted_to_and_ranks_below_everything() -> None:
    score, signals, keys, agreed = task(1000, telling=1.5)
    signals["telling"][:30] = np.nan  # 3 %: a broken reply now and then
    signals["rare"] = np.where(np.arange(1000) % 2, 1.0, np.nan)
    score[30:40] = np.nan
    fitted = ConfidenceEstimator().fit(score, signals, keys, agreed)
    assert "rare" not in [term.name for term in fitted.confidence_.terms]
    assert "telling" in [term.name for term in fitted.confidence_.terms]
    assert Router(fitted.confidence_, -1e9).decide(0.0, {"noise": 0.0}, "a1").reason == "no_signals"


def test_arrays_that_dont_fit_together_are_refused() -> None:
    score, signals, keys, agreed = task(100)
    with pytest.raises(ValueError, match="equally long, got 100, 99, 100 and 100"):
        ConfidenceEstimator().fit(score, signals, keys[1:], agreed)
    for weight in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="sample_weight"):
            ConfidenceEstimator().fit(score, signals, keys, agreed, np.full(100, weight))


odd = st.sampled_from([0.0, 1.0, -1.0, 1e-9, 1e9, -1e6, 0.5, math.nan, math.inf, -math.inf])


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(odd, odd, st.sampled_from(["a", "b", None]), st.booleans()), max_size=80),
    st.sampled_from(MODELS),
)
def test_whatever_is_fitted_can_be_saved_and_rises_with_the_score(
    rows: list[tuple[float, float, str | None, bool]], model: str
) -> None:
    score, signal, keys, agreed = zip(*rows, strict=True) if rows else ((), (), (), ())
    for models in ([model], MODELS):
        fitted = ConfidenceEstimator(models).fit(score, {"x": signal}, list(keys), agreed).confidence_
        assert Router.load(Router(fitted, 0.0).dump()).confidence == fitted
        ladder = [-1e4, -3.0, 0.0, 0.25, 0.5, 2.0, 1e4]
        for x in (0.0, 1e7):
            ranks = [fitted.rank(one, {"x": x}, "a") for one in ladder]
            assert ranks == sorted(ranks)
            assert np.isfinite(ranks).all()


def test_far_from_what_was_seen_a_signal_adds_no_more_than_at_the_edge() -> None:
    score, signals, keys, agreed = task(2000, telling=2.0)
    for model in ("linear", "hinges"):
        fitted = ConfidenceEstimator([model]).fit(score, signals, keys, agreed).confidence_
        edge = float(signals["telling"].max())
        far = fitted.rank(0.0, {"telling": 1e9, "noise": 0.0})
        assert far == pytest.approx(fitted.rank(0.0, {"telling": edge, "noise": 0.0}), abs=1e-6)


def test_terms_are_continuous() -> None:
    score, signals, keys, agreed = task(2000, bent=2.0)
    fitted = ConfidenceEstimator(["hinges"]).fit(score, signals, keys, agreed).confidence_
    assert sum(len(term.knots) for term in fitted.terms) > 15
    for term in fitted.terms:
        for place, knot in enumerate(term.knots):
            below, above = (term.intercepts[i] + term.slopes[i] * knot for i in (place, place + 1))
            assert below == pytest.approx(above, abs=1e-9)


def test_answers_seen_rarely_are_drawn_to_the_whole() -> None:
    rng = np.random.default_rng(0)
    keys = ["often"] * 40 + ["rare"] * 2 + [f"k{i % 8}" for i in range(900)]
    agreed = np.concatenate([[False] * 42, rng.random(900) < 0.9])
    fitted = ConfidenceEstimator(["score+answers"]).fit(rng.normal(size=942), {}, keys, agreed).confidence_
    assert fitted.answers["often"] < fitted.answers["rare"] - 1.0 < -1.0
    alike = ConfidenceEstimator(["score+answers"]).fit(rng.normal(size=900), {}, keys[42:], agreed[42:])
    assert max(map(abs, alike.confidence_.answers.values()), default=0.0) < 0.25


def test_the_solver_finds_what_scipy_finds() -> None:
    rng = np.random.default_rng(1)
    features = np.column_stack([np.ones(300), rng.normal(size=(300, 4))])
    target, weight = rng.random(300), rng.random(300)
    root = rng.normal(size=(5, 5))
    penalty = root.T @ root
    rising = np.array([False, True, True, False, False])

    def objective(beta: Floats) -> float:
        return float(weight @ log_loss(features @ beta, target) + 0.5 * beta @ penalty @ beta)

    bounds = [(0 if up else None, None) for up in rising]
    reference = minimize(
        objective, np.zeros(5), bounds=bounds, method="L-BFGS-B", options={"ftol": 1e-15, "gtol": 1e-9}
    )
    found = fit_odds(features, target, weight, penalty, rising)
    assert (found[rising] >= 0).all()
    assert objective(found) <= reference.fun + 1e-4
