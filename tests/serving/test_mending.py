"""Whatever a compatible server leaves out or says twice, a strict client gets a stream it can read."""

from __future__ import annotations

import copy
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.assembler import Assembler
from serving.chat import chunks
from serving.exchange import Json
from serving.mending import Mender, mend_completion

HEAD: Json = {"id": "c1", "object": "chat.completion.chunk", "created": 7, "model": "m"}


def chunk(delta: Json, index: int = 0, finish: str | None = None, **more: Any) -> Json:
    return {**HEAD, "choices": [{"index": index, "delta": delta, "finish_reason": finish}], **more}


def call(delta: Json) -> Json:
    return chunk({"tool_calls": [delta]})


def mended(*given: Json) -> list[Json]:
    mender = Mender(model="asked")
    for data in given:
        mender.learn(data)
    for data in given:
        mender.mend(data)
    return list(given)


def calls_of(given: list[Json]) -> list[Json]:
    return [delta for data in given for delta in data["choices"][0]["delta"].get("tool_calls", [])]


names = st.sampled_from(["lookup", "send"])
tool_calls = st.lists(
    st.fixed_dictionaries({"name": names, "arguments": st.text("ab{}:1", max_size=6)}), min_size=1, max_size=3
)
messages = st.one_of(
    st.text(max_size=20).map(lambda text: ({"role": "assistant", "content": text}, "stop")),
    tool_calls.map(
        lambda calls: (
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [
                    {"id": f"call_{at}", "type": "function", "function": call}
                    for at, call in enumerate(calls)
                ],
            },
            "tool_calls",
        )
    ),
)
completions = st.lists(messages, min_size=1, max_size=3).map(
    lambda found: {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 7,
        "model": "m",
        "choices": [
            {"index": at, "message": message, "finish_reason": reason}
            for at, (message, reason) in enumerate(found)
        ],
        "usage": {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3},
    }
)


@given(completions, st.booleans())
def test_what_is_right_is_left_alone(completion: Json, include_usage: bool) -> None:
    whole = copy.deepcopy(completion)
    assert not mend_completion(whole, model="asked", limit=1000)
    assert whole == completion
    mender = Mender(model="asked")
    for data in chunks(completion, include_usage=include_usage):
        before = orjson.dumps(data)
        assert not mender.mend(data)
        assert orjson.dumps(data) == before
    assert list(mender.unfinished(usage=None, limit=None)) == []


def _head_left_out(made: Json, data: st.DataObject) -> None:
    for name, wrong in (("id", ["", None]), ("created", [0, None]), ("model", ["", None]), ("object", [""])):
        if data.draw(st.booleans()):
            made[name] = data.draw(st.sampled_from(wrong))


def _said_again(choice: Json, said: dict[tuple[int, int], Json], data: st.DataObject) -> None:
    delta = choice["delta"]
    if "role" not in delta and data.draw(st.booleans()):
        delta["role"] = "assistant"
    for position in delta.get("tool_calls", []):
        place = (choice["index"], position["index"])
        if place not in said:
            said[place] = copy.deepcopy(position)
        elif data.draw(st.booleans()):
            # The same id and perhaps the name again, or (as vLLM did) another id each time.
            position["id"] = data.draw(st.sampled_from([said[place]["id"], "other"]))
            if position["id"] != "other" and data.draw(st.booleans()):
                position["function"]["name"] = said[place]["function"]["name"]


@given(completions, st.data())
def test_what_is_left_out_or_said_twice_is_mended(completion: Json, data: st.DataObject) -> None:
    asked = {**completion, "usage": None}
    mender = Mender(model="asked")
    before: list[Json] = []
    said: dict[tuple[int, int], Json] = {}
    for at, right in enumerate(chunks(asked, include_usage=False)):
        made = copy.deepcopy(right)
        if at:
            _head_left_out(made, data)
        for choice in made["choices"]:
            _said_again(choice, said, data)
            if choice["finish_reason"] is not None and data.draw(st.booleans()):
                choice["finish_reason"] = data.draw(st.sampled_from(["", None]))
        before.append(made)
    after: list[Json] = []
    for made in before:
        mender.mend(made)
        after.append(made)
    after += mender.unfinished(usage=None, limit=None)
    assembler = Assembler()
    for made in after:
        assembler.add(made)
    assert assembler.finished
    assert assembler.choices == completion["choices"]
    assert {(made["id"], made["created"], made["object"]) for made in after} == {
        ("chatcmpl-1", 7, "chat.completion.chunk")
    }
    assert all(made["model"] for made in after)
    for choice in completion["choices"]:
        deltas = [
            part["delta"] for made in after for part in made["choices"] if part["index"] == choice["index"]
        ]
        assert sum("role" in delta for delta in deltas) == 1
        ids = [call["id"] for delta in deltas for call in delta.get("tool_calls", []) if call.get("id")]
        assert ids == [call["id"] for call in choice["message"].get("tool_calls", [])]


def test_a_first_chunk_without_a_name_takes_it_from_the_next() -> None:
    azure = {"id": "", "object": "", "created": 0, "model": "", "choices": [], "prompt_filter_results": [1]}
    first, _ = mended(azure, chunk({"content": "a"}))
    assert first == {**HEAD, "choices": [], "prompt_filter_results": [1]}


def test_names_that_never_come_are_made_up_once() -> None:
    first, second = mended({"choices": []}, {"choices": None})
    assert first == second
    assert first["id"].startswith("chatcmpl-")
    assert first["created"] > 1_700_000_000
    assert (first["model"], first["choices"]) == ("asked", [])


def test_choices_that_are_none_are_dropped() -> None:
    (got,) = mended({**HEAD, "choices": ["x", {"delta": None}, {"index": 4}]})
    assert got["choices"] == [{"delta": {}, "index": 0}, {"index": 4, "delta": {}}]


@pytest.mark.parametrize(
    ("sent", "indexes", "ids"),
    [
        # no index: each call whole, or its id or name first
        ([{"id": "a"}, {"id": "b"}], [0, 1], ["a", "b"]),
        ([{"id": "a", "function": {"name": "f"}}, {"function": {"arguments": "1"}}], [0, 0], ["a", None]),
        ([{"id": "a"}, {"id": "b"}, {"id": "a"}], [0, 1, 0], ["a", "b", None]),
        ([{"function": {"name": "f"}}, {"function": {"name": "g"}}], [0, 1], ["call_", "call_"]),
        # several calls under one index
        (
            [
                {"index": 0, "id": "a", "function": {"name": "f"}},
                {"index": 0, "id": "b", "function": {"name": "f"}},
                {"index": 0, "function": {"arguments": "1"}},
            ],
            [0, 1, 1],
            ["a", "b", None],
        ),
        # no id, and one that comes late
        (
            [{"index": 0}, {"index": 0, "id": "late"}, {"index": 2, "id": ""}],
            [0, 0, 2],
            ["call_", None, "call_"],
        ),
    ],
)
def test_tool_calls_are_told_apart(sent: list[Json], indexes: list[int], ids: list[str | None]) -> None:
    got = calls_of(mended(*(call({"type": "function", **delta}) for delta in sent)))
    assert [delta["index"] for delta in got] == indexes
    assert all(
        (delta.get("id") is None) if id is None else delta["id"].startswith(id)
        for delta, id in zip(got, ids, strict=True)
    )


def test_a_tool_call_is_made_complete() -> None:
    sent: Json = {"index": 0, "id": "a", "function": {"name": "f", "arguments": {"x": 1}}}
    (got,) = calls_of(mended(call(copy.deepcopy(sent))))
    assert got == {**sent, "type": "function", "function": {"name": "f", "arguments": '{"x":1}'}}
    whole: Json = {"choices": [{"message": {"tool_calls": [{"function": {"name": "f", "arguments": {}}}]}}]}
    assert mend_completion(whole, model="asked", limit=None)
    (choice,) = whole["choices"]
    (made,) = choice["message"]["tool_calls"]
    assert made["id"].startswith("call_")
    assert (made["type"], made["function"]["arguments"]) == ("function", "{}")
    assert (choice["index"], choice["finish_reason"], choice["message"]["role"]) == (
        0,
        "tool_calls",
        "assistant",
    )
    assert (whole["object"], whole["model"]) == ("chat.completion", "asked")


@pytest.mark.parametrize(
    ("delta", "usage", "limit", "reason"),
    [
        ({"content": "a"}, None, None, "stop"),
        ({"content": "a"}, {"completion_tokens": 9}, 10, "stop"),
        ({"content": "a"}, {"completion_tokens": 10}, 10, "length"),
        ({"tool_calls": [{"index": 0, "id": "a"}]}, None, 10, "tool_calls"),
    ],
)
def test_the_reason_that_is_missing(delta: Json, usage: Json | None, limit: int | None, reason: str) -> None:
    mender = Mender(model="asked")
    for data in (chunk(delta), chunk({}, finish="")):
        mender.mend(data)
    (last,) = mender.unfinished(usage=usage, limit=limit)
    assert last == {**chunk({}, finish=reason)}
    whole: Json = {"choices": [{"message": {**delta}}], "usage": usage}
    mend_completion(whole, model="asked", limit=limit)
    assert whole["choices"][0]["finish_reason"] == reason
