from __future__ import annotations

import time
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.assembler import Assembler
from serving.chat import ChatRequest, chunks, completion, last_user_text, sse, system_text
from serving.errors import RequestError
from serving.exchange import Json

HELLO: Json = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}


def with_(**fields: object) -> bytes:
    return orjson.dumps({**HELLO, **fields})


# -- reading a request


def test_unknown_fields_and_numbers_survive() -> None:
    raw = (
        b'{"model":"m","messages":[{"role":"user","content":"h\xc3\xa9","x-own":[1]}],"temperature":1.0,'
        b'"seed":18446744073709551615,"low":-9223372036854775808,"tiny":1e-7,"big":1e300,"own":{"deep":null}}'
    )
    request = ChatRequest.parse(raw)
    assert orjson.loads(request.raw) == orjson.loads(raw) == request.body
    assert request.body["seed"] == 18446744073709551615
    assert isinstance(orjson.loads(request.raw)["temperature"], float)
    assert (request.model, request.stream, request.wants_usage) == ("m", False, False)


def test_of_two_equal_keys_the_last_wins_for_everybody() -> None:
    request = ChatRequest.parse(b'{"model":"cheap","messages":[{"role":"user"}],"model":"dear"}')
    assert request.model == "dear"
    assert request.raw.count(b'"model"') == 1


@pytest.mark.parametrize(
    ("fields", "stream", "wants_usage"),
    [
        ({"stream": None}, False, False),
        ({"stream": True}, True, False),
        ({"stream": True, "stream_options": {"include_usage": True}}, True, True),
        ({"stream": True, "stream_options": {"include_usage": False}}, True, False),
        ({"stream": True, "stream_options": None}, True, False),
        ({"stream_options": {"include_usage": True}}, False, False),
        ({"n": 3}, False, False),
        ({"n": None}, False, False),
    ],
)
def test_streaming_as_asked(fields: dict[str, object], stream: bool, wants_usage: bool) -> None:
    request = ChatRequest.parse(with_(**fields))
    assert (request.stream, request.wants_usage) == (stream, wants_usage)


@pytest.mark.parametrize(
    ("raw", "param", "says"),
    [
        (b"", None, "isn't valid JSON"),
        (b"{", None, "isn't valid JSON"),
        (b"\xff\xfe{}", None, "isn't valid JSON"),
        (b'{"temperature": NaN}', None, "isn't valid JSON"),
        (b'{"temperature": 1e999}', None, "isn't valid JSON"),
        (b"[]", None, "not a list"),
        (b'"hi"', None, "not the string 'hi'"),
        (b"null", None, "not null"),
        (orjson.dumps({"model": "m"}), "messages", "'messages' is missing"),
        (orjson.dumps({"messages": HELLO["messages"]}), "model", "'model' is missing"),
        (with_(model=7), "model", "not the number 7"),
        (with_(model=""), "model", "not an empty string"),
        (with_(model=None), "model", "not null"),
        (with_(messages="hello"), "messages", "not the string 'hello'"),
        (with_(messages=[]), "messages", "empty"),
        (with_(messages=[{"role": "user"}, "x"]), "messages[1]", "not the string 'x'"),
        (with_(messages=[{"content": "x"}]), "messages[0].role", "not null"),
        (with_(messages=[{"role": ["user"]}]), "messages[0].role", "not a list"),
        (with_(stream="yes"), "stream", "not the string 'yes'"),
        (with_(stream=1), "stream", "not the number 1"),
        (with_(n=0), "n", "at least 1, not the number 0"),
        (with_(n=-1), "n", "at least 1"),
        (with_(n=1.5), "n", "not the number 1.5"),
        (with_(n=True), "n", "not true"),
        (with_(stream_options=[]), "stream_options", "not a list"),
        (
            b'{"model":"m","messages":[{"role":"user"}],"seed":18446744073709551616}',
            None,
            "18446744073709551616",
        ),
        (b'{"model":"m","messages":[{"role":"user"}],"seed":-9223372036854775809}', None, "64 bits"),
        (b'{"model":"m","messages":[{"role":"user"}],"seed":' + b"9" * 5000 + b"}", None, "JSON|64 bits"),
    ],
)
def test_what_cannot_be_served_is_said(raw: bytes, param: str | None, says: str) -> None:
    with pytest.raises(RequestError, match=says) as caught:
        ChatRequest.parse(raw)
    assert caught.value.status == 400
    assert caught.value.param == param
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("depth", [254, 255, 1000, 1025, 200_000])
def test_deep_nesting_is_an_error_of_the_request(depth: int) -> None:
    for opening, closing in ((b"[", b"]"), (b'{"a":', b"}")):
        inner = opening * depth + b"1" + closing * depth
        with pytest.raises(RequestError) as caught:
            ChatRequest.parse(b'{"model":"m","messages":[{"role":"user"}],"x":' + inner + b"}")
        assert caught.value.status == 400


@given(
    st.binary(max_size=60)
    | st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(),
        lambda v: (
            st.lists(v, max_size=3)
            | st.dictionaries(st.sampled_from(["model", "messages", "role", "stream", "n"]), v)
        ),
    ).map(orjson.dumps)
)
def test_any_body_is_read_or_refused(raw: bytes) -> None:
    try:
        request = ChatRequest.parse(raw)
    except RequestError:
        return
    assert orjson.loads(request.raw) == request.body


CROWDED = b'{"model":"m","messages":[{"role":"user","content":"%s"}],"x":[%s]}'


@pytest.mark.parametrize(
    "item", [b"[]", b"{}", b"1", b"1.5", b'"ab"', b'{"role":"u"}', b'",[{"', b'"\\"",{}', b'""']
)
def test_a_crowd_of_values_is_refused_before_it_is_made(item: bytes) -> None:
    """19 MB of `[],` took a gigabyte and, in one piece, nine seconds: four of them, and a worker counted as hung."""
    raw = CROWDED % (b"x", b",".join([item] * (19_000_000 // (len(item) + 1))))
    began = time.process_time()
    with pytest.raises(RequestError, match="more than 100000 values") as refused:
        ChatRequest.parse(raw)
    assert refused.value.status == 400
    assert time.process_time() - began < 2


@pytest.mark.parametrize("text", [b",", b"[{", b'\\",', b"\\\\,{"])
def test_text_is_one_value_however_much_of_json_stands_in_it(text: bytes) -> None:
    raw = CROWDED % (text * 500_000, b"1,2")
    assert len(ChatRequest.parse(raw).raw) == len(raw)
    assert ChatRequest.parse(CROWDED % (b"x", b",".join([b"1"] * 99_000))).body["x"] == [1] * 99_000


@pytest.mark.parametrize(
    "raw", [b'""' * 3_000_000 + b"," * 100_000, b"," * 99_999 + b'"' + b'\\",' * 3_000_000]
)
def test_what_only_looks_like_texts_takes_no_longer(raw: bytes) -> None:
    began = time.process_time()
    with pytest.raises(RequestError, match="isn't valid JSON"):
        ChatRequest.parse(raw)
    assert time.process_time() - began < 2


def test_texts_of_a_request() -> None:
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    request: Json = {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "developer", "content": parts},
            {"role": "user", "content": "hello"},
        ]
    }
    assert system_text(request) == "Be brief.\none two"
    assert last_user_text(request) == "hello"
    assert system_text({"messages": [{"role": "user", "content": "x"}]}) == ""


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ({"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}, "ab"),
        ({"role": "user", "content": ""}, ""),
        ({"role": "user", "content": []}, None),
        ({"role": "user", "content": None}, None),
        ({"role": "user"}, None),
        ({"role": "user", "content": [{"type": "text", "text": 1}]}, None),
        ({"role": "user", "content": ["a"]}, None),
        ({"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url"}]}, None),
        ({"role": "assistant", "content": "a"}, None),
        ({"role": "tool", "content": "a"}, None),
    ],
)
def test_only_plain_text_of_the_user_counts(message: Json, text: str | None) -> None:
    assert last_user_text({"messages": [{"role": "user", "content": "first"}, message]}) == text


# -- an answer, whole and in chunks

words = st.text("ab é🙂\n,.", max_size=40)
tokens = st.lists(st.text("ab é🙂", min_size=1, max_size=5), min_size=1, max_size=5)


def logprob(token: str) -> Json:
    return {"token": token, "logprob": -0.5, "bytes": list(token.encode()), "top_logprobs": []}


@st.composite
def messages(draw: st.DrawFn) -> tuple[Json, Json]:
    """A message and the logprobs field of its choice."""
    message: Json = {"role": "assistant"}
    more: Json = {}
    kind = draw(st.sampled_from(["text", "tokens", "odd tokens", "refusal", "tools", "function", "none"]))
    message["content"] = draw(words) if kind == "text" else None
    if draw(st.booleans()):
        message["refusal"] = None
    if draw(st.booleans()):
        more["logprobs"] = None
    if kind in ("tokens", "odd tokens"):
        spelled = draw(tokens)
        message["content"] = "".join(spelled) + ("!" if kind == "odd tokens" else "")
        refusal = draw(st.sampled_from([None, [logprob("x")]]))
        more["logprobs"] = {"content": [logprob(token) for token in spelled], "refusal": refusal}
    if kind == "refusal":
        message["refusal"] = draw(words)
        more["logprobs"] = {"content": None, "refusal": [logprob("no")]}
    if kind == "tools":
        message["content"] = draw(st.none() | words)
        message["tool_calls"] = [
            {"id": f"call_{number}", "type": "function", "function": {"name": "f", "arguments": arguments}}
            for number, arguments in enumerate(draw(st.lists(words, max_size=3)))
        ]
    if kind == "function":
        message["function_call"] = {"name": "f", "arguments": draw(words)}
    if draw(st.booleans()):
        message |= {"reasoning_content": draw(words), "annotations": [{"type": "url_citation", "n": 1}]}
    return message, more


@st.composite
def completions(draw: st.DrawFn) -> Json:
    choices = []
    for index in range(draw(st.integers(1, 3))):
        message, more = draw(messages())
        finish = draw(st.sampled_from(["stop", "length", "tool_calls", "content_filter"]))
        choices.append({"index": index, "message": message, "finish_reason": finish, **more})
    usage = draw(st.none() | st.just({"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}))
    return completion(
        id="chatcmpl-1", created=7, model="m", choices=choices, usage=usage, system_fingerprint="fp_1"
    )


def assembled(parts: list[Json]) -> Assembler:
    whole = Assembler()
    for part in parts:
        whole.add(orjson.loads(orjson.dumps(part)))
    return whole


@given(completions(), st.booleans())
def test_chunks_put_together_are_the_answer(answer: Json, include_usage: bool) -> None:
    parts = list(chunks(answer, include_usage=include_usage))
    whole = assembled(parts)
    assert whole.choices == answer["choices"]
    assert whole.usage == (answer.get("usage") if include_usage else None)
    assert (whole.id, whole.created, whole.model) == ("chatcmpl-1", 7, "m")
    assert whole.system_fingerprint == "fp_1"
    assert whole.finished
    told = {key: value for key, value in answer.items() if key != "usage" or include_usage}
    assert whole.completion(id="unused", created=0) == told
    assert {(p["id"], p["created"], p["model"], p["object"]) for p in parts} == {
        ("chatcmpl-1", 7, "m", "chat.completion.chunk")
    }


def choice(message: Json, **more: Any) -> Json:
    return {"index": 0, "message": {"role": "assistant", **message}, "finish_reason": "stop", **more}


def parts_of(answer: Json) -> list[Json]:
    whole = completion(id="c", created=1, model="m", choices=[answer], usage={"prompt_tokens": 1})
    return list(chunks(whole, include_usage=True))


def test_a_stream_looks_like_openais() -> None:
    parts = parts_of(choice({"content": "See you  soon."}))
    deltas = [part["choices"][0]["delta"] for part in parts[:-1]]
    assert deltas == [
        {"role": "assistant", "content": ""},
        {"content": "See"},
        {"content": " you"},
        {"content": "  soon."},
        {},
    ]
    assert [part["choices"][0]["finish_reason"] for part in parts[:-1]] == [None] * 4 + ["stop"]
    assert (parts[-1]["choices"], parts[-1]["usage"]) == ([], {"prompt_tokens": 1})
    assert all(part["usage"] is None for part in parts[:-1])


def test_usage_is_not_in_chunks_unless_asked_for() -> None:
    answer = completion(id="c", created=1, model="m", choices=[choice({"content": "a"})], usage={"x": 1})
    assert all("usage" not in part for part in chunks(answer, include_usage=False))


def test_a_tool_call_names_itself_once() -> None:
    calls = [
        {"id": f"call_{n}", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}}
        for n in range(2)
    ]
    parts = parts_of(choice({"content": None, "tool_calls": calls}))
    deltas = [part["choices"][0]["delta"] for part in parts[:-2]]
    assert deltas[0] == {"role": "assistant", "content": None}
    assert [delta["tool_calls"][0]["index"] for delta in deltas[1:]] == [0, 0, 1, 1]
    assert [delta["tool_calls"][0].get("id") for delta in deltas[1:]] == ["call_0", None, "call_1", None]
    assert deltas[2] == {"tool_calls": [{"index": 0, "function": {"arguments": '{"a":1}'}}]}


def test_each_token_travels_with_its_logprob() -> None:
    entries = [logprob("He"), logprob("llo")]
    parts = parts_of(choice({"content": "Hello"}, logprobs={"content": entries, "refusal": None}))
    carried = [part["choices"][0] for part in parts[1:3]]
    assert [(c["delta"]["content"], c["logprobs"]["content"]) for c in carried] == [
        ("He", [entries[0]]),
        ("llo", [entries[1]]),
    ]


# -- streams of other people


def delta(content: Json, **more: Any) -> Json:
    return {"choices": [{"index": 0, "delta": content, "finish_reason": None, **more}]}


def test_tool_calls_without_index_and_with_repeated_names() -> None:
    whole = assembled(
        [
            delta({"tool_calls": [{"id": "a", "function": {"name": "f", "arguments": "{"}}]}),
            delta({"tool_calls": [{"function": {"name": "f", "arguments": "}"}}]}),
            delta(
                {"tool_calls": [{"id": "b", "type": "function", "function": {"name": "g", "arguments": ""}}]}
            ),
        ]
    )
    assert whole.choices[0]["message"]["tool_calls"] == [
        {"id": "a", "function": {"name": "f", "arguments": "{}"}},
        {"id": "b", "type": "function", "function": {"name": "g", "arguments": ""}},
    ]


def test_interleaved_choices_and_usage_beside_a_choice() -> None:
    whole = assembled(
        [
            {"choices": [{"index": 1, "delta": {"role": "assistant", "content": "b"}}]},
            {"choices": [{"index": 0, "delta": {"role": "assistant", "content": "a"}}]},
            {
                "choices": [{"index": 1, "delta": {"content": "B"}, "finish_reason": "stop"}],
                "usage": {"x": 1},
            },
            {"choices": [], "usage": None},
        ]
    )
    assert [c["message"]["content"] for c in whole.choices] == ["a", "bB"]
    assert whole.usage == {"x": 1}
    assert not whole.finished


@pytest.mark.parametrize(
    "junk",
    [
        {},
        {"choices": None},
        {"choices": "x"},
        {"choices": ["x", None]},
        {"choices": [{"index": "0", "delta": None}]},
        {"choices": [{"delta": {"tool_calls": ["x"]}}]},
        {"choices": [{"delta": {"tool_calls": None}}]},
        {"choices": [{"logprobs": "x"}]},
        {"usage": "x", "model": 1, "id": 2, "created": "now"},
    ],
)
def test_junk_between_chunks_does_no_harm(junk: Json) -> None:
    whole = assembled([delta({"content": "a"}), junk, delta({"content": "b"})])
    assert whole.choices[0]["message"]["content"] == "ab"


def test_adding_a_chunk_leaves_it_as_it_was() -> None:
    part = delta({"tool_calls": [{"index": 0, "id": "a", "function": {"arguments": "x"}}], "list": [1]})
    before = orjson.dumps(part)
    whole = Assembler()
    whole.add(part)
    whole.add(part)
    assert orjson.dumps(part) == before
    assert whole.choices[0]["message"]["list"] == [1, 1]


def test_a_frame() -> None:
    assert sse({"a": 1}) == sse(b'{"a":1}') == b'data: {"a":1}\n\n'
