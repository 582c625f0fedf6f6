from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from routers.router import Decision, Router
from serving.errors import DamagedRelease

ROUTER = Router(1.5, 2.0, -1.0, frozenset({"refund", "legal"}))

finite = st.floats(allow_nan=False, allow_infinity=False)
routers = st.builds(
    Router,
    score_threshold=finite,
    slope=st.floats(1e-6, 1e6),
    offset=st.floats(-1e6, 1e6),
    always_escalate=st.frozensets(st.text(st.characters(exclude_categories=["Cs"]))),
)


@given(routers)
def test_what_was_dumped_is_loaded(router: Router) -> None:
    assert Router.load(router.dump()) == router


def test_the_same_router_is_the_same_bytes() -> None:
    again = Router(1.5, 2.0, -1.0, frozenset({"legal", "refund"}))
    assert again.dump() == ROUTER.dump()


@pytest.mark.parametrize("key", ["schema", "score_threshold", "slope", "offset", "always_escalate"])
def test_a_missing_key_is_damage(key: str) -> None:
    read = orjson.loads(ROUTER.dump())
    del read[key]
    with pytest.raises(DamagedRelease, match=key):
        Router.load(orjson.dumps(read))


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("schema", 2, "schema 2, this version reads 1"),
        ("schema", None, "schema None"),
        ("score_threshold", None, "can't be read"),
        ("score_threshold", "nan", "no usable score_threshold"),
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
def test_values_that_decide_nothing_are_damage(key: str, value: object, said: str) -> None:
    read: dict[str, Any] = orjson.loads(ROUTER.dump())
    read[key] = value
    with pytest.raises(DamagedRelease, match=said):
        Router.load(orjson.dumps(read))


@pytest.mark.parametrize(
    "data", [b"", b"{", b"null", b"[]", b"7", b"\xff\xfe", b'{"schema": 1, "slope": NaN}', ROUTER.dump()[:-1]]
)
def test_what_is_not_a_router_is_damage(data: bytes) -> None:
    with pytest.raises(DamagedRelease, match=r"router\.json"):
        Router.load(data)


def test_the_threshold_itself_is_accepted() -> None:
    assert ROUTER.decide(1.5) == Decision(True, ROUTER.threshold, ROUTER.threshold, "confident")
    below = ROUTER.decide(math.nextafter(1.5, 0.0))
    assert not below.accepted and below.reason == "low_confidence"
    assert ROUTER.threshold == pytest.approx(1 / (1 + math.exp(-2)))


@pytest.mark.parametrize("score", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_not_finite_is_never_trusted(score: float) -> None:
    for router in (ROUTER, Router(-math.inf, 1.0, 0.0), Router(math.inf, 1.0, 0.0)):
        decision = router.decide(score)
        assert not decision.accepted
        assert (decision.confidence, decision.reason) == (0.0, "low_confidence")


def test_some_answers_always_go_to_the_teacher() -> None:
    sure = ROUTER.decide(50.0, "refund")
    assert not sure.accepted and sure.reason == "always_escalate"
    assert sure.confidence == pytest.approx(1.0)
    assert ROUTER.decide(0.0, "refund").reason == "always_escalate"
    assert ROUTER.decide(math.nan, "refund").reason == "always_escalate"
    assert ROUTER.decide(50.0, "Refund").accepted
    assert ROUTER.decide(50.0).accepted


@given(routers, finite, finite)
def test_confidence_is_a_probability_and_ranks_as_the_score(router: Router, one: float, other: float) -> None:
    low, high = sorted((one, other))
    assert 0.0 <= router.confidence(low) <= router.confidence(high) <= 1.0
    assert router.decide(low).accepted <= router.decide(high).accepted
    for score in (low, high):
        decision = router.decide(score)
        assert decision.accepted == (score >= router.score_threshold)
        if decision.accepted and decision.threshold is not None:
            assert decision.confidence >= decision.threshold


def test_deciding_imports_nothing_that_fits() -> None:
    """A gateway starts in under a second, and without the extras: scikit-learn alone takes 1.6 s."""
    program = (
        "import sys, routers.coin, routers.looks, routers.promise, routers.propensity, routers.router;"
        "sys.exit(sorted(m for m in ('sklearn', 'scipy', 'pandas') if m in sys.modules).__repr__()"
        " if any(m in sys.modules for m in ('sklearn', 'scipy', 'pandas')) else 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
