"""Requests that must get the same answer have the same key, and no others."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from gateway.cache_key import IGNORED_FIELDS, KEY_HEADERS, cache_key, cache_scope
from serving.teacher_settings import TeacherSettings
from serving.tenant import ANONYMOUS

TEXT = st.text(max_size=8)
NUMBERS = st.one_of(
    st.integers(-(2**63), 2**64 - 1),
    st.floats(allow_nan=False, allow_infinity=False),
    st.sampled_from([0, 0.0, -0.0, 1, 1.0, 1e16, 2**53, 2**53 + 1, float(2**53), 1e300]),
)
LEAVES = st.one_of(st.none(), st.booleans(), NUMBERS, TEXT, st.sampled_from(["1", "true", "null", "1.0", ""]))
JSON = st.recursive(
    LEAVES,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXT, inner, max_size=3)),
    max_leaves=8,
)
FIELDS = st.one_of(
    st.sampled_from(
        ["model", "messages", "temperature", "seed", "n", "tools", "response_format", "logprobs"]
    ),
    TEXT,
).filter(lambda name: name not in IGNORED_FIELDS)
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant"]), "content": JSON}),
    min_size=1,
    max_size=3,
)
REQUESTS = st.builds(
    lambda fields, messages: {**fields, "messages": messages},
    st.dictionaries(FIELDS, JSON, max_size=4),
    MESSAGES,
)
IGNORED = st.dictionaries(st.sampled_from(sorted(IGNORED_FIELDS)), JSON)
SHARES = st.sampled_from(["tenant", "task"])


def key(request: dict[str, Any], **changes: Any) -> str:
    given: dict[str, Any] = {
        "tenant": "t",
        "task": "parcels",
        "generation": 1,
        "share": "tenant",
        "headers": [],
        **changes,
    }
    return cache_key(request, **given)


def shuffled(value: Any, order: random.Random) -> Any:
    """The same JSON value, its fields in another order and its numbers written otherwise."""
    if isinstance(value, dict):
        items = [(name, shuffled(item, order)) for name, item in value.items()]
        order.shuffle(items)
        return dict(items)
    if isinstance(value, list):
        return [shuffled(item, order) for item in value]
    if (
        isinstance(value, int)
        and not isinstance(value, bool)
        and float(value) == value
        and order.random() < 0.5
    ):
        return float(value) if int(float(value)) == value else value
    return value


def meaning(value: Any) -> Any:
    """What a JSON value says, comparable by ==: types kept apart, numbers by their exact value."""
    if isinstance(value, dict):
        return ("object", {name: meaning(item) for name, item in value.items()})
    if isinstance(value, list):
        return ("list", [meaning(item) for item in value])
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return (type(value).__name__, value)
    return ("number", value)


@given(REQUESTS, IGNORED, IGNORED, st.randoms(use_true_random=False), SHARES)
def test_order_spelling_and_ignored_fields_make_no_difference(
    request: dict[str, Any], some: Any, others: Any, order: random.Random, share: str
) -> None:
    assert key({**request, **some}, share=share) == key(shuffled({**others, **request}, order), share=share)


@given(REQUESTS, REQUESTS)
@example({"messages": [], "n": 1}, {"messages": [], "n": True})
@example({"messages": [], "n": 1}, {"messages": [], "n": "1"})
@example({"messages": [], "n": 0}, {"messages": [], "n": False})
@example({"messages": [], "n": None}, {"messages": []})
@example({"messages": [], "n": ""}, {"messages": [], "n": None})
@example({"messages": [], "n": []}, {"messages": [], "n": {}})
@example({"messages": [], "n": 2**53}, {"messages": [], "n": 2**53 + 1})
@example({"messages": [], "n": [1, 2]}, {"messages": [], "n": [2, 1]})
@example({"messages": [], "n": "é"}, {"messages": [], "n": "e\u0301"})
@example({"messages": [], "n": "\ud800"}, {"messages": [], "n": "?"})
@example({"messages": [], "n": 10**300}, {"messages": [], "n": 1e300})
def test_two_requests_share_a_key_exactly_if_they_say_the_same(
    one: dict[str, Any], other: dict[str, Any]
) -> None:
    assert (key(one) == key(other)) == (meaning(one) == meaning(other))


@given(REQUESTS, st.data())
def test_any_other_change_is_another_key(request: dict[str, Any], data: st.DataObject) -> None:
    changed = copy.deepcopy(request)
    place: Any = changed
    while True:
        at = data.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
        inner = place[at]
        if not isinstance(inner, (dict, list)) or not inner or data.draw(st.booleans()):
            break
        place = inner
    change = data.draw(st.sampled_from(["replace", "remove", "add"]))
    if change == "remove":
        del place[at]
    elif change == "add":
        added = data.draw(JSON)
        if isinstance(place, dict):
            place[data.draw(FIELDS.filter(lambda name: name not in place))] = added
        else:
            place.append(added)
    else:
        place[at] = data.draw(JSON)
        assume(meaning(changed) != meaning(request))
    assert key(changed) != key(request)


@given(REQUESTS, st.permutations(range(3)))
def test_messages_have_an_order(request: dict[str, Any], order: list[int]) -> None:
    messages = [{"role": "user", "content": str(position)} for position in range(3)]
    reordered = [messages[position] for position in order]
    same = key({**request, "messages": messages}) == key({**request, "messages": reordered})
    assert same == (order == [0, 1, 2])


@given(REQUESTS, st.sampled_from(["tenant", "task", "generation", "release"]), SHARES)
def test_whose_request_it_is_makes_a_difference(request: dict[str, Any], name: str, share: str) -> None:
    other = {"tenant": "u", "task": "returns", "generation": 2, "release": "0" * 64}[name]
    shared = name == "tenant" and share == "task"
    assert (key(request, share=share) == key(request, share=share, **{name: other})) == shared


def test_no_tenant_is_taken_for_everybody() -> None:
    request = {"model": "m", "messages": []}
    assert key(request, tenant=ANONYMOUS) != key(request, tenant=ANONYMOUS, share="task")


def test_another_release_of_the_same_generation_is_another_key() -> None:
    request = {"model": "m", "messages": []}
    assert key(request, release="a" * 64) != key(request, release="b" * 64)


def test_gateways_before_different_teachers_share_nothing() -> None:
    teachers = [
        TeacherSettings(),
        TeacherSettings(model="gpt-4o"),
        TeacherSettings(base_url="https://example.com/v1"),
        TeacherSettings(base_url="https://example.com/v1", model="gpt-4o"),
    ]
    assert len({cache_scope(teacher) for teacher in teachers}) == 4
    assert cache_scope(TeacherSettings()) == cache_scope(TeacherSettings(timeout_s=1.0))


@pytest.mark.parametrize("name", sorted(KEY_HEADERS))
def test_headers_that_choose_an_account_make_a_difference(name: str) -> None:
    request = {"model": "m", "messages": []}
    plain = key(request, headers=[("user-agent", "a"), ("authorization", "Bearer x")])
    assert plain == key(request, headers=[("user-agent", "b"), ("x-request-id", "1")]) == key(request)
    chosen = key(request, headers=[(name, "one")])
    assert len({plain, chosen, key(request, headers=[(name, "two")])}) == 3


def test_fields_do_not_slip_into_headers() -> None:
    request = {"model": "m", "messages": []}
    assert key(request, headers=[("openai-beta", "x")]) != key({**request, "openai-beta": "x"})


def test_what_is_no_json_has_no_key() -> None:
    for value in (float("nan"), float("inf"), {1, 2}, object()):
        with pytest.raises(ValueError, match="not JSON"):
            key({"model": "m", "messages": [], "temperature": value})
