from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.agreement import comparison
from serving.exchange import Json
from serving.task_settings import AgreementChoice

EXACT = comparison(AgreementChoice(kind="exact"))
JSON = comparison(AgreementChoice(kind="json"))
NUMERIC = comparison(AgreementChoice(kind="numeric", tolerance=0.01))


def said(content: Any, finish: str | None = "stop", **message: Any) -> list[Json]:
    return [
        {"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": content, **message}}
    ]


def called(*calls: tuple[str, str], finish: str = "tool_calls") -> list[Json]:
    tool_calls = [
        {"id": f"call_{i}", "type": "function", "function": {"name": name, "arguments": arguments}}
        for i, (name, arguments) in enumerate(calls)
    ]
    return said(None, finish, tool_calls=tool_calls)


@pytest.mark.parametrize(
    ("a", "b", "agree"),
    [
        ("card_arrival", " card_arrival\n", True),
        ("two  words", "two\n\twords", True),
        ("ﬁne", "fine", True),
        ("１２", "12", True),
        ("Yes", "yes", False),
        ("yes.", "yes", False),
        ('"yes"', "yes", False),
        ("", None, True),
        ("yes", None, False),
        ([{"type": "text", "text": "ye"}, {"type": "text", "text": "s"}], "yes", True),
    ],
)
def test_exact_forgives_white_space_and_unicode_forms_only(a: Any, b: Any, agree: bool) -> None:
    assert EXACT.agree(said(a), said(b)) is agree


@pytest.mark.parametrize(
    ("a", "b", "agree"),
    [
        ('{"a": 1, "b": [true, null]}', '{"b":[true,null],"a":1.0}', True),
        ('```json\n{"a": 1}\n```', '{"a":1}', True),
        ('```\n{"a": 1}\n```\n', '{"a":1}', True),
        ("1e2", "100", True),
        ('"é"', '"\\u00e9"', True),
        ("[1, 2]", "[2, 1]", False),
        ('{"a": true}', '{"a": 1}', False),
        ('{"a": "x "}', '{"a": "x"}', False),
        ("123456789012345678901", "123456789012345678902", False),
        ('{"a": 1', '{"a":  1', True),
        ('{"a": 1', '{"a": 1}', False),
        ("１", "1", False),
        ("NaN", "NaN", True),
        ("NaN", "null", False),
        ("1e999", "1e998", False),
        ("[" * 5000, "[" * 5000, True),
        ("[" * 5000, "[" * 5001, False),
        ("yes", '"yes"', False),
    ],
)
def test_json_compares_values_and_never_takes_text_for_one(a: str, b: str, agree: bool) -> None:
    assert JSON.agree(said(a), said(b)) is agree


@pytest.mark.parametrize(
    ("a", "b", "agree"),
    [
        ("100", "101", True),
        ("100", "102", False),
        ("$1,234.50", "$1230", True),
        ("$100", "€100", False),
        ("12 kg", "12.1 kg", True),
        ("12 kg", "12 lb", False),
        ("0", "0.0", True),
        ("0", "0.001", False),
        ("-5", "5", False),
        (".5", "0.5", True),
        ("1e3", "1000", True),
        ("3 of 5", "3 of 5", True),
        ("3 of 5", "3 of 5.01", False),
        ("none", "none", True),
        ("none", "0", False),
        ("9" * 400, "9" * 401, False),
    ],
)
def test_numeric_is_relative_and_the_words_around_must_be_the_same(a: str, b: str, agree: bool) -> None:
    assert NUMERIC.agree(said(a), said(b)) is agree
    assert NUMERIC.key(said(a)) is None


@pytest.mark.parametrize("kind", [EXACT, JSON, NUMERIC], ids=["exact", "json", "numeric"])
class TestWhatCountsForEveryKind:
    def test_tool_calls_need_the_same_names_and_canonical_arguments(self, kind: Any) -> None:
        call = called(("refund", '{"id": 1, "why": "late"}'))
        assert kind.agree(call, called(("refund", '{"why":"late","id":1.0}')))
        assert kind.agree(call, called(("refund", '{"why":"late","id":1}'), finish="stop"))
        assert not kind.agree(call, called(("refund", '{"id": 2, "why": "late"}')))
        assert not kind.agree(call, called(("cancel", '{"id": 1, "why": "late"}')))
        assert not kind.agree(call, called(("refund", '{"id": 1, "why": "late"}'), ("refund", "{}")))
        assert not kind.agree(call, said('{"id": 1, "why": "late"}'))
        assert not kind.agree(call, said(""))

    def test_a_call_of_the_old_kind_agrees_with_the_same_tool_call(self, kind: Any) -> None:
        old = said(None, "function_call", function_call={"name": "f", "arguments": "{}"})
        assert kind.agree(old, called(("f", "{ }")))
        assert not kind.agree(old, called(("g", "{ }")))

    def test_custom_tools_compare_by_input(self, kind: Any) -> None:
        def custom(text: str) -> list[Json]:
            return said(None, tool_calls=[{"type": "custom", "custom": {"name": "sql", "input": text}}])

        assert kind.agree(custom("select 1"), custom("select 1"))
        assert not kind.agree(custom("select 1"), custom("select 2"))

    def test_a_refusal_is_never_content(self, kind: Any) -> None:
        refusal = said(None, refusal="5")
        assert kind.agree(refusal, said(None, refusal="5"))
        assert not kind.agree(refusal, said("5"))
        assert not kind.agree(refusal, said(""))

    def test_a_cut_answer_never_agrees_with_a_whole_one(self, kind: Any) -> None:
        assert not kind.agree(said("5", "length"), said("5"))
        assert not kind.agree(said("5", "content_filter"), said("5", "length"))
        assert kind.agree(said("5", "length"), said("5", "length"))
        assert kind.agree(said("5", None), said("5"))

    def test_the_first_choice_is_compared_and_their_number(self, kind: Any) -> None:
        assert kind.agree(said("5") + said("6"), said("5") + said("7"))
        assert not kind.agree(said("5") + said("6"), said("5"))
        assert not kind.agree(said("5"), [])
        assert kind.agree([], [])

    def test_malformed_answers_are_compared_and_not_raised(self, kind: Any) -> None:
        broken: list[list[Json]] = [
            [{}],
            [{"message": None}],
            [{"message": {"content": 5, "tool_calls": {"a": 1}}}],
            [{"message": {"content": [None, {"text": 3}], "tool_calls": [None, {"function": None}]}}],
            [{"message": {"content": "5", "function_call": "f", "refusal": [float("nan")]}}],
        ]
        for choices in broken:
            kind.key(choices)
            assert not kind.agree(choices, said("5"))
            kind.agree(choices, said("5"))


texts = st.one_of(
    st.text(max_size=8),
    st.sampled_from(
        ["yes", "Yes", " yes ", "1", "1.0", "1.005", "$1", '{"a":1}', '{"a": 1.0}', "{", " text {", ""]
    ),
)
answers: st.SearchStrategy[list[Json]] = st.one_of(
    st.builds(said, texts, st.sampled_from(["stop", "length", None])),
    st.builds(lambda text: said(None, refusal=text), texts),
    st.builds(lambda text: called(("f", text)), texts),
    st.builds(lambda text: said(text) + said("second"), texts),
    st.just([]),
)


@given(a=answers, b=answers)
def test_agreement_is_reflexive_symmetric_and_the_same_as_equal_keys(a: list[Json], b: list[Json]) -> None:
    for kind in (EXACT, JSON, NUMERIC):
        assert kind.agree(a, a)
        assert kind.agree(a, b) == kind.agree(b, a)
    for kind in (EXACT, JSON):
        assert kind.agree(a, b) == (kind.key(a) == kind.key(b))


@given(texts)
def test_the_key_of_an_ordinary_exact_answer_is_its_text(text: str) -> None:
    key = EXACT.key(said(text))
    assert key is not None
    assert not key.startswith(" ")
