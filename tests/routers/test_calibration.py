from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from routers.calibration import PlattCalibrator
from routers.confidence import Confidence
from routers.router import Router


def drawn(
    labels: int, seed: int = 0, slope: float = 2.0, offset: float = -1.0
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    rng = np.random.default_rng(seed)
    scores = rng.normal(1.0, 1.0, labels)
    return scores, rng.random(labels) < 1 / (1 + np.exp(-(slope * scores + offset)))


def test_it_finds_the_curve_the_labels_were_drawn_from() -> None:
    scores, agreed = drawn(40_000)
    fitted = PlattCalibrator().fit(scores, agreed)
    assert fitted.slope_ == pytest.approx(2.0, abs=0.1)
    assert fitted.offset_ == pytest.approx(-1.0, abs=0.1)


def test_confidence_means_what_it_says() -> None:
    scores, agreed = drawn(20_000, seed=1)
    fresh, outcome = drawn(20_000, seed=2)
    confidence = PlattCalibrator().fit(scores, agreed).predict(fresh)
    for low in np.arange(0.1, 0.9, 0.2):
        band = (confidence >= low) & (confidence < low + 0.2)
        assert outcome[band].mean() == pytest.approx(confidence[band].mean(), abs=0.04)


def test_weights_undo_a_sample_that_is_not_like_the_traffic() -> None:
    scores, agreed = drawn(60_000, seed=3)
    chance = np.where(agreed, 0.1, 1.0)  # as unlike as can be
    kept = np.random.default_rng(4).random(len(scores)) < chance
    weighted = PlattCalibrator().fit(scores[kept], agreed[kept], 1 / chance[kept])
    unweighted = PlattCalibrator().fit(scores[kept], agreed[kept])
    assert weighted.offset_ == pytest.approx(-1.0, abs=0.15)
    assert unweighted.offset_ < -2.5


@pytest.mark.parametrize("agrees", [True, False])
def test_one_sided_labels_stay_finite(agrees: bool) -> None:
    fitted = PlattCalibrator().fit(np.linspace(0, 3, 50), np.full(50, agrees))
    assert np.isfinite([fitted.slope_, fitted.offset_]).all() and fitted.slope_ > 0
    confidence = fitted.predict([0.0, 1.5, 3.0])
    assert ((confidence >= 0) & (confidence <= 1)).all()
    assert bool(confidence[1] > 0.5) == agrees


@pytest.mark.parametrize(
    "scores", [[0.7] * 30, [0.7], [1e9, 2e9, 3e9], [1e-9, 2e-9, 3e-9], [0.0, np.nan, np.inf]]
)
def test_odd_scores_still_give_a_router_that_can_be_loaded(scores: list[float]) -> None:
    agreed = [index % 3 > 0 for index in range(len(scores))]
    fitted = PlattCalibrator().fit(scores, agreed)
    router = Router(Confidence.of_score(fitted.slope_, fitted.offset_), 0.0)
    assert Router.load(router.dump()) == router


def test_without_a_finite_score_there_is_nothing_to_calibrate_on() -> None:
    for scores in ([], [np.nan, -np.inf]):
        with pytest.raises(ValueError, match="no finite score"):
            PlattCalibrator().fit(scores, [True] * len(scores))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(-500, 500), st.booleans()), min_size=1, max_size=60))
def test_ranks_are_never_turned_round_and_the_router_says_the_same(labels: list[tuple[int, bool]]) -> None:
    scores = [score / 10 for score, _ in labels]
    fitted = PlattCalibrator().fit(scores, [agrees for _, agrees in labels])
    assert fitted.slope_ > 0  # also where low scores agree more
    ladder = np.array([-1e12, -1e6, -3.0, 0.0, 0.5, 2.0, 1e6, 1e12])
    confidence = fitted.predict(ladder)
    assert (np.diff(confidence) >= 0).all() and confidence.min() >= 0 and confidence.max() <= 1
    router = Router(Confidence.of_score(fitted.slope_, fitted.offset_), 0.0)
    assert confidence == pytest.approx([router.decide(float(score), {}).confidence for score in ladder])
