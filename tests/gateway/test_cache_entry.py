"""An entry is read back as it was written, or not at all."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.cache_entry import CachedAnswer, _digest, decode, encode
from serving.exchange import StudentAnswer, TeacherAnswer

CHOICES: list[dict[str, Any]] = [
    {
        "index": 0,
        "message": {"role": "assistant", "content": None, "refusal": "No.", "tool_calls": [{"id": "call_1"}]},
        "logprobs": {"content": [{"token": "No", "logprob": -0.1, "bytes": [78, 111], "top_logprobs": []}]},
        "finish_reason": "stop",
    },
    {"index": 1, "message": {"role": "assistant", "content": "Nö."}, "finish_reason": "length"},
]
TEACHER = TeacherAnswer("big", CHOICES, {"prompt_tokens": 3}, 0.5, "fp_1", 0.01, "2026", True)
STUDENT = StudentAnswer(
    "linear", [{"index": 0, "message": {"content": "else"}}], None, 0.001, 2.5, 0.0, {"margin": 2.5}
)


def an_answer(**changes: Any) -> CachedAnswer:
    completion = {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "choices": CHOICES,
        "usage": {"prompt_tokens": 3},
    }
    given: dict[str, Any] = {
        "completion": completion,
        "origin": "teacher",
        "release": None,
        "confidence": None,
        "threshold": None,
        "eligible": True,
        "student": None,
        "teacher": TEACHER,
        "stored_at": 1_800_000_000.25,
        **changes,
    }
    return CachedAnswer(**given)


ANSWERS = [
    an_answer(),
    an_answer(release="r0001", confidence=0.25, threshold=0.5, student=STUDENT),
    an_answer(
        origin="student", release="r0001", confidence=1.0, threshold=0.5, teacher=None, student=STUDENT
    ),
    an_answer(eligible=False, teacher=None),
]


@pytest.mark.parametrize("answer", ANSWERS)
def test_it_is_read_back_as_it_was_written(answer: CachedAnswer) -> None:
    assert decode(encode(answer, "key"), "key") == answer


def test_choices_are_stored_once() -> None:
    assert encode(an_answer(), "key").count(b'"refusal"') == 1
    both = an_answer(student=STUDENT)
    assert encode(both, "key").count(b'"refusal"') == encode(both, "key").count(b'"else"') == 1


def test_choices_that_the_client_did_not_get_as_they_were_are_kept_apart() -> None:
    stripped = [{**choice, "logprobs": None} for choice in CHOICES]
    answer = an_answer(completion={"choices": stripped})
    assert decode(encode(answer, "key"), "key") == answer


@given(st.text(st.characters(exclude_categories=["Cs"])), st.text(st.characters(exclude_categories=["Cs"])))
def test_it_belongs_to_its_key(key: str, other: str) -> None:
    assert (decode(encode(an_answer(), key), other) is None) == (key != other)


@given(st.data())
def test_damage_is_no_entry(data: st.DataObject) -> None:
    whole = encode(an_answer(), "key")
    torn = whole[: data.draw(st.integers(0, len(whole) - 1))]
    assert decode(torn, "key") is None
    assert decode(whole + data.draw(st.binary(min_size=1, max_size=9)), "key") is None
    at = data.draw(st.integers(0, len(whole) - 1))
    flipped = whole[:at] + bytes([whole[at] ^ data.draw(st.integers(1, 255))]) + whole[at + 1 :]
    assert decode(flipped, "key") is None


@given(st.binary(max_size=200), st.text(st.characters(exclude_categories=["Cs"])))
def test_garbage_is_no_entry(data: bytes, key: str) -> None:
    assert decode(data, key) is None


@pytest.mark.parametrize(
    "fields", [[], {}, None, {"completion": 1}, {"completion": {}, "student": 3, "teacher": None}]
)
def test_intact_bytes_of_another_shape_are_no_entry(fields: Any) -> None:
    body = orjson.dumps(fields)
    assert decode(_digest("key", body) + body, "key") is None


def test_what_is_no_json_is_refused() -> None:
    with pytest.raises(ValueError, match="not JSON"):
        encode(an_answer(completion={"choices": "\ud800"}), "key")


def test_clocks_of_two_machines_may_differ() -> None:
    assert an_answer(stored_at=100.0).age_s(now=160.0) == 60.0
    assert an_answer(stored_at=100.0).age_s(now=40.0) == 0.0
