"""The stop rule: few that would be accepted are stopped, and nothing is stopped on too little evidence."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from routers.stopping import stop_below


def draw(size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Early ranks, and whether the generation is accepted in the end: the two go together, as they do in life."""
    chance = np.random.default_rng(seed)
    early = chance.normal(size=size)
    return early, early + chance.normal(scale=0.7, size=size) > 0.0


def test_hardly_any_that_would_be_accepted_is_stopped() -> None:
    """500 logs: the share stopped on fresh traffic is above 1 % in at most 5 % of them (one-sided, 3 σ: 8 %)."""
    early, accepted = draw(200_000, 99)
    lying = np.sort(early[accepted])
    broken, saved = 0, []
    for seed in range(500):
        cut = stop_below(*draw(3000, seed))
        assert cut is not None
        broken += bool(np.searchsorted(lying, cut) / len(lying) > 0.01)
        saved.append((early[~accepted] < cut).mean())
    assert broken / 500 <= 0.08
    assert np.mean(saved) > 0.25, "and many of the hopeless ones are"


def test_choosing_the_cut_at_the_observed_share_would_break_it() -> None:
    """Planted: the 1 % quantile itself, without the tolerance limit, is too high in about half of the logs."""
    early, accepted = draw(200_000, 99)
    lying = np.sort(early[accepted])
    broken = 0
    for seed in range(300):
        e, a = draw(3000, seed)
        broken += bool(np.searchsorted(lying, np.quantile(e[a], 0.01)) / len(lying) > 0.01)
    assert broken / 300 > 0.3


@pytest.mark.parametrize(("size", "known"), [(298, False), (299, True)])
def test_so_many_accepted_are_needed(size: int, known: bool) -> None:
    """ln 0.05 / ln 0.99 = 298.07, after which the lowest that was accepted is a bound."""
    early = np.concatenate([np.arange(size, dtype=float), [-5.0]])
    accepted = np.concatenate([np.ones(size, dtype=bool), [False]])
    assert stop_below(early, accepted) == (0.0 if known else None)


def test_a_large_log_gives_the_plain_quantile() -> None:
    early = np.arange(1_000_000, dtype=float)
    cut = stop_below(early, np.ones(len(early), dtype=bool))
    assert cut is not None
    assert 9_700 < cut < 10_000


@pytest.mark.parametrize(
    ("early", "accepted"),
    [
        ([], []),
        ([1.0] * 400, [True] * 400),  # none lies below another
        ([1.0] * 400, [False] * 400),
        ([math.inf] * 400, [True] * 400),  # all ended before their first checkpoint
        ([math.nan] * 400, [True] * 400),
        ([-math.inf] * 400 + [1.0], [True] * 401),
    ],
)
def test_where_nothing_can_be_saved_nothing_is_stopped(early: list[float], accepted: list[bool]) -> None:
    assert stop_below(early, accepted) is None


def test_what_cant_be_trusted_early_counts_as_lowest() -> None:
    early, accepted = draw(3000, 1)
    cut = stop_below(early, accepted)
    spoiled = np.where(np.argsort(np.argsort(early)) < 3, math.nan, early)
    assert stop_below(spoiled, accepted) == cut, "the lowest three stay the lowest"


def test_labels_of_unequal_propensity_are_thinned() -> None:
    """Accepted with low early ranks were labelled by the coin only: unthinned they would hardly count."""
    chance = np.random.default_rng(3)
    early = chance.normal(size=40_000)
    accepted = np.ones(40_000, dtype=bool)
    rare = early < -1.0
    labelled = ~rare | (chance.random(40_000) < 0.1)
    e, a, p = early[labelled], accepted[labelled], np.where(rare, 0.1, 1.0)[labelled]
    cut, naive = stop_below(e, a, propensity=p), stop_below(e, a)
    assert cut is not None
    assert naive is not None
    assert (early < cut).mean() <= 0.01 < (early < naive).mean()


@given(
    st.lists(st.tuples(st.floats(allow_nan=True), st.booleans()), max_size=1200),
    st.floats(min_value=0.01, max_value=0.5),
)
def test_the_cut_is_a_rank_and_never_stops_more_of_the_sample(
    drawn: list[tuple[float, bool]], share: float
) -> None:
    early = np.array([rank for rank, _ in drawn])
    accepted = np.array([taken for _, taken in drawn], dtype=bool)
    cut = stop_below(early, accepted, most_stopped=share)
    if cut is not None:
        assert math.isfinite(cut)
        ranks = np.where(np.isnan(early), -math.inf, early)
        assert (ranks[accepted] < cut).mean() <= share


@pytest.mark.parametrize(
    ("early", "accepted", "propensity"),
    [
        ([1.0], [True, False], None),
        ([[1.0]], [[True]], None),
        ([1.0], [True], [0.0]),
        ([1.0], [True], [math.nan]),
    ],
)
def test_arrays_that_dont_fit(early: object, accepted: object, propensity: object) -> None:
    with pytest.raises(ValueError, match="must"):
        stop_below(early, accepted, propensity=propensity)  # type: ignore[arg-type]
