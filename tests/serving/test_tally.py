from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from routers.meter import TokenMeter
from serving.tally import Tally

Json = dict[str, Any]


def part(tokens: list[Json], **delta: Any) -> Json:
    text = "".join(str(token.get("token")) for token in tokens)
    return {"delta": {"content": text, **delta}, "logprobs": {"content": tokens}}


def token(logprob: Any) -> Json:
    return {"token": "x", "logprob": logprob, "top_logprobs": []}


@given(
    st.lists(st.floats(min_value=-20, max_value=0), min_size=1, max_size=60),
    st.sets(st.integers(min_value=1, max_value=60), max_size=5),
    st.data(),
)
def test_checkpoints_dont_depend_on_how_tokens_were_cut_into_chunks(
    logprobs: list[float], marks: set[int], data: st.DataObject
) -> None:
    one_by_one = Tally(TokenMeter({}), sorted(marks))
    for logprob in logprobs:
        one_by_one.take(part([token(logprob)]))
    cuts = sorted(data.draw(st.sets(st.integers(min_value=0, max_value=len(logprobs)))) | {0, len(logprobs)})
    in_chunks = Tally(TokenMeter({}), sorted(marks))
    reached = []
    for start, end in itertools.pairwise(cuts):
        reached += in_chunks.take(part([token(logprob) for logprob in logprobs[start:end]]))
    assert reached == in_chunks.checkpoints == one_by_one.checkpoints
    assert [checkpoint["tokens"] for checkpoint in reached] == sorted(
        mark for mark in marks if mark <= len(logprobs)
    )
    assert in_chunks.whole([], None) == one_by_one.whole([], None)


@given(st.lists(st.floats(min_value=-20, max_value=0), min_size=1, max_size=60))
def test_the_score_is_finite_and_of_the_mean(logprobs: list[float]) -> None:
    tally = Tally(TokenMeter({}), [])
    tally.take(part([token(logprob) for logprob in logprobs]))
    score, _ = tally.whole([], None)
    mean = sum(logprobs) / len(logprobs)
    assert math.isfinite(score)
    assert 1 / (1 + math.exp(-score)) == pytest.approx(math.exp(mean), abs=1e-9)


@pytest.mark.parametrize("logprob", [None, "sure", math.nan, -math.inf, 0.5, True, [1.0], {}])
def test_one_token_without_a_log_probability_spoils_the_answer(logprob: Any) -> None:
    tally = Tally(TokenMeter({}), [1, 2, 3])
    tally.take(part([token(-0.1)]))
    tally.take(part([token(logprob)]))
    tally.take(part([token(-0.1)]))
    assert math.isfinite(tally.checkpoints[0]["score"])
    assert [checkpoint["score"] for checkpoint in tally.checkpoints[1:]] == [-math.inf, -math.inf]
    assert tally.whole([], None)[0] == -math.inf


@pytest.mark.parametrize(
    "unscored",
    [
        {"delta": {"content": "x"}},
        {"delta": {"content": "x"}, "logprobs": None},
        {"delta": {"tool_calls": [{"index": 0}]}, "logprobs": {"content": []}},
        {"delta": {"content": "x"}, "logprobs": {"content": "no list"}},
        {"delta": {"content": "x"}, "logprobs": {"content": ["no entry"]}},
        {"delta": {"content": "x"}, "logprobs": "wrong"},
    ],
)
def test_text_without_log_probabilities_spoils_the_answer(unscored: Json) -> None:
    tally = Tally(TokenMeter({}), [2])
    tally.take(part([token(-0.1)]))
    tally.take(unscored)
    (checkpoint,) = tally.checkpoints
    assert checkpoint == {"tokens": 2, "bytes": 1, "score": -math.inf, "signals": {}}


def test_what_says_nothing_needs_no_log_probability() -> None:
    tally = Tally(TokenMeter({}), [1])
    for silent in ({"role": "assistant", "content": ""}, {}, None):
        tally.take({"delta": silent, "finish_reason": None})
    assert tally.whole([], None)[0] == -math.inf, "an empty answer has nothing to be sure of"
    tally.take(part([token(-0.1)]))
    assert math.isfinite(tally.whole([], None)[0])


def test_what_a_prefix_says_is_read_from_its_tokens() -> None:
    request = {"response_format": {"type": "json_object"}}
    good, bad = Tally(TokenMeter(request), [1]), Tally(TokenMeter(request), [1])
    good.take(part([{**token(-0.1), "token": ' {"a'}]))
    bad.take(part([{**token(-0.1), "token": "I am sorry"}]))
    (begun,), (refused,) = good.checkpoints, bad.checkpoints
    assert (begun["signals"]["valid"], begun["signals"]["refusal"]) == (1.0, 0.0)
    assert (refused["signals"]["valid"], refused["signals"]["refusal"]) == (0.0, 1.0)


def test_tokens_that_the_server_counted_and_didnt_show_spoil_the_answer() -> None:
    tally = Tally(TokenMeter({}), [])
    tally.take(part([token(-0.1)] * 5))
    choices = [{"message": {"content": "xxxxx"}, "finish_reason": "stop"}]
    assert [bool(tally.whole(choices, count)[1]) for count in (None, 5, 6, 7, 4)] == [True] * 3 + [False] * 2


def test_text_that_no_token_spells_spoils_the_answer() -> None:
    one_of_three = {"delta": {"content": "three tokens here"}, "logprobs": {"content": [token(-0.1)]}}
    tally = Tally(TokenMeter({}), [1])
    (checkpoint,) = tally.take(one_of_three)
    assert checkpoint == {"tokens": 1, "bytes": 1, "score": -math.inf, "signals": {}}


def test_a_character_of_two_tokens_comes_after_its_first() -> None:
    first, second = ({"token": "\ufffd", "logprob": -0.1, "bytes": [byte]} for byte in "é".encode())
    tally = Tally(TokenMeter({}), [1, 2])
    tally.take({"delta": {"content": ""}, "logprobs": {"content": [first]}})
    tally.take({"delta": {"content": "é"}, "logprobs": {"content": [second]}})
    assert all(math.isfinite(checkpoint["score"]) for checkpoint in tally.checkpoints)
    assert math.isfinite(tally.whole([{"message": {"content": "é"}, "finish_reason": "stop"}], 2)[0])
