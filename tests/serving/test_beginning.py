"""No beginning of an answer rules out what it becomes, however it is written; most others are ruled out soon."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.agreement import ExactComparison, JsonComparison
from serving.beginning import may_become

WORDS = st.text(
    st.sampled_from('abé \u0301\u0323\u1100\u1161\u11a8…½\n"\\{}😀ﬁ¨') | st.characters(codec="utf-8"),
    max_size=12,
)
VALUES = st.recursive(
    WORDS | st.integers() | st.booleans() | st.none(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=6,
)


def choices(text: str, finish: str = "stop") -> list[dict[str, Any]]:
    return [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}]


@given(WORDS, st.integers(0, 12), st.sampled_from(["stop", "length"]))
def test_a_text_may_become_itself(text: str, cut: int, finish: str) -> None:
    for comparison in (ExactComparison(), JsonComparison()):
        assert may_become(text[:cut], comparison.key(choices(text, finish)))


@given(
    VALUES.filter(lambda value: isinstance(value, dict | list | str)),
    st.integers(0, 80),
    st.booleans(),
    st.sampled_from([None, 2]),
    st.sampled_from(["{}", "```json\n{}\n```"]),
    st.randoms(use_true_random=False),
)
def test_json_may_become_itself_however_it_is_written(
    value: Any, cut: int, ascii_only: bool, indent: int | None, around: str, random: Any
) -> None:
    if isinstance(value, dict):
        names = list(value)
        random.shuffle(names)
        value = {name: value[name] for name in names}
    text = around.replace("{}", json.dumps(value, ensure_ascii=ascii_only, indent=indent))
    assert may_become(text[:cut], JsonComparison().key(choices(text)))


@pytest.mark.parametrize(
    ("said", "answer"),
    [
        ("Your refund was", "Your parcel left"),
        ('{"intent": "refund", "or', '{"intent": "where", "order": 7}'),
        ('{"order": 7, "intent": "ref', '{"intent": "where", "order": 7}'),
        ('["where"', '{"intent": "where"}'),
        ("I don't know", '{"intent": "where"}'),
        ('{"intent"', "I don't know"),
    ],
)
def test_what_has_begun_otherwise_becomes_another(said: str, answer: str) -> None:
    assert not may_become(said, JsonComparison().key(choices(answer)))
