"""What an answer that broke off has used."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.assembler import Assembler
from serving.chat import chunks, completion
from serving.estimate import unfinished_usage

REQUEST: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "x" * 400}]}


def received(text: str, take: int) -> Assembler:
    """An answer of which the first `take` chunks have come."""
    choices = [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}]
    whole = completion(id="c", created=1, model="m", choices=choices, usage=None)
    assembler = Assembler()
    for chunk in list(chunks(whole, include_usage=False))[:take]:
        assembler.add(chunk)
    return assembler


def test_nothing_has_come_yet() -> None:
    assert unfinished_usage(REQUEST, None) == {
        "prompt_tokens": 100,
        "completion_tokens": 0,
        "total_tokens": 100,
    }


@given(st.text(alphabet="ab ", max_size=60), st.integers(0, 30))
def test_more_that_has_come_never_costs_less(text: str, take: int) -> None:
    less = unfinished_usage(REQUEST, received(text, take))
    more = unfinished_usage(REQUEST, received(text, take + 1))
    assert less["completion_tokens"] <= more["completion_tokens"] <= len(text) / 4 + 1
    assert more["total_tokens"] == more["prompt_tokens"] + more["completion_tokens"]


def test_what_the_teacher_said_on_the_way_comes_first() -> None:
    assembler = received("ab " * 4, 3)
    assembler.add({"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 50}})
    usage = unfinished_usage(REQUEST, assembler)
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (7, 50)


@pytest.mark.parametrize(
    "more",
    [
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "y" * 80}]}]},
        {"tools": [{"type": "function", "function": {"name": "look_up", "parameters": {"type": "object"}}}]},
        {
            "messages": [
                {"role": "assistant", "content": None, "tool_calls": [{"function": {"arguments": "{}"}}]}
            ]
        },
    ],
)
def test_everything_that_is_read_counts(more: dict[str, Any]) -> None:
    small: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": ""}]}
    assert unfinished_usage({**small, **more}, None)["prompt_tokens"] > 0


def test_the_size_of_a_picture_says_nothing_of_its_tokens() -> None:
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 100_000}}
    request = {"model": "m", "messages": [{"role": "user", "content": [picture]}]}
    assert unfinished_usage(request, None)["prompt_tokens"] == 0


def test_calls_and_refusals_are_generated_too() -> None:
    assembler = Assembler()
    delta = {
        "refusal": "no " * 10,
        "tool_calls": [{"index": 0, "id": "c", "function": {"arguments": "{}" * 9}}],
    }
    assembler.add({"choices": [{"index": 0, "delta": delta}]})
    assert unfinished_usage(REQUEST, assembler)["completion_tokens"] > 10
