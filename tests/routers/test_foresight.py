"""What is foreseen of a request before the student is asked, and from where on it isn't."""

from __future__ import annotations

import math
import time

import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import beta, binomtest

from routers.foresight import LENGTH, WIDTH, Foresight, features, last_text
from routers.foresight_fit import (
    ForesightRegression,
    Skipping,
    Stakes,
    choose_skipping,
    design,
    foreseen_out_of_fold,
    shares_below,
    upper_bound,
)
from serving.errors import DamagedRelease

STAKES = Stakes(student_s=0.5, student_usd=2e-4, teacher_s=1.0, teacher_usd=1e-3, waiting_usd_per_s=0.0)

finite = st.floats(-1e6, 1e6)


def foresight(**changes: object) -> Foresight:
    given: dict[str, object] = {
        "weights": (0.0,) * WIDTH,
        "bias": 0.5,
        "slope": 4.0,
        "offset": -2.0,
        "skip_below": None,
        "student_s": 0.2,
    }
    return Foresight(**{**given, **changes})  # type: ignore[arg-type]


def messages(count: int, hard: float, rng: np.random.Generator) -> tuple[list[str], np.ndarray]:
    """Texts of two topics: the student is sure of most of one and of nothing of the other."""
    is_hard = rng.random(count) < hard
    easy = ["card", "pin", "lost", "money", "transfer", "top", "up", "cash", "fee"]
    other = ["poem", "riddle", "story", "song", "joke", "verse", "tale", "ode"]
    texts = [" ".join(rng.choice(other if h else easy, 6)) for h in is_hard]
    return texts, np.where(is_hard, rng.random(count) * 0.2, 0.2 + rng.random(count))


@given(st.text(max_size=3000))
def test_features_are_bounded_and_finite_for_any_text(text: str) -> None:
    found = features(text)
    assert all(0 <= place < WIDTH and math.isfinite(value) for place, value in found.items())
    words = [value for place, value in found.items() if place != LENGTH]
    assert not any(words) or math.isclose(sum(value * value for value in words), 1.0)
    assert 0.0 <= found[LENGTH] <= 1.0


@given(st.lists(st.text(max_size=40), min_size=1, max_size=5), st.integers(0, 2**31))
def test_what_is_served_is_what_was_fitted(texts: list[str], seed: int) -> None:
    weights = np.random.default_rng(seed).normal(size=WIDTH)
    served = foresight(weights=tuple(weights.tolist()))
    for text, fitted in zip(texts, design(texts) @ weights + 0.5, strict=True):
        assert math.isclose(served.foreseen(text), fitted, rel_tol=1e-9, abs_tol=1e-9)


@given(finite, finite, st.floats(1e-6, 1e6), finite, st.none() | finite, st.floats(0, 1e6))
def test_it_survives_its_file(
    weight: float, bias: float, slope: float, offset: float, below: float | None, student_s: float
) -> None:
    saved = Foresight((weight,) * WIDTH, bias, slope, offset, below, student_s)
    assert Foresight.load(saved.dump()) == saved
    assert 0.0 <= saved.escalation("anything at all") <= 1.0


@pytest.mark.parametrize(
    "change",
    [
        {"schema": 2},
        {"weights": [0.0] * (WIDTH - 1)},
        {"weights": [0.0] * (WIDTH - 1) + ["1"]},
        {"weights": [0.0] * (WIDTH - 1) + [None]},
        {"weights": None},
        {"bias": None},
        {"slope": 0},
        {"slope": True},
        {"offset": "x"},
        {"skip_below": "low"},
        {"student_s": -1},
    ],
)
def test_a_damaged_file_is_refused(change: dict[str, object]) -> None:
    written = orjson.loads(foresight().dump())
    with pytest.raises(DamagedRelease):
        Foresight.load(orjson.dumps({**written, **change}))


@pytest.mark.parametrize(
    "data", [b"", b"null", b"[]", b"{}", b"\x80\x04pickle", b'{"schema": 1, "weights": [NaN]}']
)
def test_what_is_no_such_file_is_refused(data: bytes) -> None:
    with pytest.raises(DamagedRelease):
        Foresight.load(data)


json = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@given(st.fixed_dictionaries({"messages": json | st.lists(st.fixed_dictionaries({"content": json}))}))
def test_any_request_has_a_text(request: dict[str, object]) -> None:
    assert isinstance(last_text(request), str)


def test_the_last_message_is_read_in_parts_too() -> None:
    parts = [
        {"type": "text", "text": "a"},
        {"type": "image_url", "image_url": {}},
        {"type": "text", "text": "b"},
    ]
    assert (
        last_text({"messages": [{"role": "user", "content": "x"}, {"role": "user", "content": parts}]})
        == "a\nb"
    )
    assert last_text({}) == ""


def test_without_a_cut_nothing_is_skipped_and_hedging_follows_the_probability() -> None:
    assert not foresight(bias=-9.0).skips("anything")
    assert foresight(bias=0.1, skip_below=0.2).skips("anything")
    assert not foresight(bias=0.2, skip_below=0.2).skips("anything")
    assert foresight(bias=0.4).hedges("anything") and not foresight(bias=0.6).hedges("anything")


def test_shares_count_by_weight_and_ties_share_one() -> None:
    ranks = np.array([-np.inf, 1.0, 1.0, 2.0, np.nan])
    assert shares_below(ranks, np.array([1.0, 1.0, 1.0, 6.0, 1.0])).tolist() == [0.0, 0.2, 0.2, 0.4, 0.0]


def test_a_topic_the_student_never_answers_is_foreseen() -> None:
    rng = np.random.default_rng(1)
    texts, ranks = messages(600, 0.3, rng)
    weights = np.ones(600)
    X = design(texts)
    foreseen = foreseen_out_of_fold(X, shares_below(ranks, weights), weights, seed=0)
    accepted = ranks >= 0.4
    chosen = choose_skipping(
        foreseen,
        accepted,
        np.ones(600, bool),
        weights,
        at_most=0.02,
        certainty=0.9,
        stakes=STAKES,
    )
    assert chosen is not None
    assert chosen.skipped > 0.25 and chosen.lost_at_most <= 0.02 and chosen.worth_usd > 0


def test_rows_alone_in_their_fold_are_never_skipped() -> None:
    X = design(["one"])
    assert foreseen_out_of_fold(X, np.zeros(1), np.ones(1), seed=0).tolist() == [np.inf]
    with pytest.raises(ValueError, match="no rows"):
        ForesightRegression().fit(X[:0], np.zeros(0))


@pytest.mark.parametrize("every", [True, False])
def test_all_accepted_or_none_is_never_skipped(every: bool) -> None:
    """All accepted: what would be skipped is lost. None: nothing shows how little would be."""
    foreseen = np.linspace(0, 1, 500)
    accepted = np.full(500, every)
    chosen = choose_skipping(
        foreseen,
        accepted,
        np.ones(500, bool),
        np.ones(500),
        at_most=0.02,
        certainty=0.9,
        stakes=STAKES,
    )
    assert chosen is None


def test_a_student_that_takes_no_time_is_never_worth_skipping() -> None:
    rng = np.random.default_rng(2)
    foreseen = np.concatenate([np.zeros(300), np.ones(700)])
    accepted = np.concatenate([np.zeros(300, bool), rng.random(700) < 0.9])

    def chosen(stakes: Stakes) -> Skipping | None:
        sampled = np.ones(1000, bool)
        return choose_skipping(
            foreseen, accepted, sampled, np.ones(1000), at_most=0.02, certainty=0.9, stakes=stakes
        )

    assert chosen(STAKES) is not None
    linear = Stakes(1.5e-4, 2e-9, 1.0, 1e-3, waiting_usd_per_s=1 / 3600)
    assert chosen(linear) is None


def test_losing_more_than_promised_is_as_rare_as_said() -> None:
    """The foreseen says little: the choice among many cuts must not find a lucky one more often than 1−certainty."""
    runs, too_many = 400, 0
    for seed in range(runs):
        rng = np.random.default_rng(seed)
        foreseen = rng.random(400)
        accepted = rng.random(400) < 0.2 + 0.7 * foreseen
        free = Stakes(1.0, 1.0, 0.0, 0.0, 0.0)  # losing costs nothing: the widest cut is worth most
        chosen = choose_skipping(
            foreseen,
            accepted,
            np.ones(400, bool),
            np.ones(400),
            at_most=0.02,
            certainty=0.9,
            stakes=free,
        )
        if chosen is not None:
            cut = chosen.below
            too_many += (0.2 * cut + 0.35 * cut**2) / 0.55 > 0.02
    assert too_many > 0, "a bound that is never reached isn't exact"
    assert binomtest(too_many, runs, 0.1, alternative="greater").pvalue > 1e-3


@given(st.integers(0, 300), st.integers(1, 300), st.sampled_from([0.8, 0.9, 0.95, 0.99]))
@settings(max_examples=50)
def test_the_bound_is_clopper_and_pearsons(lost: int, of: int, certainty: float) -> None:
    lost = min(lost, of)
    expected = 1.0 if lost == of else beta.ppf(certainty, lost + 1, of - lost)
    assert math.isclose(upper_bound(lost, of, certainty), expected, rel_tol=1e-6)


def test_it_takes_microseconds() -> None:
    """A short text some 10 µs, the longest under a millisecond; ten times that is allowed to a busy machine."""
    seen = foresight(weights=tuple(np.random.default_rng(0).normal(size=WIDTH).tolist()), skip_below=0.0)
    for text, limit_s in (
        ("I still have not received my new card, can you help me?", 2e-4),
        ("a " * 10_000, 1e-2),
    ):
        best = min(_time(seen, text) for _ in range(20))
        assert best < limit_s


def _time(seen: Foresight, text: str) -> float:
    began = time.perf_counter()
    seen.skips(text)
    return time.perf_counter() - began
