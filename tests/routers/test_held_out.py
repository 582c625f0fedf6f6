"""No label ranks its own answer, and what cross-fitting alone would add to the ranks is taken out again."""

from __future__ import annotations

import csv
import math
import os
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import binomtest

from routers.confidence import SCORE
from routers.frontier import frontier
from routers.held_out import HeldOutConfidence
from routers.promise import Promise

Floats = NDArray[np.float64]
Task = tuple[Floats, dict[str, Floats], list[str | None], NDArray[np.bool_]]
DATA = Path(os.environ.get("UNDERSTUDY_DATA") or Path(__file__).parents[3] / "shared" / "data")
SHOP = DATA / "frugalml_shop" / "SHOP.csv"


def task(count: int, seed: int = 0) -> Task:
    """A score and a signal that tell, one that doesn't, and one of ten answers, three of which agree less often."""
    rng = np.random.default_rng(seed)
    score, telling, noise = rng.normal(size=(3, count))
    answers = rng.integers(0, 10, count)
    odds = 1.0 + score + telling + np.where(answers < 3, -1.5, 0.5)
    agreed = rng.random(count) < 1 / (1 + np.exp(-odds))
    return score, {"telling": telling, "noise": noise}, [f"a{k}" for k in answers], agreed


@pytest.mark.parametrize("scores", [[], [math.nan, -math.inf], [1.0], [1.0, math.nan]])
def test_few_or_no_usable_labels(scores: list[float]) -> None:
    keys: list[str | None] = [None] * len(scores)
    ranks = HeldOutConfidence().fit(scores, {}, keys, [True] * len(scores)).ranks(scores, {}, keys)
    assert np.isfinite(ranks).tolist() == np.isfinite(scores).tolist()


def test_what_cant_be_ranked_ranks_below_everything() -> None:
    score, signals, keys, agreed = task(1000)
    signals["telling"][:30] = np.nan
    score[30:40] = np.nan
    ranks = HeldOutConfidence().fit(score, signals, keys, agreed).ranks(score, signals, keys)
    assert (ranks[:40] == -np.inf).all() and np.isfinite(ranks[40:]).all()


def test_another_state_of_the_same_answers_is_on_the_same_scale() -> None:
    score, signals, keys, agreed = task(1000)
    fitted = HeldOutConfidence().fit(score, signals, keys, agreed)
    early = fitted.ranks(score - 1.0, signals, keys)
    assert (early < fitted.ranks(score, signals, keys)).all()
    released = fitted.estimator_.confidence_.ranks(score - 1.0, signals, keys)
    assert early.mean() == pytest.approx(released.mean(), abs=0.1)


def test_nothing_of_a_label_reaches_its_own_rank() -> None:
    """Turning one label round turns nobody's place against others of its fold: only what is common to all moves."""
    score, signals, keys, agreed = task(600, 2)
    folds = np.random.default_rng(8).permutation(600) % 5

    def ranks(labels: NDArray[np.bool_]) -> Floats:
        return HeldOutConfidence(seed=7).fit(score, signals, keys, labels).ranks(score, signals, keys)

    other = agreed.copy()
    other[17] = ~other[17]
    fold = folds == folds[17]
    before, after = ranks(agreed)[fold], ranks(other)[fold]
    # One line, a threshold's own scale, carries the one over into the other.
    slope, offset = np.polyfit(before, after, 1)
    assert slope > 0 and after == pytest.approx(slope * before + offset, abs=1e-6)


def test_the_score_alone_ranks_as_the_score() -> None:
    """Cross-fitting adds no noise of its own: confidences of the folds are brought to one scale."""
    score, signals, keys, agreed = task(500, 4)
    fitted = HeldOutConfidence([SCORE]).fit(score, signals, keys, agreed)
    released = fitted.estimator_.confidence_.ranks(score, signals, keys)
    assert fitted.ranks(score, signals, keys).tolist() == released.tolist()
    tied = (
        HeldOutConfidence().fit(np.zeros(500), {}, ["a"] * 500, agreed).ranks(np.zeros(500), {}, ["a"] * 500)
    )
    assert len(set(tied.tolist())) == 1


@pytest.mark.parametrize("crossed", [False, True])
def test_a_promise_needs_ranks_that_no_label_had_a_hand_in(crossed: bool) -> None:
    """At every score 12 % disagree, and twenty signals mean nothing: fitted and tested on the same labels, they do."""

    def passes(seed: int) -> bool:
        rng = np.random.default_rng(seed)
        score, keys = rng.normal(size=400), [None] * 400
        signals = {f"s{number}": rng.normal(size=400) for number in range(20)}
        agreed = rng.random(400) >= 0.12
        fitted = HeldOutConfidence(["linear"], seed=seed).fit(score, signals, keys, agreed)
        ranking = fitted if crossed else fitted.estimator_.confidence_
        ranks = ranking.ranks(score, signals, keys)
        return Promise(0.1, 0.9).threshold(ranks, agreed) is not None

    lives = 100
    count = sum(passes(seed) for seed in range(lives))
    assert bool(binomtest(count, lives, 0.1, alternative="greater").pvalue > 1e-3) is crossed, count


@pytest.mark.skipif(
    not SHOP.is_file(),
    reason=f"there is no {SHOP}; UNDERSTUDY_DATA names the folder that holds frugalml_shop",
)
def test_no_worse_than_the_raw_confidence_on_recorded_predictions() -> None:
    """FrugalML's SHOP, student model 4 and teacher model 3: the raw confidence is hard to beat there."""
    with SHOP.open() as file:
        rows = list(csv.DictReader(file))[::4]
    score = np.array([float(row["conf_4"]) for row in rows])
    keys = [row["pred_4"] for row in rows]
    agreed = np.array([row["pred_4"] == row["pred_3"] for row in rows])
    fitted = HeldOutConfidence().fit(score, {}, keys, agreed)
    right, teacher = (np.array([row[name] == row["true"] for row in rows]) for name in ("pred_4", "pred_3"))
    raw = frontier(score, right, teacher)
    released = frontier(fitted.estimator_.confidence_.ranks(score, {}, keys), right, teacher)
    assert (released.apgr(), released.cpt(0.5), released.cpt(0.8)) == pytest.approx(
        (raw.apgr(), raw.cpt(0.5), raw.cpt(0.8))
    )
    # Scores that tie are told apart by their folds' confidences, at random.
    held_out = frontier(fitted.ranks(score, {}, keys), right, teacher)
    assert (held_out.apgr(), held_out.cpt(0.5), held_out.cpt(0.8)) == pytest.approx(
        (raw.apgr(), raw.cpt(0.5), raw.cpt(0.8)), abs=5e-3
    )
