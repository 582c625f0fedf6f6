from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from routers.confidence import SCORE, Confidence, Term
from routers.router import Decision, Router
from serving.errors import DamagedRelease

ROUTER = Router(
    Confidence(
        terms=(Term("score", (2.0,), (0.0,)), Term("unknown", (0.0, -1.0), (0.0, 0.5), (0.5,))),
        offset=-1.0,
        answers={"shaky": -3.0},
        model="hinges",
    ),
    rank_threshold=2.0,
    always_escalate=frozenset({"refund", "legal"}),
    vetoed=frozenset({"worse"}),
    unproven=frozenset({"named"}),
    proven={"lenient": 1.0, "strict": 4.0},
)
KNOWN = {"unknown": 0.0}
OF_SCHEMA_1 = {
    "schema": 1,
    "score_threshold": 1.5,
    "slope": 2.0,
    "offset": -1.0,
    "always_escalate": ["legal"],
}

finite = st.floats(allow_nan=False, allow_infinity=False)
usual = st.floats(-1e6, 1e6)
words = st.text(st.characters(exclude_categories=["Cs"]))


@st.composite
def terms(draw: st.DrawFn, name: str) -> Term:
    knots = tuple(sorted(draw(st.sets(usual, max_size=3))))
    slope = st.floats(1e-6, 1e6) if name == SCORE else usual
    pieces = draw(st.lists(st.tuples(slope, usual), min_size=len(knots) + 1, max_size=len(knots) + 1))
    slopes, intercepts = zip(*pieces, strict=True)
    return Term(name, slopes, intercepts, knots)


@st.composite
def confidences(draw: st.DrawFn) -> Confidence:
    names = draw(st.sets(words.filter(lambda name: name != SCORE), max_size=3))
    return Confidence(
        (draw(terms(SCORE)), *(draw(terms(name)) for name in sorted(names))),
        draw(usual),
        draw(st.dictionaries(words, usual, max_size=3)),
        draw(words),
    )


routers = st.builds(
    Router,
    confidence=confidences(),
    rank_threshold=finite | st.just(math.inf),
    always_escalate=st.frozensets(words),
    vetoed=st.frozensets(words),
    unproven=st.frozensets(words),
    proven=st.dictionaries(words, finite),
)


@given(routers)
def test_what_was_dumped_is_loaded(router: Router) -> None:
    assert Router.load(router.dump()) == router


def test_the_same_router_is_the_same_bytes() -> None:
    again = replace(ROUTER, always_escalate=frozenset({"legal", "refund"}))
    assert again.dump() == ROUTER.dump()


@pytest.mark.parametrize(
    "key", ["schema", "rank_threshold", "confidence", "always_escalate", "vetoed", "unproven", "proven"]
)
def test_a_missing_key_is_damage(key: str) -> None:
    read = orjson.loads(ROUTER.dump())
    del read[key]
    with pytest.raises(DamagedRelease, match=key):
        Router.load(orjson.dumps(read))


@pytest.mark.parametrize("key", ["score_threshold", "slope", "offset", "always_escalate"])
def test_a_missing_key_of_schema_1_is_damage(key: str) -> None:
    with pytest.raises(DamagedRelease, match=key):
        Router.load(orjson.dumps({name: value for name, value in OF_SCHEMA_1.items() if name != key}))


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("score_threshold", None, "can't be read"),
        ("score_threshold", "nan", "no usable threshold"),
        ("score_threshold", [1], "can't be read"),
        ("slope", 0.0, "slope must be > 0"),
        ("slope", -1.0, "slope must be > 0"),
        ("slope", "nan", "slope must be > 0"),
        ("slope", "inf", "slope must be > 0"),
        ("slope", "steep", "can't be read"),
        ("offset", "nan", "offset nan"),
        ("offset", "-inf", "offset -inf"),
        ("offset", None, "can't be read"),
        ("always_escalate", None, "can't be read"),
        ("always_escalate", "refund", "can't be read"),
    ],
)
def test_values_of_schema_1_that_decide_nothing_are_damage(key: str, value: object, said: str) -> None:
    with pytest.raises(DamagedRelease, match=said):
        Router.load(orjson.dumps({**OF_SCHEMA_1, key: value}))


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (["schema"], 3, "schema 3, this version reads up to 2"),
        (["schema"], None, "schema None"),
        (["rank_threshold"], None, "can't be read"),
        (["rank_threshold"], "nan", "no usable threshold"),
        (["rank_threshold"], [1], "can't be read"),
        (["always_escalate"], None, "can't be read"),
        (["always_escalate"], "refund", "can't be read"),
        (["vetoed"], None, "vetoed is no list"),
        (["unproven"], "named", "unproven is no list"),
        (["proven"], ["named"], "can't be read"),
        (["proven", "strict"], None, "can't be read"),
        (["proven", "strict"], "nan", "no usable threshold"),
        (["confidence"], None, "can't be read"),
        (["confidence", "model"], 7, "7 is no name"),
        (["confidence", "offset"], "1", "no finite number"),
        (["confidence", "offset"], True, "no finite number"),
        (["confidence", "terms"], [], "the first must be 'score'"),
        (["confidence", "terms", 0, "name"], "margin", "the first must be 'score'"),
        (["confidence", "terms", 1, "name"], "score", "each stand there once"),
        (["confidence", "terms", 1, "name"], ["unknown"], "is no name"),
        (["confidence", "terms", 0, "slopes"], [0.0], "must be > 0"),
        (["confidence", "terms", 0, "slopes"], [-2.0], "must be > 0"),
        (["confidence", "terms", 0, "slopes"], [None], "no finite number"),
        (["confidence", "terms", 0, "slopes"], "2", "no list of numbers"),
        (["confidence", "terms", 1, "slopes"], [1.0], "1 knots, 1 slopes and 2 intercepts"),
        (["confidence", "terms", 1, "intercepts"], [0.0, 0.0, 0.0], "3 intercepts"),
        (["confidence", "terms", 1, "knots"], [], "0 knots"),
        (["confidence", "terms", 1], {"name": "x"}, "slopes"),
        (["confidence", "answers"], ["shaky"], "answers is no object"),
        (["confidence", "answers", "shaky"], None, "no finite number"),
    ],
)
def test_values_that_decide_nothing_are_damage(path: list[Any], value: object, said: str) -> None:
    read: dict[str, Any] = orjson.loads(ROUTER.dump())
    place = read
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    with pytest.raises(DamagedRelease, match=said):
        Router.load(orjson.dumps(read))


def test_knots_that_dont_increase_are_damage() -> None:
    term = Term("unknown", (0.0, 1.0, 2.0), (0.0, 0.0, 0.0), (0.5, 0.5))
    router = Router(Confidence((Term(SCORE, (1.0,), (0.0,)), term)), 0.0)
    with pytest.raises(DamagedRelease, match="knots of 'unknown'"):
        Router.load(router.dump())


@pytest.mark.parametrize(
    "data", [b"", b"{", b"null", b"[]", b"7", b"\xff\xfe", b'{"schema": 1, "slope": NaN}', ROUTER.dump()[:-1]]
)
def test_what_is_not_a_router_is_damage(data: bytes) -> None:
    with pytest.raises(DamagedRelease, match=r"router\.json"):
        Router.load(data)


def test_the_threshold_itself_is_accepted() -> None:
    assert ROUTER.decide(1.5, KNOWN) == Decision(True, ROUTER.threshold, ROUTER.threshold, "confident")
    below = ROUTER.decide(math.nextafter(1.5, 0.0), KNOWN)
    assert not below.accepted and below.reason == "low_confidence"
    assert ROUTER.threshold == pytest.approx(1 / (1 + math.exp(-2)))


def test_a_router_of_schema_1_decides_as_it_did() -> None:
    router = Router.load(orjson.dumps(OF_SCHEMA_1))
    assert router.decide(1.5, {}) == Decision(True, router.threshold, router.threshold, "confident")
    assert not router.decide(math.nextafter(1.5, 0.0), {"probability": 1.0}).accepted
    assert router.threshold == pytest.approx(1 / (1 + math.exp(-2)))
    assert router.decide(0.5, {}).confidence == 0.5
    assert router.decide(9.0, {}, "legal").reason == "always_escalate"


def test_signals_and_answers_have_their_say() -> None:
    assert ROUTER.decide(2.0, KNOWN).accepted
    assert not ROUTER.decide(2.0, {"unknown": 1.6}).accepted
    assert not ROUTER.decide(2.0, KNOWN, "shaky").accepted
    assert ROUTER.decide(2.0, KNOWN, "steady").accepted


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf, 10**400, None, "1.0", [1.0]])
def test_what_is_no_finite_number_is_never_trusted(broken: Any) -> None:
    for threshold in (-math.inf, 0.0, math.inf):
        router = Router(ROUTER.confidence, threshold)
        for score, signals in ((broken, KNOWN), (1.0, {"unknown": broken}), (1.0, {})):
            decision = router.decide(score, signals)
            assert not decision.accepted
            assert (decision.confidence, decision.reason) == (0.0, "no_signals")


def test_a_sum_that_overflows_is_never_trusted() -> None:
    steep = Router(Confidence.of_score(1e300, 0.0), 0.0)
    assert steep.decide(1e300, {}).reason == "no_signals"
    assert steep.decide(-1e300, {}).reason == "no_signals"


def test_some_answers_always_go_to_the_teacher() -> None:
    sure = ROUTER.decide(50.0, KNOWN, "refund")
    assert not sure.accepted and sure.reason == "always_escalate"
    assert sure.confidence == pytest.approx(1.0)
    assert ROUTER.decide(0.0, KNOWN, "refund").reason == "always_escalate"
    assert ROUTER.decide(math.nan, {}, "refund").reason == "always_escalate"
    assert ROUTER.decide(50.0, KNOWN, "Refund").accepted
    assert ROUTER.decide(50.0, KNOWN).accepted


@given(st.floats(1e-6, 1e6), usual, finite, usual, usual)
def test_confidence_is_a_probability_and_ranks_as_the_score(
    slope: float, offset: float, threshold: float, one: float, other: float
) -> None:
    router = Router(Confidence.of_score(slope, offset), threshold)
    low, high = (router.decide(score, {}) for score in sorted((one, other)))
    assert 0.0 <= low.confidence <= high.confidence <= 1.0
    assert low.accepted <= high.accepted
    for decision in (low, high):
        if decision.accepted and decision.threshold is not None:
            assert decision.confidence >= decision.threshold


@given(
    confidences(),
    st.lists(st.tuples(st.floats(), st.floats(), words | st.none()), max_size=20),
)
def test_many_at_once_are_ranked_as_each_by_itself(
    confidence: Confidence, answers: list[tuple[float, float, str | None]]
) -> None:
    """Bit for bit: what is fitted and tested on arrays decides as what is served."""
    names = [term.name for term in confidence.terms[1:]] + list(confidence.answers)
    scores = [score for score, _, _ in answers]
    keys = [key for _, _, key in answers]
    columns = {name: [value for _, value, _ in answers] for name in names}
    each = [confidence.rank(score, dict.fromkeys(names, value), key) for score, value, key in answers]
    assert confidence.ranks(scores, columns, keys).tolist() == each
    missing = confidence.ranks(scores, {}, keys).tolist()
    assert missing == [confidence.rank(score, {}, key) for score, _, key in answers]


def test_deciding_imports_nothing_that_fits() -> None:
    """A gateway starts in under a second, and without the extras: scikit-learn alone takes 1.6 s."""
    program = (
        "import sys, routers.coin, routers.looks, routers.promise, routers.propensity, routers.router;"
        "sys.exit(sorted(m for m in ('sklearn', 'scipy', 'pandas') if m in sys.modules).__repr__()"
        " if any(m in sys.modules for m in ('sklearn', 'scipy', 'pandas')) else 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("answer", "rank", "accepted", "reason"),
    [
        ("other", 2.0, True, "confident"),
        ("other", 1.9, False, "low_confidence"),
        ("legal", 9.0, False, "always_escalate"),
        ("worse", 9.0, False, "vetoed_answer"),
        ("worse", -math.inf, False, "vetoed_answer"),
        ("named", 9.0, False, "unproven_answer"),
        ("lenient", 1.0, True, "confident"),
        ("lenient", 0.9, False, "low_confidence"),
        ("strict", 3.9, False, "low_confidence"),
        ("strict", 4.0, True, "confident"),
        ("strict", math.nan, False, "no_signals"),
    ],
)
def test_the_rules_of_answers(answer: str, rank: float, accepted: bool, reason: str) -> None:
    decision = ROUTER.judge(rank, answer)
    assert (decision.accepted, decision.reason) == (accepted, reason)


def test_without_a_threshold_for_the_rest_only_what_was_proven_is_served() -> None:
    router = Router.load(replace(ROUTER, rank_threshold=math.inf).dump())
    assert not router.judge(1e300, "other").accepted
    assert not router.judge(1e300).accepted
    assert router.judge(1.0, "lenient").accepted
    assert router.threshold == 1.0
