"""The early warning: another distribution of confidence shows within hundreds of requests, the same one doesn't."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from routers.drift import Drift, Spread

CONFIDENCE = st.floats(0, 1)


@given(st.lists(st.tuples(CONFIDENCE, st.floats(1, 20)), min_size=1, max_size=200))
def test_the_shares_are_those_of_the_traffic(rows: list[tuple[float, float]]) -> None:
    values, weights = (np.array(column) for column in zip(*rows, strict=True))
    spread = Spread.of(values, weights)
    assert list(spread.cuts) == sorted(set(spread.cuts))
    edges = [-math.inf, *spread.cuts, math.inf]
    for low, high, share in zip(edges[:-1], edges[1:], spread.shares, strict=True):
        inside = (values >= low) & (values < high)
        assert share == pytest.approx(weights[inside].sum() / weights.sum())
    assert Spread.from_json(json.loads(json.dumps(spread.to_json()))) == spread
    drift = Drift(spread)
    assert drift.distance == 0.0
    for value in values:
        drift.observe(float(value))
        assert 0.0 <= drift.distance <= 1.0


def test_the_same_traffic_does_not_warn_and_other_traffic_does() -> None:
    rng = np.random.default_rng(5)
    tested = rng.beta(5, 1, 400)
    drift = Drift(Spread.of(tested, np.ones(400)))
    most = 0.0
    for value in rng.beta(5, 1, 20_000):
        drift.observe(float(value))
        most = max(most, drift.distance)
    assert most < 0.15, "400 labels describe their traffic well enough"
    needed = 0
    while drift.distance < 0.2:
        drift.observe(float(rng.beta(2, 2)))
        needed += 1
    assert needed < 700


def test_everything_alike_and_what_is_no_number() -> None:
    spread = Spread.of([0.7] * 50 + [math.nan, -math.inf], np.ones(52))
    drift = Drift(spread)
    for _ in range(500):
        drift.observe(0.7)
    assert drift.distance < 0.05
    for _ in range(2000):
        drift.observe(math.nan)
    assert drift.distance > 0.5
    with pytest.raises(ValueError, match="no confidence"):
        Spread.of([], [])


@pytest.mark.parametrize(
    "card",
    [None, {}, {"cuts": [0.5], "shares": [1.0]}, {"cuts": ["x"], "shares": [0.5, 0.5]}, [1], "x"],
)
def test_a_card_without_one_is_no_error(card: object) -> None:
    assert Spread.from_json(card) is None
