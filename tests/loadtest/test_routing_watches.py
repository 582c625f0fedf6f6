from __future__ import annotations

import math

import numpy as np
import pytest

from loadtest.routing.watches import (
    ALPHA,
    BAD,
    DETECTORS,
    WINDOW,
    boundary_table,
    delays,
    false_alarms,
    likelihood_ratio,
    table_of,
    watch,
    watch_false_alarms,
    window,
)


def test_detectors_see_nothing_but_the_past() -> None:
    rng = np.random.default_rng(0)
    stream = np.concatenate([rng.random(300) < 0.02, rng.random(2000) < 0.2])
    for name, detector in DETECTORS.items():
        seen = detector(stream)
        assert seen is not None and seen > 300, name
        assert detector(stream[:seen]) == seen, name
        assert detector(stream[: seen - 1]) is None, name


def test_a_window_that_is_not_full_says_nothing() -> None:
    assert window(np.ones(WINDOW - 1, bool)) is None
    assert window(np.ones(WINDOW, bool)) == WINDOW
    assert window(np.zeros(1000, bool)) is None


def test_false_alarms_at_the_boundary() -> None:
    seeds = range(60)
    assert false_alarms("the watch", seeds) <= 12  # P(X > 12) = 0.5 % at exactly 10 %
    assert false_alarms("mixture of likelihood ratios", seeds) <= 12
    assert false_alarms("last 200 audits above α", seeds) == 60, "what people use accuses every good release"
    assert false_alarms("last 200 above 11 %, tuned", seeds) <= 12
    assert watch_false_alarms(0.1, range(20)) <= 6


def test_old_good_audits_drown_the_mixture_and_not_the_watch() -> None:
    seeds = range(25)
    medians = {}
    for name in ("the watch", "mixture of likelihood ratios"):
        for good in (0, 5000):
            found = [delay for delay in delays(name, good, seeds) if delay is not None]
            medians[name, good] = float(np.median(found))
    assert medians["the watch", 5000] < 500
    assert medians["the watch", 5000] < 3 * medians["the watch", 0]
    assert medians["mixture of likelihood ratios", 5000] > 2000
    assert medians["mixture of likelihood ratios", 5000] > 8 * medians["mixture of likelihood ratios", 0]


def test_the_mixture_is_the_mean_of_its_bets() -> None:
    stream = np.random.default_rng(3).random(400) < BAD
    wealth = np.ones(60)
    places = ALPHA + (np.arange(60) + 0.5) / 60 * (1 - ALPHA)
    expected = None
    for seen, one in enumerate(stream, start=1):
        wealth *= places / ALPHA if one else (1 - places) / (1 - ALPHA)
        if wealth.mean() >= 10:
            expected = seen
            break
    assert expected is not None
    assert likelihood_ratio(stream) == expected


def test_what_was_never_noticed_and_who_was_accused_before_is_said() -> None:
    found: dict[int, list[float | None]] = {
        0: [100.0, 200.0, 300.0],
        1000: [None, 50.0, math.inf],
        5000: [math.inf, math.inf, math.inf],
    }
    shown = table_of({"the watch": 1}, {"the watch": found}, 3)
    cells = [next(iter(column.cells)) for column in shown.columns]
    assert cells[2] == "200 audits, 10,000 requests"
    assert cells[3] == "> 10,000; 33% accused before"
    assert cells[4] == "> 10,000"
    assert [*boundary_table({0.05: 3, 0.1: 300}, 1000).columns[2].cells] == ["kept", "BROKEN"]


@pytest.mark.parametrize("name", DETECTORS)
def test_runs_repeat(name: str) -> None:
    assert delays(name, 0, range(3)) == delays(name, 0, range(3))


def test_the_watch_alarms_once_it_has_multiplied_its_stake_by_one_over_delta() -> None:
    assert watch(np.ones(50, bool)) is not None
    assert watch(np.zeros(5000, bool)) is None
