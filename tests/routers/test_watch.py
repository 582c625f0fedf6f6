"""The watch of a live release: it may be asked after every audit, for ever, and still notices what has become worse."""

from __future__ import annotations

import json
import math
import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from routers.watch import Watch, delay_audits

ALPHAS = st.floats(0.001, 0.9)
CERTAINTIES = st.floats(0.5, 0.999)
AUDITS = st.lists(st.booleans(), max_size=300)


def after(audits: list[bool], alpha: float = 0.05, certainty: float = 0.9) -> Watch:
    watch = Watch(alpha, certainty)
    for agreed in audits:
        watch.observe(agreed)
    return watch


@given(AUDITS, ALPHAS)
def test_no_bet_can_expect_to_win_while_the_promise_holds(audits: list[bool], alpha: float) -> None:
    """The heart of its validity: whatever came before, the next audit multiplies wealth by 1 on average, at α."""
    watch = after(audits, alpha)
    before, bet = watch.to_json()["evidence"], watch.bet
    assert alpha <= bet < 1.0
    worse, better = Watch.from_json(watch.to_json()), Watch.from_json(watch.to_json())
    worse.observe(False)
    better.observe(True)
    lost = math.exp(better.to_json()["evidence"] - before)
    won = math.exp(worse.to_json()["evidence"] - before)
    assert alpha * won + (1 - alpha) * lost == pytest.approx(1.0, abs=1e-9)
    assert lost <= 1.0 <= won, "below α it expects to lose, since agreeing never pays"


@given(AUDITS, AUDITS, ALPHAS, CERTAINTIES)
def test_a_watch_goes_on_bit_by_bit_where_its_file_ends(
    first: list[bool], then: list[bool], alpha: float, certainty: float
) -> None:
    whole = after(first, alpha, certainty)
    resumed = Watch.from_json(json.loads(json.dumps(whole.to_json())))
    assert [resumed.observe(one) for one in then] == [whole.observe(one) for one in then]
    assert resumed.to_json() == whole.to_json()


@given(AUDITS, st.integers(0, 299))
def test_an_audit_that_agreed_instead_is_never_worse_news_at_once(audits: list[bool], place: int) -> None:
    audits = audits[: place + 1]
    if audits:
        agreed = after([*audits[:-1], True]).evidence
        assert agreed <= after([*audits[:-1], False]).evidence


def test_the_alarm_stays() -> None:
    watch = Watch(0.05, 0.9)
    alarms = [watch.observe(False) for _ in range(20)]
    assert alarms.index(True) < 10, "audits that only disagree are no matter of hundreds"
    assert alarms == sorted(alarms)
    assert watch.evidence >= 10
    assert all(watch.observe(True) for _ in range(500))


def test_false_alarms_at_the_boundary_are_as_rare_as_promised() -> None:
    """400 releases that disagree exactly α, each asked after every one of 10,000 audits."""
    coins = random.Random(4)
    alarms = 0
    for _ in range(400):
        watch = Watch(0.05, 0.9)
        alarms += any(watch.observe(coins.random() >= 0.05) for _ in range(10_000))
    # δ = 10 %; 400 exactly calibrated ones would stay below 53 with probability 97.5 %.
    assert 10 <= alarms <= 40, f"{alarms} of 400"


@pytest.mark.parametrize(("good", "at_most"), [(0, 190), (1000, 290), (5000, 330)])
def test_it_notices_however_long_all_was_well(good: int, at_most: int) -> None:
    """Disagreement goes from 3 to 10 % under α = 5 %: old good audits don't drown it."""
    coins = random.Random(good)
    delays = []
    for _ in range(60):
        watch = Watch(0.05, 0.9)
        for _ in range(good):
            watch.observe(coins.random() >= 0.03)
        if watch.alarmed:
            continue
        delay = 1
        while not watch.observe(coins.random() >= 0.10):
            delay += 1
        delays.append(delay)
    assert statistics.median(delays) <= at_most
    assert len(delays) >= 57, "what keeps its promise well is left alone"


@pytest.mark.parametrize(("alpha", "certainty"), [(0.02, 0.9), (0.05, 0.95), (0.1, 0.99)])
def test_the_published_delay_is_about_what_it_takes(alpha: float, certainty: float) -> None:
    coins = random.Random(7)
    delays = []
    for _ in range(60):
        watch = Watch(alpha, certainty)
        for _ in range(int(60 / alpha)):
            watch.observe(coins.random() >= 0.6 * alpha)
        delays.append(0)
        while not watch.alarmed:
            delays[-1] += 1
            watch.observe(coins.random() >= 2 * alpha)
    published = delay_audits(alpha, certainty)
    assert published is not None
    assert 0.65 * published <= statistics.median(delays) <= 1.25 * published
    assert delay_audits(0.6, 0.9) is None


@pytest.mark.parametrize("value", [0.0, 1.0, -0.1, math.nan])
def test_a_promise_that_says_nothing_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="max_disagreement"):
        Watch(value, 0.9)
    with pytest.raises(ValueError, match="certainty"):
        Watch(0.05, value)


def test_an_audit_that_is_no_bool_is_refused() -> None:
    """NaN is truthy: a label that is missing in a table would count as agreement."""
    watch = Watch(0.05, 0.9)
    with pytest.raises(ValueError, match="missing audit is False"):
        watch.observe(math.nan)  # type: ignore[arg-type]
    assert watch.audits == 0


@pytest.mark.parametrize(
    "changes",
    [
        {"evidence": math.inf},
        {"audits": "many"},
        {"audits": -1},
        {"disagreements": 9},
        {"recent_disagreements": 99.0},
        {"recent": None},
        {"certainty": 1.0},
    ],
)
def test_a_state_that_no_watch_has_written_is_refused(changes: dict[str, object]) -> None:
    good = after([True, False, True]).to_json()
    with pytest.raises(ValueError, match=r"state of a watch|must lie|invalid literal"):
        Watch.from_json({**good, **changes})
    with pytest.raises(ValueError, match="state of a watch"):
        Watch.from_json({name: good[name] for name in good if name != "evidence"})
