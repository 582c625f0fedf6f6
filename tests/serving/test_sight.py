"""What of a conversation a student sees, and what it can't serve for that."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.chat import ChatRequest
from serving.closed_answers import ANSWERS_FILE, KnownAnswer, TokenEstimate
from serving.errors import DamagedRelease, RequestError
from serving.linear import LinearStudent
from serving.sight import SIGHTS, Sees, seen_text, spoken_characters, unsupported

SYSTEM = {"role": "system", "content": "Label the message."}
FIRST = {"role": "user", "content": "My card is gone."}
REPLY = {"role": "assistant", "content": "Lost or stolen?"}
LAST = {"role": "user", "content": "Stolen, in Rome"}
TOOL_CALL = {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}
TOOL = {"role": "tool", "content": "x", "tool_call_id": "1"}
IMAGE = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "https://x"}}]}


def asked(*messages: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"model": "m", "messages": list(messages), **more}


@pytest.mark.parametrize(
    ("request_body", "features"),  # for message, last, conversation
    [
        (asked(SYSTEM, LAST), (None, None, None)),
        (asked(LAST), (None, None, None)),
        (asked(SYSTEM, FIRST, REPLY, LAST), ("turns", None, None)),
        (asked(FIRST, LAST), ("turns", None, None)),
        (asked(SYSTEM, SYSTEM, FIRST, REPLY, LAST), ("turns", None, None)),
        (asked(FIRST, SYSTEM, LAST), ("system", "system", "system")),
        (asked(FIRST, REPLY, LAST, SYSTEM), ("system", "system", "system")),
        (asked(SYSTEM, FIRST, REPLY), ("prefill", "prefill", "prefill")),
        (asked(SYSTEM, FIRST, TOOL_CALL, TOOL), ("tools", "tools", "tools")),
        (asked(SYSTEM, FIRST, TOOL_CALL, TOOL, REPLY, LAST), ("turns", None, "tools")),
        (asked(FIRST, {"role": "function", "name": "f", "content": "x"}, LAST), ("turns", None, "tools")),
        (asked(FIRST, {**REPLY, "function_call": {"name": "f"}}, LAST), ("turns", None, "tools")),
        (asked(IMAGE, REPLY, LAST), ("turns", None, "content")),
        (asked(FIRST, REPLY, IMAGE), ("turns", "content", "content")),
        (asked(FIRST, {"role": "assistant"}, LAST), ("turns", None, "content")),
        (asked(FIRST, {"role": "critic", "content": "hm"}, LAST), ("turns", None, "turns")),
        (asked(FIRST, {"role": "critic", "content": "hm"}), ("turns", "turns", "turns")),
        (asked(SYSTEM), ("turns", "turns", "turns")),
        (asked(FIRST, REPLY, LAST, tools=[{}]), ("tools", "tools", "tools")),
        (asked(FIRST, REPLY, LAST, n=3), ("n", "n", "n")),
    ],
)
def test_features(request_body: dict[str, Any], features: tuple[str | None, ...]) -> None:
    assert tuple(unsupported(request_body, sees) for sees in SIGHTS) == features


def test_what_is_seen() -> None:
    whole = asked(SYSTEM, FIRST, REPLY, LAST)
    assert seen_text(asked(SYSTEM, LAST), "message") == "Stolen, in Rome"
    assert seen_text(whole, "last") == "Stolen, in Rome"
    assert (
        seen_text(whole, "conversation") == "Stolen, in Rome\na_Lost a_or a_stolen\nu_My u_card u_is u_gone"
    )
    assert seen_text(asked(SYSTEM, LAST), "conversation") == "Stolen, in Rome"
    assert spoken_characters(whole) == sum(len(str(turn["content"])) for turn in (FIRST, REPLY, LAST))


def test_of_a_long_conversation_the_newest_is_seen() -> None:
    turns = [{"role": "user", "content": f"turn{number} " * 20} for number in range(100)]
    seen = seen_text(asked(*turns, LAST), "conversation")
    assert seen.startswith("Stolen, in Rome\nu_turn99")
    assert "turn50" not in seen
    assert len(seen) < 2000


texts = st.one_of(st.text(max_size=30), st.just([{"type": "text", "text": "part"}]), st.none(), st.just(5))
turns: st.SearchStrategy[dict[str, Any]] = st.fixed_dictionaries(
    {
        "role": st.sampled_from(["user", "user", "assistant", "system", "developer", "tool", "odd"]),
        "content": texts,
    },
    optional={"tool_calls": st.sampled_from([None, [], [{}]]), "name": st.text(max_size=3)},
)


@given(st.lists(turns, max_size=6), st.sampled_from(SIGHTS))
def test_whatever_is_supported_is_seen(messages: list[dict[str, Any]], sees: Sees) -> None:
    try:
        request = ChatRequest.parse(orjson.dumps(asked(*messages))).body
    except RequestError:
        return
    feature = unsupported(request, sees)
    if feature is None:
        assert seen_text(request, sees).splitlines()[:1] == seen_text(request, "last").splitlines()[:1]
        # Who sees one message only is served by all, and sees the same.
        assert sees != "message" or all(seen_text(request, other) == seen_text(request) for other in SIGHTS)
    else:
        assert feature.isidentifier()
        assert sees == "message" or unsupported(request, "message") is not None
    assert spoken_characters(request) >= 0


def student(sees: Sees) -> LinearStudent:
    """Says `after` once the assistant has said something, else `before`."""
    return LinearStudent(
        vocabulary=["a_lost", "stolen"],
        words=2,
        idf=np.ones(2, dtype=np.float32),
        weights=np.array([[0, 9], [3, 0]], dtype=np.float32),
        intercept=np.zeros(2, dtype=np.float32),
        answers=[KnownAnswer(key, [{"message": {"content": key}}], 1) for key in ("before", "after")],
        tokens=TokenEstimate(0.0, 1.0),
        sees=sees,
    )


@pytest.mark.parametrize(("sees", "answer"), [("last", "before"), ("conversation", "after")])
def test_a_student_keeps_its_sight_in_its_release(sees: Sees, answer: str) -> None:
    read = LinearStudent.load(student(sees).files())
    assert read.sees == sees
    request = asked(SYSTEM, FIRST, REPLY, LAST)
    assert read.unsupported(request) is None
    given_answer = asyncio.run(read.answer(request))
    assert given_answer.choices[0]["message"]["content"] == answer
    assert given_answer.usage is not None
    assert given_answer.usage["prompt_tokens"] == spoken_characters(request)


def test_releases_from_before_there_was_a_choice() -> None:
    files = student("message").files()
    described = orjson.loads(files[ANSWERS_FILE])
    assert described["schema"] == 1 and "sees" not in described, (
        "as they were, for versions that know no more"
    )
    read = LinearStudent.load(files)
    assert read.sees == "message"
    assert read.unsupported(asked(FIRST, REPLY, LAST)) == "turns"


@pytest.mark.parametrize(
    "change", [{"sees": "everything"}, {"sees": None}, {"sees": ["last"]}, {"schema": 3}]
)
def test_a_sight_that_isnt_known_is_refused(change: dict[str, Any]) -> None:
    files = student("last").files()
    described = {**orjson.loads(files[ANSWERS_FILE]), **change}
    with pytest.raises(DamagedRelease):
        LinearStudent.load({**files, ANSWERS_FILE: orjson.dumps(described)})
