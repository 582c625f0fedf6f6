"""What a strict client may rely on in a stream, whatever the teacher behind the gateway sends."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Any

import httpx
import openai
import pytest
from openai.types.chat import ChatCompletionChunk

Start = Callable[..., Any]
Json = dict[str, Any]

HEAD: Json = {"id": "c1", "object": "chat.completion.chunk", "created": 7, "model": "m-1"}
USAGE: Json = {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7}
WITH_USAGE: Json = {"stream_options": {"include_usage": True}}


def chunk(delta: Json, finish: str | None = None, **more: Any) -> Json:
    return {**HEAD, "choices": [{"index": 0, "delta": delta, "finish_reason": finish}], **more}


ROLE = chunk({"role": "assistant", "content": ""})
HELLO = [ROLE, chunk({"content": "hel"}), chunk({"content": "lo"}), chunk({}, "stop")]
LAST = {**HEAD, "choices": [], "usage": USAGE}


def event(data: Json) -> bytes:
    return b"data: " + json.dumps(data).encode() + b"\n\n"


def sends(parts: Iterable[Json | bytes], *, done: bool = True, seen: list[Json] | None = None) -> Any:
    """A teacher that sends these events, whatever it is asked; bytes go out as they are."""
    sent = b"".join(part if isinstance(part, bytes) else event(part) for part in parts)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        raw = b""
        while (message := await receive())["type"] == "http.request":
            raw += message["body"]
            if not message["more_body"]:
                break
        if seen is not None:
            seen.append(json.loads(raw))
        headers = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": sent + (b"data: [DONE]\n\n" if done else b"")})

    return app


def asked(**more: Any) -> Json:
    return {"model": "m", "messages": [{"role": "user", "content": "hi"}], "stream": True, **more}


def raw(running: Any, **more: Any) -> str:
    answer = running.post(json=asked(**more))
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    return str(answer.text)


def frames(text: str) -> list[Json]:
    """The events of a stream, held to the form `data: {json}\\n\\n` … `data: [DONE]\\n\\n` and no other byte."""
    assert text.endswith("\n\n")
    *events, last = text.removesuffix("\n\n").split("\n\n")
    assert last == "data: [DONE]"
    for said in events:
        assert said.startswith("data: {") and "\n" not in said and "\r" not in said
    return [json.loads(said.removeprefix("data: ")) for said in events]


def through(client: openai.OpenAI, **more: Any) -> list[ChatCompletionChunk]:
    stream: Any = client.chat.completions.create(**asked(**more))
    return list(stream)


def text_of(got: list[ChatCompletionChunk]) -> str:
    return "".join(part.choices[0].delta.content or "" for part in got if part.choices)


@pytest.fixture
def running(serve: Start, gateway: Start) -> Callable[..., Any]:
    def start(*parts: Json | bytes, **options: Any) -> Any:
        return gateway(serve(sends(parts, **options)))

    return start


NOISE = b": keep-alive\n\nevent: message\nid: 7\nretry: 10\n\n"
STREAMS = {
    "plain": b"".join(event(part) for part in HELLO),
    "crlf": b"".join(event(part) for part in HELLO).replace(b"\n", b"\r\n"),
    "cr": b"".join(event(part) for part in HELLO).replace(b"\n", b"\r"),
    "bom": b"\xef\xbb\xbf" + b"".join(event(part) for part in HELLO),
    "noise": NOISE + b"".join(NOISE.strip() + b"\n" + event(part) + NOISE for part in HELLO),
    "no space": b"".join(event(part).replace(b"data: ", b"data:") for part in HELLO),
    "many lines": b"".join(
        b"".join(b"data: " + line + b"\n" for line in json.dumps(part, indent=1).encode().splitlines())
        + b"\n"
        for part in HELLO
    ),
}


@pytest.mark.parametrize("name", STREAMS)
def test_frames_have_one_form(name: str, running: Start) -> None:
    started = running(STREAMS[name])
    assert frames(raw(started)) == HELLO
    with started.client() as client:
        assert text_of(through(client)) == "hello"


def test_what_is_right_passes_byte_for_byte(running: Start) -> None:
    odd = b'data: {"id":"c1", "object" : "chat.completion.chunk","created":7,"model":"m-1","choices":[],"x":1.50}\n\n'
    sent = b"".join(event(part) for part in HELLO) + odd
    assert raw(running(sent)).encode() == sent + b"data: [DONE]\n\n"


def test_every_chunk_says_the_same_of_itself(running: Start) -> None:
    azure = {"choices": [], "created": 0, "id": "", "model": "", "object": "", "prompt_filter_results": [{}]}
    verdict: Json = {"choices": [{"index": 0, "finish_reason": None, "content_filter_offsets": {}}]}
    ollama = {**HELLO[2], "id": "another", "created": 8}
    started = running(azure, *HELLO[:2], ollama, {**verdict, "created": 0, "id": ""}, HELLO[3])
    got = frames(raw(started))
    assert {(part["id"], part["object"], part["created"], part["model"]) for part in got} == {
        ("c1", "chat.completion.chunk", 7, "m-1")
    }
    assert got[0]["prompt_filter_results"] == [{}]
    assert got[4]["choices"][0]["content_filter_offsets"] == {}
    with started.client() as client:
        parsed = through(client)
        assert text_of(parsed) == "hello"
        assert all(part.choices[0].delta for part in parsed[1:])


def test_an_answer_that_names_nothing_is_named(running: Start) -> None:
    got = frames(
        raw(running({"choices": [{"delta": {"content": "a"}}]}, {"choices": [{"finish_reason": "stop"}]}))
    )
    assert got[0]["id"].startswith("chatcmpl-")
    assert {part["id"] for part in got} == {got[0]["id"]}
    assert all(part["created"] and part["model"] == "m" for part in got)
    assert [part["choices"][0]["index"] for part in got] == [0, 0]


def test_a_whole_answer_that_leaves_things_out_is_completed(serve: Start, gateway: Start) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            call = {"function": {"name": "f", "arguments": {"a": 1}}}
            body = {"created": 0, "choices": [{"message": {"content": None, "tool_calls": [call]}}]}
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": json.dumps(body).encode()})

    with gateway(serve(app)).client() as client:
        got = client.chat.completions.create(model="m", messages=[{"role": "user", "content": "hi"}])
    assert (got.model, got.object) == ("m", "chat.completion")
    assert got.id.startswith("chatcmpl-") and got.created
    (choice,) = got.choices
    assert (choice.index, choice.finish_reason, choice.message.role) == (0, "tool_calls", "assistant")
    assert choice.message.tool_calls is not None
    assert choice.message.tool_calls[0].id.startswith("call_")
    assert choice.message.tool_calls[0].type == "function"
    assert choice.message.tool_calls[0].function.arguments == '{"a":1}'


# -- finish reason


@pytest.mark.parametrize("empty", ["", None])
def test_a_finish_reason_is_never_empty_at_the_end(running: Start, empty: str | None) -> None:
    started = running(*HELLO[:3], chunk({}, empty), LAST)
    got = frames(raw(started, **WITH_USAGE))
    assert [part["choices"][0]["finish_reason"] for part in got[:-1]] == [None, None, None, None, "stop"]
    assert got[-1]["choices"] == [] and got[-1]["usage"] == USAGE, "the usage stays last"
    assert [exchange.teacher.choices[0]["finish_reason"] for exchange in started.exchanges()] == ["stop"]


def test_the_limit_that_was_reached_is_the_reason(running: Start) -> None:
    got = frames(raw(running(*HELLO[:3], LAST), max_tokens=2))
    assert got[-1]["choices"][0]["finish_reason"] == "length"


def test_a_stream_that_ends_without_reason_and_done_is_an_error(running: Start) -> None:
    started = running(*HELLO[:3], done=False)
    with started.client() as client, pytest.raises(openai.APIError, match="middle of its answer"):
        through(client)
    assert started.exchanges() == []


def test_a_stream_that_ends_with_a_reason_but_without_done_is_whole(running: Start) -> None:
    assert frames(raw(running(*HELLO, done=False))) == HELLO


# -- tool calls


def test_tool_calls_keep_their_index_and_say_their_id_once(running: Start) -> None:
    def call(index: int | None, id: str | None, arguments: str, name: str | None = "look") -> Json:
        place = {} if index is None else {"index": index}
        given = {"name": name, "arguments": arguments} if name else {"arguments": arguments}
        return chunk(
            {"role": "assistant", "tool_calls": [{**place, "id": id, "type": "function", "function": given}]}
        )

    end = chunk({}, "tool_calls")
    ways = {
        "as it should be": [call(0, "a", "", "look"), call(0, None, '{"x":1}', None), call(1, "b", "{}")],
        "id and name again": [
            call(0, "a", ""),
            call(0, "a", '{"x"'),
            call(0, "a", ":1}"),
            call(1, "b", "{}"),
        ],
        "an id each time": [call(0, "a", ""), call(0, "z", '{"x":1}', None), call(1, "b", "{}")],
        "no index": [call(None, "a", '{"x":1}'), call(None, "b", "{}")],
        "one index for both": [call(0, "a", '{"x":1}'), call(0, "b", "{}")],
    }
    for name, parts in ways.items():
        started = running(*parts, end)
        with started.client() as client:
            with client.chat.completions.stream(
                model="m", messages=[{"role": "user", "content": "hi"}]
            ) as stream:
                final = stream.get_final_completion().choices[0]
            assert final.message.role == "assistant", name
            assert final.message.tool_calls is not None
            got = [
                (made.id, made.function.name, made.function.arguments) for made in final.message.tool_calls
            ]
            assert got == [("a", "look", '{"x":1}'), ("b", "look", "{}")], name
            deltas = [delta for part in through(client) for delta in part.choices[0].delta.tool_calls or []]
        assert sorted({delta.index for delta in deltas}) == [0, 1]
        assert [delta.id for delta in deltas if delta.id] == ["a", "b"], name


# -- usage


USAGES: dict[str, list[Json]] = {
    "in a chunk of its own": [*HELLO, LAST],
    "in the last chunk with choices": [*HELLO[:3], chunk({}, "stop", usage=USAGE)],
    "in both": [*HELLO[:3], chunk({}, "stop", usage=USAGE), LAST],
    "in every chunk": [*({**part, "usage": {**USAGE, "completion_tokens": 1}} for part in HELLO), LAST],
    "before the end": [*HELLO[:2], LAST, *HELLO[2:]],
}


@pytest.mark.parametrize("name", USAGES)
def test_usage_is_for_those_who_ask_and_comes_once_and_last(running: Start, name: str) -> None:
    seen: list[Json] = []
    started = running(*USAGES[name], seen=seen)
    plain = frames(raw(started))
    assert all(part["choices"] and not part.get("usage") for part in plain)
    for_them = frames(raw(started, **WITH_USAGE))
    assert for_them[-1] == LAST
    assert for_them[:-1] == plain
    with started.client() as client:
        assert [part.usage is not None for part in through(client, **WITH_USAGE)] == [*[False] * 4, True]
        assert text_of(through(client)) == "hello"
    assert all(body["stream_options"]["include_usage"] is True for body in seen)
    assert all(exchange.teacher.usage == USAGE for exchange in started.exchanges())


def test_no_usage_is_made_up(running: Start) -> None:
    assert frames(raw(running(*HELLO), **WITH_USAGE)) == HELLO


def test_other_stream_options_reach_the_teacher_and_keep_their_effect(running: Start) -> None:
    seen: list[Json] = []
    continuous = [{**part, "usage": {**USAGE, "completion_tokens": at}} for at, part in enumerate(HELLO)]
    started = running(*continuous, LAST, seen=seen)
    options = {"include_usage": True, "continuous_usage_stats": True, "include_obfuscation": False}
    assert frames(raw(started, stream_options=options)) == [*continuous, LAST]
    assert seen[-1]["stream_options"] == options
    # Without include_usage a server sends none at all: what came is there because the gateway asked.
    assert frames(raw(started, stream_options={"continuous_usage_stats": True})) == [
        {**part, "usage": None} for part in HELLO
    ]


# -- failures


def test_an_early_failure_keeps_its_status(running: Start) -> None:
    limited = {"error": {"message": "slow down", "type": "rate_limit_error", "param": None, "code": "x"}}
    for parts in (
        [limited],
        [ROLE, limited],
        [b": ping\n\n", ROLE, ROLE, b"event: error\n" + event(limited)],
    ):
        started = running(*parts)
        with started.client() as client, pytest.raises(openai.RateLimitError) as caught:
            through(client)
        assert caught.value.code == "x"
        assert caught.value.body == limited["error"]
    for parts in ([], [ROLE], [ROLE, LAST]):
        with running(*parts).client() as client, pytest.raises(openai.APIStatusError) as broken:
            through(client)
        assert broken.value.status_code == 502


def test_a_break_in_the_middle_is_an_error_and_never_a_quiet_end(running: Start) -> None:
    failures: list[list[Json | bytes]] = [
        [{"error": {"message": "overloaded", "code": 503}}],
        [b'event: error\ndata: {"error":\ndata: {"message": "overloaded"}}\n\n'],
        [
            {
                **HEAD,
                "choices": [
                    {"index": 0, "delta": {}, "finish_reason": "error", "error": {"message": "overloaded"}}
                ],
            }
        ],
        [{"object": "error", "message": "overloaded", "code": 500}],
        [{"error": "overloaded"}],
    ]
    for parts in failures:
        started = running(*HELLO[:3], *parts)
        text = ""
        with started.client() as client, pytest.raises(openai.APIError, match="overloaded"):
            for part in client.chat.completions.create(**asked()):
                text += part.choices[0].delta.content or ""
        assert text == "hello"
        *_, last = raw(started).removesuffix("\n\n").split("\n\n")
        assert json.loads(last.removeprefix("data: "))["error"]["message"] == "overloaded"
        assert started.exchanges() == []
    for garbage in (b"data: {not json\n\n", b"data: [1]\n\n", b"data: null\n\n"):
        with running(*HELLO[:3], garbage).client() as client, pytest.raises(openai.APIError, match="isn't"):
            through(client)


def test_a_connection_that_breaks_is_an_error_too(serve: Start, gateway: Start) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            body = b"".join(event(part) for part in HELLO)
            await send({"type": "http.response.body", "body": body[:-20], "more_body": True})

    running = gateway(serve(app))
    with running.client() as client, pytest.raises(openai.APIError, match="connection to the teacher ended"):
        through(client)
    with httpx.stream("POST", f"{running.url}/v1/chat/completions", json=asked(), verify=False) as answer:
        assert "[DONE]" not in answer.read().decode()
