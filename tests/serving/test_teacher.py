from __future__ import annotations

import asyncio
import logging
import socket
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import orjson
import pytest
from pydantic import SecretStr

from serving.chat import chunks, sse
from serving.errors import (
    ConfigError,
    RequestError,
    UpstreamBroken,
    UpstreamError,
    UpstreamRefused,
    UpstreamTimeout,
)
from serving.exchange import Json
from serving.pricing import PriceList
from serving.teacher import Chunk, StreamFailed, Teacher
from serving.teacher_settings import Price, TeacherSettings
from serving.upstream import Upstream

ASKED: Json = {
    "model": "gpt-4o",
    "messages": [{"role": "user", "content": "hello"}],
    "x_own": {"a": [1.0]},
}
ANSWER: Json = {
    "id": "chatcmpl-1",
    "object": "chat.completion",
    "created": 1,
    "model": "gpt-4o-2024-08-06",
    "system_fingerprint": "fp_7",
    "choices": [
        {"index": 0, "message": {"role": "assistant", "content": "hi there"}, "finish_reason": "stop"}
    ],
    "usage": {"prompt_tokens": 1000, "completion_tokens": 100},
}
STREAM = [sse(chunk) for chunk in chunks(ANSWER, include_usage=True)]
DONE = sse(b"[DONE]")


@dataclass
class Request:
    method: str
    target: str
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Json:
        return dict(orjson.loads(self.body))


@dataclass
class Scripted:
    """A raw upstream that answers each request by the next step of its script; the last one is repeated."""

    url: str = ""
    connections: int = 0
    requests: list[Request] = field(default_factory=list)
    arrived: list[float] = field(default_factory=list)
    asked: asyncio.Event = field(default_factory=asyncio.Event)
    hung_up: asyncio.Event = field(default_factory=asyncio.Event)


Step = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class HangUp(Exception):
    """A step ends its connection."""


@asynccontextmanager
async def scripted(*script: Step) -> AsyncIterator[Scripted]:
    state = Scripted()
    tasks: set[asyncio.Task[None]] = set()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        state.connections += 1
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
                method, target, _ = head[0].split(" ")
                headers = {k.lower(): v for k, v in (line.split(": ", 1) for line in head[1:-2])}
                body = await reader.readexactly(int(headers.get("content-length", "0")))
                state.requests.append(Request(method, target, headers, body))
                state.arrived.append(time.monotonic())
                state.asked.set()
                step = script[min(len(state.requests), len(script)) - 1]
                await step(reader, writer)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            state.hung_up.set()
        except HangUp:
            pass
        finally:
            writer.close()

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(connected(reader, writer))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    listening = await asyncio.start_server(accept, "127.0.0.1", 0)
    state.url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}/v1"
    try:
        yield state
    finally:
        listening.close()
        for task in list(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def says(status: int, body: bytes | Json, **headers: str) -> Step:
    sent = body if isinstance(body, bytes) else orjson.dumps(body)
    own = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
    kind = "" if "content_type" in headers else "Content-Type: application/json\r\n"

    async def step(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(f"HTTP/1.1 {status} X\r\n{kind}{own}Content-Length: {len(sent)}\r\n\r\n".encode() + sent)

    return step


def streams(*pieces: bytes | float, end: bool = True) -> Step:
    """Send pieces as chunks of a body, sleep for numbers."""

    async def step(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n")
        writer.write(b"x-ratelimit-remaining-requests: 9\r\ntransfer-encoding: chunked\r\n\r\n")
        for piece in pieces:
            if isinstance(piece, bytes):
                writer.write(b"%x\r\n%s\r\n" % (len(piece), piece))
            else:
                await asyncio.sleep(piece)
        if not end:
            raise HangUp
        writer.write(b"0\r\n\r\n")

    return step


def hangs_up(*sent: bytes) -> Step:
    async def step(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.writelines(sent)
        raise HangUp

    return step


async def stalls(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
    await reader.readexactly(1)


ANSWERS = says(200, ANSWER, x_request_id="req_theirs", openai_version="2020-10-01", set_cookie="a=b")
UNAVAILABLE = says(503, {"error": {"message": "overloaded"}}, retry_after_ms="1")


@asynccontextmanager
async def teacher_of(
    upstream: Scripted, key: str | None = "sk-teacher", price: Price | None = None, **settings: Any
) -> AsyncIterator[Teacher]:
    chosen = TeacherSettings(base_url=upstream.url, **{"timeout_s": 10, **settings})
    connections = Upstream(upstream.url, timeout_s=chosen.timeout_s)
    try:
        yield Teacher(chosen, connections, None if key is None else SecretStr(key), PriceList(price))
    finally:
        await connections.aclose()


async def complete(teacher: Teacher, request: Json = ASKED, **more: Any) -> Any:
    return await teacher.complete(
        request, **{"authorization": "Bearer sk-client", "request_id": "req_1", **more}
    )


async def streamed(teacher: Teacher, request: Json = ASKED) -> tuple[list[Chunk], Any]:
    async with teacher.stream(request, authorization=None, request_id="req_1") as stream:
        got = [chunk async for chunk in stream]
        return got, stream.answer()


def run(scenario: Coroutine[Any, Any, None]) -> None:
    asyncio.run(scenario)


# -- whole answers


def test_a_whole_answer() -> None:
    async def scenario() -> None:
        async with scripted(ANSWERS) as upstream, teacher_of(upstream, trainable=True) as teacher:
            reply = await complete(teacher)
        assert (reply.body, orjson.loads(reply.raw)) == (ANSWER, ANSWER)
        assert reply.headers == [("openai-version", "2020-10-01")]
        answer = reply.answer
        assert (answer.model, answer.choices, answer.usage) == (
            "gpt-4o-2024-08-06",
            ANSWER["choices"],
            ANSWER["usage"],
        )
        assert answer.cost_usd == pytest.approx(0.0035)
        assert answer.price_version is not None and answer.price_version.startswith("genai-prices ")
        assert (answer.system_fingerprint, answer.trainable) == ("fp_7", True)
        assert 0 < answer.latency_s < 5

    run(scenario())


def test_the_request_goes_on_untouched() -> None:
    async def scenario() -> None:
        async with scripted(ANSWERS) as upstream, teacher_of(upstream) as teacher:
            sent = [
                ("openai-organization", "org"),
                ("traceparent", "00-1-2-01"),
                ("user-agent", "OpenAI/Python 3"),
                ("cookie", "a=b"),
                ("x-understudy-task", "t"),
                ("x-stainless-lang", "python"),
                ("authorization", "Bearer sk-other"),
            ]
            await complete(teacher, headers=sent)
        (got,) = upstream.requests
        assert (got.method, got.target, got.json) == ("POST", "/v1/chat/completions", ASKED)
        del got.headers["host"], got.headers["content-length"], got.headers["accept"]
        assert got.headers == {
            "content-type": "application/json",
            "accept-encoding": "identity",
            "x-request-id": "req_1",
            "authorization": "Bearer sk-teacher",
            "openai-organization": "org",
            "traceparent": "00-1-2-01",
            "user-agent": "OpenAI/Python 3",
        }

    run(scenario())


@pytest.mark.parametrize(
    ("key", "client", "sent"),
    [
        ("sk-teacher", "Bearer sk-client", "Bearer sk-teacher"),
        ("  sk-teacher\n", None, "Bearer sk-teacher"),
        (None, "Bearer sk-client", "Bearer sk-client"),
        (None, None, None),
    ],
)
def test_whose_key_is_used(key: str | None, client: str | None, sent: str | None) -> None:
    async def scenario() -> None:
        async with scripted(ANSWERS) as upstream, teacher_of(upstream, key) as teacher:
            await complete(teacher, authorization=client)
            async with await teacher.forward(
                "GET", "/v1/models", [("authorization", "Bearer x")], b"", authorization=client
            ) as response:
                await response.read()
        assert [request.headers.get("authorization") for request in upstream.requests] == [sent, sent]

    run(scenario())


def test_the_configured_model_and_price_win() -> None:
    async def scenario() -> None:
        async with (
            scripted(says(200, {**ANSWER, "model": "served-name"})) as upstream,
            teacher_of(upstream, model="big", price=Price(input=1, output=10)) as teacher,
        ):
            reply = await complete(teacher)
        assert upstream.requests[0].json == {**ASKED, "model": "big"}
        assert (reply.answer.cost_usd, reply.answer.price_version) == (pytest.approx(0.002), "config")
        assert reply.answer.model == "served-name"

    run(scenario())


def test_the_price_of_the_model_asked_for_stands_in_for_an_unknown_name() -> None:
    async def scenario() -> None:
        async with scripted(says(200, {**ANSWER, "model": "?"})) as upstream, teacher_of(upstream) as teacher:
            assert (await complete(teacher)).answer.cost_usd == pytest.approx(0.0035)

    run(scenario())


def test_a_streamed_request_can_be_asked_whole() -> None:
    async def scenario() -> None:
        async with scripted(ANSWERS) as upstream, teacher_of(upstream) as teacher:
            await complete(teacher, {**ASKED, "stream": True, "stream_options": {"include_usage": True}})
        assert upstream.requests[0].json == ASKED

    run(scenario())


@pytest.mark.parametrize("usage", [None, "many", []])
def test_an_answer_without_usage(usage: object) -> None:
    async def scenario() -> None:
        async with (
            scripted(says(200, {**ANSWER, "usage": usage})) as upstream,
            teacher_of(upstream) as teacher,
        ):
            answer = (await complete(teacher)).answer
        assert (answer.usage, answer.cost_usd) == (None, None)

    run(scenario())


# -- refusals, retries, deadline


def test_a_refusal_keeps_status_headers_and_body() -> None:
    body = b'{"error": {"message": "bad", "param": "n"}}'

    async def scenario() -> None:
        async with (
            scripted(
                says(400, body, x_ratelimit_limit_requests="3", Connection="x-hop", x_hop="1")
            ) as upstream,
            teacher_of(upstream) as teacher,
        ):
            for ask in (complete, streamed):
                with pytest.raises(UpstreamRefused) as caught:
                    await ask(teacher)
                assert (caught.value.status, caught.value.body) == (400, body)
                assert caught.value.headers == {
                    "content-type": "application/json",
                    "x-ratelimit-limit-requests": "3",
                }
            assert len(upstream.requests) == 2

    run(scenario())


@pytest.mark.parametrize(
    "first",
    [
        UNAVAILABLE,
        says(429, b"", retry_after="0"),
        says(400, b"", x_should_retry="true", retry_after_ms="1"),
        hangs_up(),
        hangs_up(b"HTTP/1.1 200 OK\r\nContent-Le"),
    ],
)
@pytest.mark.parametrize("way", [complete, streamed])
def test_a_failure_before_the_first_byte_is_repeated(first: Step, way: Any) -> None:
    async def scenario() -> None:
        second = ANSWERS if way is complete else streams(*STREAM, DONE)
        async with scripted(first, second) as upstream, teacher_of(upstream) as teacher:
            await way(teacher)
        assert len(upstream.requests) == 2
        assert upstream.requests[0] == upstream.requests[1]

    run(scenario())


def test_what_the_client_has_not_seen_can_be_repeated_too() -> None:
    cut = hangs_up(b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n{")
    failure = sse({"error": {"message": "busy", "code": 503}})
    early = [
        streams(failure),
        streams(STREAM[0], failure),
        streams(STREAM[0]),
        streams(STREAM[0], end=False),
        streams(STREAM[0], DONE),
        streams(STREAM[0], STREAM[-1], DONE),
    ]

    async def scenario() -> None:
        async with scripted(cut, ANSWERS) as upstream, teacher_of(upstream) as teacher:
            await complete(teacher)
            assert len(upstream.requests) == 2
        for first in early:
            async with scripted(first, streams(*STREAM, DONE)) as upstream, teacher_of(upstream) as teacher:
                got, _ = await streamed(teacher)
                assert len(upstream.requests) == 2
                assert b"".join(sse(chunk.raw) for chunk in got) == b"".join(STREAM)

    run(scenario())


@pytest.mark.parametrize(
    ("first", "settings"),
    [
        (says(401, b""), {}),
        (says(500, b"", x_should_retry="false"), {}),
        (says(429, b"", retry_after="60"), {}),
        (says(500, b""), {"max_retries": 0}),
        (says(302, b"", location="/elsewhere"), {}),
    ],
)
def test_given_up_at_once(first: Step, settings: Json) -> None:
    async def scenario() -> None:
        async with scripted(first, ANSWERS) as upstream, teacher_of(upstream, **settings) as teacher:
            began = time.monotonic()
            with pytest.raises(UpstreamRefused):
                await complete(teacher)
            assert time.monotonic() - began < 1
            assert len(upstream.requests) == 1

    run(scenario())


def test_retries_come_to_an_end() -> None:
    async def scenario() -> None:
        async with scripted(UNAVAILABLE) as upstream, teacher_of(upstream, max_retries=3) as teacher:
            with pytest.raises(UpstreamRefused) as caught:
                await complete(teacher)
            assert (caught.value.status, len(upstream.requests)) == (503, 4)

    run(scenario())


def test_retry_after_is_waited_for() -> None:
    async def scenario() -> None:
        busy = says(429, b"", retry_after_ms="300")
        async with scripted(busy, ANSWERS) as upstream, teacher_of(upstream) as teacher:
            await complete(teacher)
            first, second = upstream.arrived
            assert 0.29 < second - first < 2

    run(scenario())


def test_a_stale_connection_is_nobodys_failure() -> None:
    async def scenario() -> None:
        for way, step in ((complete, ANSWERS), (streamed, streams(*STREAM, DONE))):
            async with (
                scripted(step, hangs_up(), step) as upstream,
                teacher_of(upstream, max_retries=0) as teacher,
            ):
                await way(teacher)
                await way(teacher)
                assert (len(upstream.requests), upstream.connections) == (3, 2)

    run(scenario())


def test_nobody_there() -> None:
    async def scenario() -> None:
        async with scripted(ANSWERS) as upstream:
            pass
        async with teacher_of(upstream, max_retries=1) as teacher:
            for way in (complete, streamed):
                with pytest.raises(UpstreamBroken, match="can't be reached"):
                    await way(teacher)

    run(scenario())


@pytest.mark.parametrize("way", [complete, streamed])
@pytest.mark.parametrize(
    "script",
    [
        [stalls],
        [says(503, b"", retry_after_ms="100"), stalls],
        [hangs_up(), stalls],
        [streams(*(b": ping\n\n", 0.1) * 4, 5.0)],
    ],
)
def test_the_deadline_spans_all_attempts(script: list[Step], way: Any) -> None:
    async def scenario() -> None:
        async with scripted(*script) as upstream, teacher_of(upstream, timeout_s=0.3) as teacher:
            began = time.monotonic()
            with pytest.raises((UpstreamTimeout, UpstreamBroken)) as caught:
                await way(teacher)
            assert time.monotonic() - began < 1.0
            if script[0] is stalls:
                assert caught.type is UpstreamTimeout
                assert time.monotonic() - began > 0.25
                await asyncio.wait_for(upstream.hung_up.wait(), 2)

    run(scenario())


@pytest.mark.parametrize("way", [complete, streamed])
def test_cancelling_hangs_up_at_once(way: Any) -> None:
    async def scenario() -> None:
        async with scripted(stalls) as upstream, teacher_of(upstream) as teacher:
            task = asyncio.create_task(way(teacher))
            await asyncio.wait_for(upstream.asked.wait(), 5)
            began = time.monotonic()
            task.cancel()
            await asyncio.wait([task])
            await asyncio.wait_for(upstream.hung_up.wait(), 5)
            assert task.cancelled()
            assert time.monotonic() - began < 0.5
            assert len(upstream.requests) == 1

    run(scenario())


@pytest.mark.parametrize(
    ("step", "error"),
    [
        (says(200, b"<html>hello</html>"), UpstreamBroken),
        (says(200, b"[]"), UpstreamBroken),
        (says(200, {"choices": []}), UpstreamBroken),
        (says(200, {"choices": ["x"]}), UpstreamBroken),
        (says(200, {"object": "list", "data": []}), UpstreamBroken),
        (says(200, b""), UpstreamBroken),
        (says(200, {"error": {"message": "no", "code": "x"}}), UpstreamRefused),
        (says(200, {"error": "no"}), UpstreamRefused),
    ],
)
def test_a_good_status_with_a_bad_answer(step: Step, error: type[UpstreamError]) -> None:
    async def scenario() -> None:
        async with scripted(step) as upstream, teacher_of(upstream, max_retries=0) as teacher:
            for way in (complete, streamed):
                with pytest.raises(error) as caught:
                    await way(teacher)
                if isinstance(caught.value, UpstreamRefused):
                    assert caught.value.status == 502
                    assert "error" in orjson.loads(caught.value.body)

    run(scenario())


def test_an_error_with_a_good_status_keeps_its_own() -> None:
    async def scenario() -> None:
        for said, status in (
            ({"code": 402}, 402),
            ({"status": 402}, 402),
            ({"code": "402"}, 402),
            ({"type": "invalid_request_error", "code": "context_length_exceeded"}, 400),
            ({"type": "authentication_error"}, 401),
        ):
            body = {"error": {"message": "no", **said}}
            for step, way in ((says(200, body), complete), (streams(sse(body)), streamed)):
                async with scripted(step) as upstream, teacher_of(upstream) as teacher:
                    with pytest.raises(UpstreamRefused) as caught:
                        await way(teacher)
                    assert caught.value.status == status
                    assert orjson.loads(caught.value.body) == body
                    assert caught.value.headers["content-type"] == "application/json"

    run(scenario())


# -- streams


def test_a_stream() -> None:
    async def scenario() -> None:
        async with scripted(streams(*STREAM, DONE)) as upstream, teacher_of(upstream) as teacher:
            asked = {**ASKED, "stream": True, "stream_options": {"include_usage": False, "x": 1}}
            async with teacher.stream(asked, authorization=None, request_id="r") as stream:
                assert stream.headers == [("x-ratelimit-remaining-requests", "9")]
                got = [chunk async for chunk in stream]
                answer = stream.answer()
            assert b"".join(sse(chunk.raw) for chunk in got) == b"".join(STREAM)
            assert [chunk.data for chunk in got] == list(chunks(ANSWER, include_usage=True))
            assert [chunk.usage_only for chunk in got] == [False] * (len(got) - 1) + [True]
            assert (answer.choices, answer.usage) == (ANSWER["choices"], ANSWER["usage"])
            assert (answer.model, answer.system_fingerprint) == ("gpt-4o-2024-08-06", "fp_7")
            assert answer.cost_usd == pytest.approx(0.0035)
            assert upstream.requests[0].json == {
                **ASKED,
                "stream": True,
                "stream_options": {"include_usage": True, "x": 1},
            }
            await streamed(teacher)
            assert upstream.connections == 1

    run(scenario())


def test_a_stream_cut_anywhere() -> None:
    whole = b"".join([*STREAM, DONE]).replace(b"hi", "hé🙂".encode()).replace(b"\n", b"\r\n")
    pieces = [whole[i : i + 7] for i in range(0, len(whole), 7)]

    async def scenario() -> None:
        async with scripted(streams(b": ping\r\n\r\n", *pieces)) as upstream, teacher_of(upstream) as teacher:
            _, answer = await streamed(teacher)
            assert answer.choices[0]["message"]["content"] == "hé🙂 there"

    run(scenario())


@pytest.mark.parametrize("end", [STREAM[-1], DONE, STREAM[-1].rstrip(b"\n")])
def test_a_good_end(end: bytes) -> None:
    async def scenario() -> None:
        async with scripted(streams(*STREAM[:-1], end)) as upstream, teacher_of(upstream) as teacher:
            _, answer = await streamed(teacher)
            assert answer.choices == ANSWER["choices"]

    run(scenario())


@pytest.mark.parametrize(
    "step",
    [
        streams(*STREAM[:2]),
        streams(*STREAM[:2], end=False),
        streams(*STREAM[:2], STREAM[2][:-20]),
        streams(*STREAM[:2], b"data: not json\n\n"),
        streams(*STREAM[:2], b"data: [1]\n\n"),
    ],
)
def test_a_broken_end_is_said(step: Step) -> None:
    async def scenario() -> None:
        async with scripted(step) as upstream, teacher_of(upstream) as teacher:
            async with teacher.stream(ASKED, authorization=None, request_id="r") as stream:
                assert [await anext(stream), await anext(stream)]
                with pytest.raises(UpstreamBroken):
                    await anext(stream)
                with pytest.raises(UpstreamBroken, match="wasn't read to its end"):
                    stream.answer()
            assert len(upstream.requests) == 1

    run(scenario())


CRASHED: Json = {"message": "the model crashed", "code": 500}


@pytest.mark.parametrize(
    "event",
    [
        sse({"error": CRASHED}),
        b'event: error\ndata: {"error":\ndata: {"message": "the model crashed",\ndata: "code": 500}}\n\n',
        sse({"object": "error", **CRASHED}),
        sse({"id": "1", "error": CRASHED, "choices": [{"index": 0, "delta": {}, "finish_reason": "error"}]}),
        sse({"choices": [{"index": 0, "delta": {}, "finish_reason": "error", "error": CRASHED}]}),
    ],
)
def test_an_error_in_the_middle_brings_its_body(event: bytes) -> None:
    async def scenario() -> None:
        async with (
            scripted(streams(*STREAM[:2], event, 5.0)) as upstream,
            teacher_of(upstream) as teacher,
        ):
            async with teacher.stream(ASKED, authorization=None, request_id="r") as stream:
                with pytest.raises(StreamFailed) as caught:
                    async for _ in stream:
                        pass
            assert orjson.loads(caught.value.body) == {"error": CRASHED}
            assert b"\n" not in caught.value.body
            assert len(upstream.requests) == 1

    run(scenario())


@pytest.mark.parametrize("step", [streams(DONE), streams(), streams(b": ping\n\n")])
def test_a_stream_without_an_answer(step: Step) -> None:
    async def scenario() -> None:
        async with scripted(step) as upstream, teacher_of(upstream, max_retries=0) as teacher:
            with pytest.raises(UpstreamBroken, match="without an answer"):
                await streamed(teacher)

    run(scenario())


def test_silence_between_chunks() -> None:
    async def scenario() -> None:
        async with (
            scripted(streams(*STREAM[:2], 5.0)) as upstream,
            teacher_of(upstream, timeout_s=0.3) as teacher,
        ):
            with pytest.raises(UpstreamTimeout, match="fell silent"):
                await streamed(teacher)

    run(scenario())


def test_a_long_stream_outlives_the_deadline() -> None:
    paced = [part for chunk in STREAM for part in (chunk, 0.15)]

    async def scenario() -> None:
        async with (
            scripted(streams(*paced, DONE)) as upstream,
            teacher_of(upstream, timeout_s=0.4) as teacher,
        ):
            began = time.monotonic()
            _, answer = await streamed(teacher)
            assert time.monotonic() - began > 0.5
            assert answer.choices == ANSWER["choices"]

    run(scenario())


def test_chunks_are_not_held_back() -> None:
    async def scenario() -> None:
        async with scripted(streams(*STREAM[:2], 5.0)) as upstream, teacher_of(upstream) as teacher:
            began = time.monotonic()
            async with teacher.stream(ASKED, authorization=None, request_id="r") as stream:
                await anext(stream), await anext(stream)
                assert time.monotonic() - began < 2

    run(scenario())


def test_leaving_early_hangs_up() -> None:
    async def leaves_first(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        sent = STREAM[0] + STREAM[1]
        writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n%x\r\n%s\r\n" % (len(sent), sent))
        await reader.readexactly(1)

    async def scenario() -> None:
        async with scripted(leaves_first) as upstream, teacher_of(upstream) as teacher:
            async with teacher.stream(ASKED, authorization=None, request_id="r") as stream:
                await anext(stream)
            began = time.monotonic()
            await asyncio.wait_for(upstream.hung_up.wait(), 5)
            assert time.monotonic() - began < 0.5

    run(scenario())


def test_an_end_that_does_not_come_is_not_waited_for() -> None:
    async def scenario() -> None:
        async with scripted(streams(*STREAM, DONE, 5.0)) as upstream, teacher_of(upstream) as teacher:
            began = time.monotonic()
            _, answer = await streamed(teacher)
            assert answer.choices == ANSWER["choices"]
            assert time.monotonic() - began < 2

    run(scenario())


def test_a_whole_answer_to_a_streamed_request_is_cut_into_chunks() -> None:
    async def scenario() -> None:
        async with scripted(ANSWERS) as upstream, teacher_of(upstream) as teacher:
            got, answer = await streamed(teacher)
            assert [chunk.data for chunk in got] == list(chunks(ANSWER, include_usage=True))
            assert got[-1].usage_only
            assert (answer.choices, answer.usage) == (ANSWER["choices"], ANSWER["usage"])

    run(scenario())


# -- everything else under /v1


def test_forwarding_changes_nothing_that_matters() -> None:
    body = bytes(range(256)) * 40

    async def pieces() -> AsyncIterator[bytes]:
        yield body[:5000]
        yield body[5000:]

    async def scenario() -> None:
        step = says(
            200, b"\x00\xffraw", content_type="audio/mpeg", Connection="x-hop", x_hop="1", set_cookie="a=1"
        )
        async with scripted(step) as upstream, teacher_of(upstream) as teacher:
            sent = [
                ("content-type", "multipart/form-data; boundary=x"),
                ("content-length", str(len(body))),
                ("connection", "keep-alive"),
                ("x-understudy-route", "teacher"),
                ("accept-encoding", "br"),
            ]
            target = "/v1/audio/a%2Fb?x=%20&y=1"
            async with await teacher.forward("PATCH", target, sent, pieces(), authorization=None) as response:
                assert await response.read() == b"\x00\xffraw"
                assert response.headers == [
                    ("content-type", "audio/mpeg"),
                    ("set-cookie", "a=1"),
                    ("content-length", "5"),
                ]
        (got,) = upstream.requests
        assert (got.method, got.target, got.body) == ("PATCH", target, body)
        assert got.headers["content-type"] == "multipart/form-data; boundary=x"
        assert got.headers["accept-encoding"] == "br"
        assert got.headers["authorization"] == "Bearer sk-teacher"
        assert "x-understudy-route" not in got.headers

    run(scenario())


def test_errors_are_forwarded_and_not_repeated() -> None:
    async def scenario() -> None:
        async with scripted(UNAVAILABLE) as upstream, teacher_of(upstream) as teacher:
            for method in ("POST", "GET"):
                async with await teacher.forward(
                    method, "/v1/files", [], b"", authorization=None
                ) as response:
                    assert response.status == 503
                    assert b"overloaded" in await response.read()
            assert len(upstream.requests) == 2

    run(scenario())


def test_only_what_may_be_repeated_is_forwarded_again() -> None:
    async def scenario() -> None:
        async with scripted(ANSWERS, hangs_up(), ANSWERS) as upstream, teacher_of(upstream) as teacher:
            for _ in range(2):
                async with await teacher.forward(
                    "GET", "/v1/models", [], b"", authorization=None
                ) as response:
                    assert response.status == 200
                    await response.read()
            assert len(upstream.requests) == 3
        async with scripted(ANSWERS, hangs_up(), ANSWERS) as upstream, teacher_of(upstream) as teacher:
            async with await teacher.forward("POST", "/v1/files", [], b"x", authorization=None) as response:
                await response.read()
            with pytest.raises(UpstreamBroken):
                await teacher.forward("POST", "/v1/files", [], b"x", authorization=None)
            assert len(upstream.requests) == 2

    run(scenario())


def test_what_was_never_sent_is_forwarded_again_whatever_it_is() -> None:
    async def scenario() -> None:
        heard: list[bytes] = []

        async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            heard.append((await reader.readuntil(b"\r\n\r\n")).partition(b"\r\n")[0])
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")
            await writer.drain()
            writer.close()

        with socket.socket() as bound:
            bound.bind(("127.0.0.1", 0))  # and doesn't listen yet: connections are refused
            url = f"http://127.0.0.1:{bound.getsockname()[1]}/v1"
            settings = TeacherSettings(base_url=url, timeout_s=10, max_retries=5)
            connections = Upstream(url, timeout_s=10)
            teacher = Teacher(settings, connections, None, PriceList(None))
            asked = asyncio.create_task(teacher.forward("POST", "/v1/files", [], b"x", authorization=None))
            await asyncio.sleep(0.05)
            assert not asked.done()
            async with await asyncio.start_server(connected, sock=bound), await asked as response:
                assert await response.read() == b"ok"
            await connections.aclose()
        assert heard == [b"POST /v1/files HTTP/1.1"]

    run(scenario())


def test_forwarding_stays_below_v1() -> None:
    async def scenario() -> None:
        async with scripted(ANSWERS) as upstream, teacher_of(upstream) as teacher:
            with pytest.raises(RequestError) as caught:
                await teacher.forward("GET", "/v1/../admin", [], b"", authorization=None)
            assert caught.value.status == 404
            assert upstream.requests == []

    run(scenario())


# -- secrets


@pytest.mark.parametrize("key", ["", " \n", "sk-sec\nret", "sk-secrét"])
def test_a_key_that_cannot_be_sent_is_refused_without_showing_it(key: str) -> None:
    upstream = Upstream("http://127.0.0.1:1/v1", timeout_s=1)
    with pytest.raises(ConfigError, match="key is empty or has characters") as caught:
        Teacher(TeacherSettings(), upstream, SecretStr(key), PriceList(None))
    assert "sk-" not in str(caught.value)


def test_keys_are_in_no_error_and_no_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    seen: list[str] = []

    async def scenario() -> None:
        failing = [says(401, b"no"), hangs_up(), says(200, b"?"), stalls]
        for step in failing:
            for key in ("sk-secret-of-ours", None):
                async with (
                    scripted(step) as upstream,
                    teacher_of(upstream, key, timeout_s=0.2, max_retries=0) as teacher,
                ):
                    seen.append(repr(teacher) + repr(vars(teacher)))
                    for client in ("Bearer sk-secret-of-theirs", "Bearer sk-secret\r\nbad"):
                        try:
                            await complete(teacher, authorization=client)
                        except (UpstreamError, RequestError) as error:
                            seen.append("".join(traceback.format_exception(error)) + repr(vars(error)))

    asyncio.run(scenario())
    assert len(seen) >= 16
    assert "sk-secret" not in "".join(seen) + caplog.text
