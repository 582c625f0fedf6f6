from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from routers.confidence import SCORE, Confidence, Term
from routers.router import Router
from routers.signals import FLOOR, QUANTILES, TokenSignals, answer_signals, request_signals, sample_signals

logprobs = st.floats(FLOOR, 0.0)


@st.composite
def entries(draw: st.DrawFn) -> dict[str, Any]:
    """One usable entry of `logprobs.content`."""
    listed = draw(st.lists(st.tuples(st.sampled_from("abcdef"), logprobs), max_size=4))
    return {
        "token": draw(st.sampled_from("abc")),
        "logprob": draw(logprobs),
        "top_logprobs": [{"token": token, "logprob": value} for token, value in listed],
    }


def fed(content: object, checkpoints: tuple[int, ...] = ()) -> TokenSignals:
    taken = TokenSignals(checkpoints)
    taken.extend(content)
    return taken


def entry(logprob: object, *others: float) -> dict[str, Any]:
    """A token `a`, with itself and others as alternatives."""
    top = [{"token": "a", "logprob": logprob}] + [
        {"token": f"b{i}", "logprob": o} for i, o in enumerate(others)
    ]
    return {"token": "a", "logprob": logprob, "top_logprobs": top}


@given(
    st.lists(entries(), max_size=40), st.lists(st.integers(0, 40), max_size=5), st.sets(st.integers(1, 45))
)
def test_an_answer_in_pieces_has_the_signals_of_the_whole(
    content: list[dict[str, Any]], cuts: list[int], checkpoints: set[int]
) -> None:
    whole = fed(content, tuple(checkpoints))
    pieces = TokenSignals(checkpoints)
    edges = [0, *sorted(cuts), len(content)]
    for start, end in pairwise(edges):
        pieces.extend(content[start:end])
        pieces.signals()  # asking changes nothing
    assert pieces.signals() == whole.signals() and pieces.checkpoints == whole.checkpoints
    # A checkpoint is what an answer that ends there would have.
    assert whole.checkpoints == [
        {"tokens": n, "signals": fed(content[:n]).signals()} for n in sorted(checkpoints) if n <= len(content)
    ]


@given(st.lists(entries(), min_size=1, max_size=40))
def test_the_numbers_are_those_of_their_definitions(content: list[dict[str, Any]]) -> None:
    signals = fed(content).signals()
    values = [one["logprob"] for one in content]
    for name, share in QUANTILES:
        assert signals[name] == pytest.approx(np.quantile(values, share))
    assert signals["first"] == values[0] and signals["tokens"] == math.log1p(len(values))
    assert ("mean_entropy" in signals) is all(one["top_logprobs"] for one in content)
    if "mean_entropy" in signals:
        entropies = []
        for one in content:
            chances = np.exp([other["logprob"] for other in one["top_logprobs"]])
            chances /= chances.sum()
            entropies.append(-sum(p * math.log(p) for p in chances if p > 0))
        assert signals["mean_entropy"] == pytest.approx(np.mean(entropies), abs=1e-9)
        assert signals["max_entropy"] == pytest.approx(max(entropies), abs=1e-9)
        assert all(math.isfinite(value) for value in signals.values())


def test_the_first_margin() -> None:
    assert fed([entry(-0.1, -3.0, -2.5), entry(-2.0, -0.5)]).signals()["first_margin"] == pytest.approx(2.4)
    # Sampled against the odds, and not among the alternatives.
    odd = {"token": "z", "logprob": -4.0, "top_logprobs": [{"token": "a", "logprob": -0.5}]}
    assert fed([odd]).signals()["first_margin"] == pytest.approx(-3.5)


def test_length_alone_changes_no_quantile() -> None:
    short, long = fed([entry(-0.2, -2.0)] * 3).signals(), fed([entry(-0.2, -2.0)] * 300).signals()
    assert {name for name in short if short[name] != pytest.approx(long[name])} == {"tokens"}


@pytest.mark.parametrize(
    "broken", [None, math.nan, math.inf, -math.inf, 0.5, "-0.1", True, [-0.1], {"x": 1}, 10**400]
)
def test_an_answer_with_an_unusable_number_has_no_signals(broken: object) -> None:
    for content in ([entry(broken)], [entry(-0.1), entry(broken), entry(-0.1)]):
        assert fed(content).signals() == {}
    late = fed([entry(-0.1, -3.0), entry(broken), entry(-0.1, -3.0)], (1, 3))
    before, after = late.checkpoints
    assert before["signals"] == fed([entry(-0.1, -3.0)]).signals() and after["signals"] == {}


@pytest.mark.parametrize(
    "content", [None, {}, "x", 7, [None], [7], [[]], [{}], [{"token": "a"}], [{"logprob": -1}]]
)
def test_what_are_no_logprobs_gives_no_signals(content: object) -> None:
    assert fed(content).signals() == {}


def test_no_tokens_no_signals() -> None:
    assert TokenSignals().signals() == {} and fed([]).signals() == {}


@pytest.mark.parametrize("clipped", [-9999.0, -9999, -1e300, -100.0])
def test_what_the_server_clipped_is_at_the_floor(clipped: float) -> None:
    signals = fed([entry(-0.5, clipped), entry(clipped, -0.1)]).signals()
    assert signals["q0"] == FLOOR
    assert signals["first_margin"] == pytest.approx(-0.5 - FLOOR)
    assert all(math.isfinite(value) for value in signals.values())
    impossible = [{"token": "a", "logprob": -0.1, "top_logprobs": [{"token": "b", "logprob": -math.inf}]}]
    assert fed(impossible).signals()["first_margin"] == pytest.approx(-0.1 - FLOOR)


def test_rounding_above_zero_is_zero() -> None:
    assert fed([entry(1e-7)]).signals()["q0"] == 0.0


@pytest.mark.parametrize("top", [None, [], "x", [None], [{}], [{"token": "a", "logprob": math.nan}], {}])
def test_without_alternatives_there_is_no_entropy(top: object) -> None:
    for content in (
        [{"token": "a", "logprob": -0.1, "top_logprobs": top}],
        [entry(-0.1, -2.0), {"token": "a", "logprob": -0.1, "top_logprobs": top}],
    ):
        assert set(fed(content).signals()) == {"q0", "q10", "q25", "q50", "first", "tokens"}


def test_a_wrong_length_gives_no_signals() -> None:
    taken = fed([entry(-0.1)] * 5)
    assert taken.signals(5) == taken.signals(6) == taken.signals() != {}
    assert taken.signals(4) == taken.signals(7) == taken.signals(0) == {}


def test_without_signals_an_answer_is_never_trusted() -> None:
    confidence = Confidence((Term(SCORE, (1.0,), (0.0,)), Term("q0", (1.0,), (0.0,))))
    decision = Router(confidence, -math.inf).decide(9.0, fed([entry(None)]).signals())
    assert (decision.accepted, decision.reason) == (False, "no_signals")


TEXT: dict[str, Any] = {"messages": []}
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer"}},
    "required": ["a"],
    "additionalProperties": False,
}
AS_SCHEMA = {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}}
AS_OBJECT = {"response_format": {"type": "json_object"}}
TOOLS = {"tools": [{"type": "function", "function": {"name": "find", "parameters": SCHEMA}}]}


def call(name: object, arguments: object) -> dict[str, Any]:
    return {
        "content": None,
        "tool_calls": [{"type": "function", "function": {"name": name, "arguments": arguments}}],
    }


@pytest.mark.parametrize(
    ("message", "request_", "known", "whole", "prefix"),
    [
        ({"content": "yes"}, TEXT, (), True, True),
        ({"content": " "}, TEXT, (), False, True),
        ({"content": None}, TEXT, (), False, True),
        ({"content": [{"type": "text"}]}, TEXT, (), False, True),
        ({"content": "yes"}, TEXT, ("yes", "no"), True, True),
        ({"content": " no\n"}, TEXT, ("yes", "no"), True, True),
        ({"content": "ye"}, TEXT, ("yes", "no"), False, True),
        ({"content": "maybe"}, TEXT, ("yes", "no"), False, False),
        ({"content": '{"a": 1}'}, AS_SCHEMA, (), True, True),
        ({"content": '{"a": 1.5}'}, AS_SCHEMA, (), False, True),
        ({"content": '{"a": 1'}, AS_SCHEMA, (), False, True),
        ({"content": '{"a": 1, "b": 2}'}, AS_SCHEMA, (), False, True),
        ({"content": "Sure: {"}, AS_SCHEMA, (), False, False),
        ({"content": '{"b": 2}'}, AS_OBJECT, (), True, True),
        ({"content": "[1]"}, AS_OBJECT, (), False, False),
        ({"content": "x"}, {"response_format": {"type": "json_schema"}}, (), False, False),
        ({"content": "x"}, {"response_format": 7}, (), True, True),
        (call("find", '{"a": 1}'), TOOLS, (), True, True),
        (call("find", '{"a"'), TOOLS, (), False, True),
        (call("find", 7), TOOLS, (), False, False),
        (call("lose", '{"a": 1}'), TOOLS, (), False, False),
        (call("find", '{"a": 1}'), {"tools": None}, (), False, False),
        ({"tool_calls": [7]}, TOOLS, (), False, False),
        ({"content": "no tool"}, {**TOOLS, "tool_choice": "required"}, (), False, True),
    ],
)
def test_validity(
    message: dict[str, Any], request_: dict[str, Any], known: Any, whole: bool, prefix: bool
) -> None:
    assert answer_signals(message, "stop", request_, known)["valid"] == whole
    assert answer_signals(message, None, request_, known)["valid"] == prefix


def test_truncation_and_refusal() -> None:
    def said(text: str | None, finish: str = "stop", **more: Any) -> tuple[float, float]:
        found = answer_signals({"content": text, **more}, finish, TEXT)
        return found["truncated"], found["refusal"]

    assert said("a long", "length") == (1.0, 0.0)
    assert said(None, refusal="I won't") == (0.0, 1.0)
    for text in ("I'm sorry, but no.", "I’m unable to", "Sorry, no", "I cannot do", "As an AI model"):
        assert said(text) == (0.0, 1.0), text
    for text in ("sorry_for_delay", "I canter", "lost_card", ""):
        assert said(text) == (0.0, 0.0), text


def test_samples() -> None:
    assert sample_signals([]) == {}
    assert sample_signals(["a"] * 5) == {"sample_share": 1.0, "sample_entropy": 0.0}
    split = sample_signals(["a", "b", "a", "a"])
    assert split["sample_share"] == 0.75
    assert split["sample_entropy"] == pytest.approx(-0.75 * math.log(0.75) - 0.25 * math.log(0.25))


@given(st.text())
def test_every_text_has_the_same_finite_request_signals(text: str) -> None:
    found = request_signals(text)
    assert set(found) == set(request_signals("Where is card 12?"))
    assert all(math.isfinite(value) and value >= 0 for value in found.values())


def test_request_signals_see_what_they_say() -> None:
    found = request_signals("Wo ist Größe 12?\nX")
    assert found["request_lines"] == math.log(2)
    assert found["request_digits"] == 2 / 18
    assert found["request_capitals"] == 3 / 18
    assert found["request_foreign"] == 2 / 11
