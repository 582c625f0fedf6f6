"""Whatever a student's server sends: what is made of it is an answer that the official client reads, or an error."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from openai.types.chat import ChatCompletionChunk

from serving.mending import Mender
from serving.student_chunk import answer_of

Json = dict[str, Any]

ODD = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 3)
    | st.floats(allow_nan=False)
    | st.sampled_from(["", "late"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from("ab"), inner, max_size=2),
    max_leaves=4,
)
TEXT = st.sampled_from([None, "late", ""]) | ODD
FUNCTION = st.fixed_dictionaries({}, optional={"name": TEXT, "arguments": TEXT, "odd": ODD}) | ODD
CALL = (
    st.fixed_dictionaries(
        {"function": FUNCTION},
        optional={"index": st.integers(0, 3) | ODD, "id": TEXT, "type": st.just("function"), "odd": ODD},
    )
    | ODD
)
DELTA = (
    st.fixed_dictionaries(
        {},
        optional={
            "role": st.sampled_from([None, "", "assistant", "user", "model"]),
            "content": TEXT,
            "refusal": TEXT,
            "tool_calls": st.lists(CALL, max_size=2) | ODD,
            "reasoning_content": TEXT,
        },
    )
    | ODD
)
CHOICE = (
    st.fixed_dictionaries(
        {"delta": DELTA},
        optional={
            "index": st.sampled_from([0, None]) | ODD,
            "finish_reason": st.sampled_from([None, "", "stop", "length", 7, {}]),
            "stop_reason": ODD,
        },
    )
    | ODD
)


def deep(levels: int) -> object:
    made: object = "x"
    for _ in range(levels):
        made = {"a": made}
    return made


@example([{"delta": {"role": ""}}])
@given(st.lists(CHOICE, max_size=2) | ODD)
def test_it_is_an_answer_or_refused(choices: object) -> None:
    try:
        answer = answer_of(choices)
    except ValueError as error:
        assert str(error)
        return
    assert len(answer) <= 1
    chunk: Json = {"choices": answer}
    Mender(model="small").mend(chunk)
    ChatCompletionChunk.model_validate(orjson.loads(orjson.dumps(chunk)))
    assert all(type(choice["index"]) is int and choice["index"] == 0 for choice in chunk["choices"])


@pytest.mark.parametrize(
    ("choices", "said"),
    [
        ({"a": 1}, "choices that are an object"),
        ([None], "a choice that is null"),
        ([{"delta": {}}, {"delta": {}}], "2 choices"),
        ([{"index": 1, "delta": {"content": "late"}}], "a choice of index '1'"),
        ([{"index": -1, "delta": {}}], "a choice of index '-1'"),
        ([{"index": True, "delta": {}}], "a choice of index 'True'"),
        ([{"delta": "late"}], "delta that is a text"),
        ([{"delta": {"content": 5}}], "content that is a number"),
        ([{"delta": {"content": [{"type": "text", "text": "late"}]}}], "content that is a list"),
        ([{"delta": {"refusal": {}}}], "refusal that is an object"),
        ([{"delta": {"role": {}}}], "role that is an object"),
        ([{"delta": {}, "finish_reason": {}}], "finish_reason that is an object"),
        ([{"delta": {"tool_calls": "late"}}], "tool_calls that is a text"),
        ([{"delta": {"tool_calls": ["late"]}}], "a tool call that is a text"),
        ([{"delta": {"tool_calls": [{"function": None}]}}], "function that is null"),
        ([{"delta": {"tool_calls": [{"function": {"name": 5}}]}}], "name that is a number"),
        ([{"delta": {"tool_calls": [{"function": {"arguments": 5}}]}}], "arguments that is a number"),
        ([{"delta": {"tool_calls": [{"index": 2**40, "function": {}}]}}], "index"),
    ],
)
def test_what_is_wrong_is_said(choices: object, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        answer_of(choices)


def test_fields_of_others_stay_unless_they_are_structures() -> None:
    delta = {"content": "late", "reasoning_content": "hm", "audio": {"data": "x"}, "odd": deep(900)}
    assert answer_of([{"index": 0, "delta": delta, "finish_reason": "stop", "odd": deep(900)}]) == [
        {"index": 0, "delta": {"content": "late", "reasoning_content": "hm"}, "finish_reason": "stop"}
    ]
    assert answer_of(None) == answer_of([]) == []
