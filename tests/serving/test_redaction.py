from __future__ import annotations

import contextlib
import time
from typing import Any

import orjson
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from serving.events import answered, audited, decode, encode, fold
from serving.exchange import Exchange, Json, TeacherAnswer
from serving.log_settings import LogSettings
from serving.redaction import Redactor

ALL = ["email", "phone", "card", "iban", "ip", "ticket:TCK-[0-9]+"]
SECRETS = {
    "email": ["ann.smith+x@mail.example.com", "ü@exämple.de", "A_B@x-y.co.uk"],
    "card": ["4111 1111 1111 1111", "5500-0000-0000-0004", "340000000000009", "6011000000000004"],
    "iban": ["DE89 3704 0044 0532 0130 00", "GB29NWBK60161331926819", "nl91abna0417164300"],
    "ip": ["192.168.1.254", "2001:db8::8a2e:370:7334", "::1"],
    "phone": [
        "+49 30 1234567",
        "+1 (555) 123-4567",
        "0049301234567",
        "030/1234567",
        "555-123-4567",
        "(030) 1234567",
    ],
    "ticket": ["TCK-17"],
}
CASES = [(kind, text) for kind, texts in SECRETS.items() for text in texts]
HARMLESS = [
    "gpt-4o-2024-08-06",
    "order 4111111111111112 of 2024-11-22 10:30:00",
    "12:30 at 3.14 for 1,000,000",
    "a@b and @everyone",
    "version 1.2.3",
    "GB29NWBK60161331926818",
    "0.4111111111111111",
    "99994111111111111111",
    "std::vector<int>",
]


@pytest.mark.parametrize(("kind", "text"), CASES)
@pytest.mark.parametrize("around", ["{}", "call {} now", "({}), please", "<{}>", "x: {}. Thanks"])
def test_what_is_of_a_kind_is_replaced_by_its_name(kind: str, text: str, around: str) -> None:
    assert Redactor(ALL).text(around.format(text)) == around.format(f"[{kind}]")


@pytest.mark.parametrize("text", HARMLESS)
def test_what_only_looks_like_it_stays(text: str) -> None:
    assert Redactor(ALL).text(text) == text


def test_numbers_beside_a_card_dont_hide_it() -> None:
    redact = Redactor(["card"]).text
    assert redact("4111 1111 1111 1111 12/29 123") == "[card] 12/29 123"
    assert redact("7 4111 1111 1111 1111") == "7 [card]"
    assert redact("No.4111111111111111 of 123 456") == "No.[card] of 123 456"
    assert redact("4111 1111 1111 1111 5500 0000 0000 0004") == "[card] [card]"


def test_only_what_is_configured_goes() -> None:
    assert Redactor(["ip"]).text("a@b.example from 10.0.0.1") == "a@b.example from [ip]"


FILLER = st.text(st.sampled_from('ab1 .,:;@+-/()[]{}"\\ü\n0'), max_size=6)
SECRET = st.sampled_from([text for _, text in CASES])
STRINGS = st.one_of(
    st.text(max_size=12),
    st.lists(st.one_of(FILLER, SECRET), max_size=5).map(" ".join),
    st.lists(st.one_of(FILLER, SECRET), max_size=5).map("".join),
)
TOKENS = st.lists(
    st.fixed_dictionaries(
        {"token": STRINGS, "logprob": st.floats(-9, 0), "bytes": st.just([1, 2]), "top_logprobs": st.just([])}
    ),
    max_size=4,
)
VALUES = st.recursive(
    st.one_of(
        STRINGS, st.none(), st.booleans(), st.integers(), st.just(4111111111111111), st.floats(-1e9, 1e9)
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(STRINGS, inner, max_size=4),
        st.fixed_dictionaries({"content": TOKENS}),
        inner.map(lambda value: orjson.dumps(value).decode() if _writable(value) else ""),
    ),
    max_leaves=12,
)


def _writable(value: Any) -> bool:
    try:
        orjson.dumps(value)
    except TypeError:
        return False
    return True


def strings(value: Any) -> list[str]:
    """Every text there is in a value: names of fields, numbers, what tokens say together, and JSON in strings."""
    match value:
        case str():
            inner: Any = None
            with contextlib.suppress(orjson.JSONDecodeError):
                inner = orjson.loads(value)
            return [value, *(strings(inner) if isinstance(inner, dict | list) else [])]
        case dict():
            return [text for key, item in value.items() for text in (key, *strings(item))]
        case list():
            whole = "".join(item["token"] for item in value if isinstance(item, dict) and "token" in item)
            return [whole, *(text for item in value for text in strings(item))]
        case int() if not isinstance(value, bool):
            return [str(value)]
    return []


@settings(max_examples=300, deadline=None)
@example('{"content":[{"token":":"},{"token":":"}]}')
@given(VALUES)
def test_nothing_that_is_found_survives_and_nothing_else_changes(value: Any) -> None:
    redactor = Redactor(ALL)
    before = repr(value)
    redacted = redactor.value(value)
    assert repr(value) == before, "what is redacted is left as it is"
    assert redactor.value(redacted) == redacted
    for text in strings(redacted):
        assert redactor.text(text) == text
    assert shape(redacted) == shape(value)
    if all(redactor.text(text) == text for text in strings(value)):
        assert redacted is value


def shape(value: Any) -> Any:
    match value:
        case dict():
            return [shape(item) for name, item in value.items() if name not in ("bytes", "top_logprobs")]
        case list():
            return [shape(item) for item in value]
        case str() | int() if not isinstance(value, bool):
            return "text or number"
    return value


@settings(max_examples=300, deadline=None)
@given(st.lists(st.one_of(FILLER, SECRET), max_size=6).map("".join))
def test_text_is_redacted_once_and_for_all(text: str) -> None:
    redact = Redactor(ALL).text
    assert redact(redact(text)) == redact(text)


@given(
    st.lists(st.sampled_from(ALL), unique=True, min_size=1),
    SECRET,
    FILLER.filter(lambda t: not t[-1:].isalnum()),
)
def test_a_secret_of_a_configured_kind_is_gone_whatever_stands_around_it(
    kinds: list[str], secret: str, around: str
) -> None:
    kind = next(kind for kind, text in CASES if text == secret)
    redacted = Redactor(kinds).text(f"{around} {secret} {around}")
    if any(name.partition(":")[0] == kind for name in kinds):
        assert secret not in redacted


def test_what_is_found_again_and_again_goes_as_a_whole() -> None:
    redact = Redactor(["last:x(?=\\[|$)"]).text
    assert redact("a xx") == "a [last][last]"
    assert redact("a " + "x" * 100) == "[last]"


def test_tokens_that_spell_it_together_are_redacted_together() -> None:
    pieces = ["Mail", " ann", "@", "x.", "example", " now"]
    tokens = [
        {"token": piece, "logprob": -0.1, "bytes": list(piece.encode()), "top_logprobs": [{"token": piece}]}
        for piece in pieces
    ]
    choice = {"message": {"role": "assistant", "content": "".join(pieces)}, "logprobs": {"content": tokens}}
    redacted = Redactor(["email"]).value([choice])[0]
    assert redacted["message"] == {"role": "assistant", "content": "Mail [email] now"}
    left = redacted["logprobs"]["content"]
    assert [token["token"] for token in left] == ["Mail", "[email]", "", "", "", " now"]
    assert [token["logprob"] for token in left] == [-0.1] * 6
    assert left[0] == tokens[0]
    assert (left[1]["bytes"], left[1]["top_logprobs"]) == (None, [])


def test_arguments_of_tools_are_read_as_what_they_say() -> None:
    arguments = '{"to": "ann\\u0040mail.example", "n": 4111111111111111, "note": "a\\nb"}'
    call = {"type": "function", "function": {"name": "send", "arguments": arguments}}
    redacted = Redactor(ALL).value({"tool_calls": [call]})
    said = redacted["tool_calls"][0]["function"]["arguments"]
    assert orjson.loads(said) == {"to": "[email]", "n": "[card]", "note": "a\nb"}


def test_words_of_the_api_and_small_numbers_stay() -> None:
    choice = {
        "index": 7,
        "message": {"role": "assistant", "content": "the assistant of 1234567: stop"},
        "finish_reason": "stop",
        "seed": 1234567,
    }
    assert Redactor(["number:[0-9]+", "word:stop|assistant"]).value(choice) == {
        "index": 7,
        "message": {"role": "assistant", "content": "the [word] of [number]: [word]"},
        "finish_reason": "stop",
        "seed": "[number]",
    }


def test_fields_whose_names_say_the_same_now_stay_apart() -> None:
    redacted = Redactor(["email"]).value({"a@x.example": 1, "b@x.example": 2})
    assert redacted == {"[email]": 1, "[email]_": 2}


class TestEvents:
    def exchange(self, text: str, answer: str) -> Exchange:
        request: Json = {
            "model": "m",
            "messages": [{"role": "user", "content": text}],
            "user": "ann@x.example",
        }
        choices = [{"index": 0, "message": {"role": "assistant", "content": answer}, "finish_reason": "stop"}]
        teacher = TeacherAnswer("big", choices, {"prompt_tokens": 4111111111111111}, 0.5)
        return Exchange(
            "id", "ann@x.example", 1.0, "t", "h", request, "teacher", "no_release", teacher=teacher
        )

    def test_what_was_changed_stands_in_the_exchange(self) -> None:
        redact = Redactor(ALL)
        event = redact.event(answered(self.exchange("hello", "write to ann@x.example")))
        line = encode(event)
        assert b"ann" not in line
        again = decode(line)
        assert again is not None
        (exchange,) = fold([again]).values()
        assert exchange.redacted == ["request", "request_id", "teacher"]
        assert exchange.request["user"] == exchange.request_id == "[email]"
        assert exchange.teacher is not None
        assert exchange.teacher.usage == {"prompt_tokens": 4111111111111111}
        assert redact.event(again) == again

    def test_an_audits_answer_counts_with_its_exchange(self) -> None:
        exchange = self.exchange("hello", "write to ann@x.example")
        plain = Exchange("id", "r", 1.0, "t", "h", {"model": "m"}, "student", "confident", audit="pending")
        late = Redactor(ALL).event(audited("id", teacher=exchange.teacher, agreement=False, at=2.0))
        assert b"ann" not in encode(late)
        for order in ([answered(plain), late], [late, answered(plain)]):
            assert fold(order)["id"].redacted == ["teacher"]

    def test_what_holds_nothing_is_the_same_event(self) -> None:
        event = answered(Exchange("id", "r", 1.0, "t", "h", {"model": "m"}, "teacher", "no_release"))
        assert Redactor(ALL).event(event) is event


@pytest.mark.parametrize(
    ("kinds", "message"),
    [
        (["mail"], "'mail' is neither one of email, iban, card, ip, phone nor name:pattern"),
        (["email:x"], "email is built in; give your own pattern another name"),
        (["own:["], "the pattern of own should be a regular expression"),
        (["own:x*"], "the pattern of own finds an empty text, so it would be found everywhere"),
        (["own:[a-z]+"], r"the pattern of own finds \[own\], which takes the place"),
        (["own:mai", "email"], r"the pattern of own finds \[email\], which takes the place"),
        (["own:a1", "own:b1"], "own is there twice; give each pattern a name of its own"),
    ],
)
def test_a_bad_configuration_says_what_is_wrong(kinds: list[str], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        LogSettings(redact=kinds)


@pytest.mark.parametrize("text", ["a@b.cc ", "x" * 63 + " ", "x", "a@", "b.", "+1 ", "12 ", "1.", "a:"])
def test_a_long_text_takes_time_in_proportion(text: str) -> None:
    """A client that can stop the event loop for minutes stops everybody's requests."""
    long = text * (1_000_000 // len(text)) + "@b."
    began = time.process_time()
    Redactor(ALL).text(long)
    assert time.process_time() - began < 10


def test_many_tokens_take_time_in_proportion() -> None:
    tokens = [{"token": token} for _ in range(20_000) for token in ("a", "@", "b.cc", " ")]
    began = time.process_time()
    redacted = Redactor(ALL).value({"content": tokens})
    assert time.process_time() - began < 10
    assert "@" not in "".join(token["token"] for token in redacted["content"])


def test_what_is_nested_too_deeply_to_be_searched_is_not_kept() -> None:
    """It must not end in an error of Python's own: nobody counts what is lost by that."""
    redactor = Redactor(["email"])
    deep = '{"\\u0061":' + "[" * 900 + '"x\\u0040example.com"' + "]" * 900 + "}"
    assert redactor.value({"arguments": deep}) == {"arguments": "[email]"}
    nested: Any = "x"
    for _ in range(2000):
        nested = [nested]
    with pytest.raises(ValueError, match="nested too deeply"):
        redactor.event({"event": "answered", "id": "1", "teacher": {"choices": [{"message": nested}]}})
