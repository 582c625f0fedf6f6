from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from routers.propensity import Period, pooled_propensity


def test_one_period_is_the_propensity_of_its_release() -> None:
    accepted = np.array([True, False, True])
    assert pooled_propensity([Period(100, 0.05, accepted)]).tolist() == [0.05, 1.0, 0.05]


def test_day_zero_alone_labels_everything() -> None:
    assert pooled_propensity([Period(70, 0.05, np.zeros(3, bool))]).tolist() == [1.0, 1.0, 1.0]


def test_periods_count_by_their_traffic() -> None:
    accepted = np.array([True, False])
    found = pooled_propensity([Period(100, 0.05, np.zeros(2, bool)), Period(300, 0.02, accepted)])
    assert found == pytest.approx([(100 + 300 * 0.02) / 400, 1.0])


@given(
    st.lists(
        st.tuples(
            st.integers(1, 10_000), st.floats(0.001, 1.0), st.lists(st.booleans(), min_size=4, max_size=4)
        ),
        min_size=1,
        max_size=5,
    ),
    st.randoms(use_true_random=False),
)
def test_bounds(periods: list[tuple[int, float, list[bool]]], shuffler: random.Random) -> None:
    given_periods = [Period(n, rate, np.array(accepted)) for n, rate, accepted in periods]
    found = pooled_propensity(given_periods)
    total = sum(period.exchanges for period in given_periods)
    assert (found <= 1.0).all()
    assert (found >= min(period.audit_rate for period in given_periods) * (1 - 1e-12)).all()
    # The labels of the periods that escalated an exchange bound it from below.
    for index in range(4):
        escalating = sum(period.exchanges for period in given_periods if not period.accepted[index])
        assert found[index] >= escalating / total * (1 - 1e-12)
    shuffler.shuffle(given_periods)
    assert pooled_propensity(given_periods) == pytest.approx(found)


def test_without_traffic_nothing_could_be_labelled() -> None:
    for periods in ([], [Period(0, 0.05, np.zeros(2, bool))]):
        with pytest.raises(ValueError, match="no eligible traffic"):
            pooled_propensity(periods)


def test_an_audit_rate_of_zero_is_refused_where_nothing_else_labels() -> None:
    accepted = np.array([True, False])
    with pytest.raises(ValueError, match="propensity 0"):
        pooled_propensity([Period(100, 0.0, accepted)])
    with pytest.raises(ValueError, match="propensity 0"):
        pooled_propensity([Period(100, 0.05, accepted), Period(100, np.nan, accepted)])
    # Day 0 labelled everything once: that is enough.
    assert pooled_propensity([Period(50, 0.0, np.zeros(2, bool)), Period(50, 0.0, accepted)]).tolist() == [
        0.5,
        1.0,
    ]


def test_arrays_of_different_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="shape"):
        pooled_propensity([Period(10, 0.05, np.zeros(2, bool)), Period(10, 0.05, np.zeros(3, bool))])


def test_the_weighted_share_is_unbiased_over_periods_with_different_releases() -> None:
    """Horvitz–Thompson: what the labels weighted by 1/π̄ say of all traffic is right on average.

    Three releases with different regions: the second accepts what the first escalates.
    """
    rng = np.random.default_rng(1)
    draws, sizes = 4000, (100, 400, 500)
    total = sum(sizes)
    score = rng.random((draws, total))
    disagrees = rng.random((draws, total)) < 0.4 * (1 - score) ** 2
    period = np.repeat([0, 1, 2], sizes)
    first, second = score > 0.6, score < 0.5
    chance = np.where(period == 1, np.where(first, 0.05, 1.0), np.where(second, 0.02, 1.0))
    chance[:, period == 0] = 1.0
    labelled = rng.random((draws, total)) < chance

    every = pooled_propensity(
        [
            Period(sizes[0], 0.05, np.zeros(score.size, bool)),
            Period(sizes[1], 0.05, first.ravel()),
            Period(sizes[2], 0.02, second.ravel()),
        ]
    ).reshape(score.shape)
    own = (labelled * disagrees / chance).mean(axis=1)
    pooled = (labelled * disagrees / every).mean(axis=1)
    truth = 0.4 / 3
    for estimate in (own, pooled):
        assert abs(estimate.mean() - truth) < 4 * estimate.std() / np.sqrt(draws)
    assert pooled.std() < 0.6 * own.std()  # what pooling is for
    unweighted = (labelled * disagrees).sum(axis=1) / labelled.sum(axis=1)
    assert abs(unweighted.mean() - truth) > 20 * unweighted.std() / np.sqrt(draws)  # and the weights
