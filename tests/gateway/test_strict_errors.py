"""Every error as OpenAI's own clients know it: status, envelope, and whether to try again."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable
from contextlib import closing
from typing import Any

import httpx
import openai
import pytest

Start = Callable[..., Any]
Json = dict[str, Any]

ASKED: Json = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}
DETAIL: Json = {"message": "No.", "type": "a_type", "param": "messages[0]", "code": "a_code"}


def refuses(status: int, body: bytes, *headers: tuple[str, str], seen: list[float] | None = None) -> Any:
    """A teacher that answers everything like this, and notes when it was asked."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        if seen is not None:
            seen.append(time.monotonic())
        raw = [(name.encode(), value.encode()) for name, value in headers]
        if not any(name == "content-type" for name, _ in headers):
            raw.append((b"content-type", b"application/json"))
        await send({"type": "http.response.start", "status": status, "headers": raw})
        await send({"type": "http.response.body", "body": body})

    return app


def create(client: openai.OpenAI, **more: Any) -> Any:
    got: Any = client.chat.completions.create(**{**ASKED, **more})
    return list(got) if more.get("stream") else got


def caught(running: Any, kind: type[openai.APIStatusError], *, retries: int = 0, **more: Any) -> Any:
    with running.client(max_retries=retries) as client, pytest.raises(openai.APIStatusError) as error:
        create(client, **more)
    assert type(error.value) is kind
    assert set(error.value.response.json()["error"]) >= {"message", "type", "param", "code"}
    assert error.value.request_id
    return error.value


KINDS: dict[int, type[openai.APIStatusError]] = {
    400: openai.BadRequestError,
    401: openai.AuthenticationError,
    403: openai.PermissionDeniedError,
    404: openai.NotFoundError,
    409: openai.ConflictError,
    422: openai.UnprocessableEntityError,
    429: openai.RateLimitError,
    500: openai.InternalServerError,
    503: openai.InternalServerError,
}


@pytest.mark.parametrize("status", KINDS)
def test_a_refusal_of_the_teacher_goes_on_with_all_it_says(serve: Start, gateway: Start, status: int) -> None:
    told = {
        "retry-after": "7",
        "retry-after-ms": "7001",
        "x-should-retry": "false",
        "x-ratelimit-limit-requests": "100",
        "x-ratelimit-remaining-tokens": "0",
        "x-ratelimit-reset-tokens": "6m0s",
        "openai-processing-ms": "3",
    }
    hidden = {
        "set-cookie": "a=b",
        "x-understudy-route": "theirs",
        "x-request-id": "req_theirs",
        "location": "/x",
    }
    body = json.dumps({"error": DETAIL}).encode()
    running = gateway(serve(refuses(status, body, *told.items(), *hidden.items())))
    for stream in (False, True):
        error = caught(running, KINDS[status], stream=stream)
        assert error.body == DETAIL
        assert (error.param, error.code, error.type) == ("messages[0]", "a_code", "a_type")
        assert error.response.content == body
        headers = error.response.headers
        assert {name: headers.get(name) for name in told} == told
        assert headers["x-understudy-route"] == "teacher"
        assert headers["x-request-id"].startswith("req_") and headers["x-request-id"] != "req_theirs"
        assert "set-cookie" not in headers and "location" not in headers


def test_a_client_that_is_told_to_wait_waits_and_is_answered(serve: Start, gateway: Start) -> None:
    seen: list[float] = []
    busy = refuses(429, json.dumps({"error": DETAIL}).encode(), ("retry-after-ms", "150"), seen=seen)
    answer = {"id": "c", "object": "chat.completion", "created": 7, "model": "m"}
    choice = {"index": 0, "message": {"role": "assistant", "content": "hi"}, "finish_reason": "stop"}
    fine = refuses(200, json.dumps({**answer, "choices": [choice]}).encode(), seen=seen)

    async def teacher(scope: Any, receive: Any, send: Any) -> None:
        await (fine if seen else busy)(scope, receive, send)

    with gateway(serve(teacher)).client(max_retries=1) as client:
        assert create(client).choices[0].message.content == "hi"
    first, second = seen
    assert 0.15 <= second - first < 3


def test_a_client_that_is_told_not_to_try_again_does_not(serve: Start, gateway: Start) -> None:
    seen: list[float] = []
    body = json.dumps({"error": DETAIL}).encode()
    running = gateway(serve(refuses(503, body, ("x-should-retry", "false"), seen=seen)))
    caught(running, openai.InternalServerError, retries=2)
    assert len(seen) == 1


@pytest.mark.parametrize(
    ("body", "message", "more"),
    [
        (b'{"error": "model not found"}', "model not found", {}),
        (b'{"object":"error","message":"too long","type":"BadRequestError","param":"n","code":40303}', "too long",
         {"type": "BadRequestError", "param": "n", "code": 40303}),
        (b'[{"error": {"code": 400, "message": "API key not valid", "status": "INVALID_ARGUMENT"}}]',
         "API key not valid", {"code": 400}),
        (b'{"detail": "Not Found"}', "Not Found", {}),
        (b'{"detail": [{"loc": ["body"]}]}', '{"detail": [{"loc": ["body"]}]}', {}),
        (b'{"message": "no route"}', "no route", {}),
        (b'{"error": {"code": "x"}}', '{"error": {"code": "x"}}', {"code": "x"}),
        (b"<h1>Bad Request</h1>", "the teacher answered with status 400: <h1>Bad Request</h1>", {}),
        (b"", "the teacher answered with status 400", {}),
        (b"\xff\x00", "the teacher answered with status 400: �\x00", {}),
        (b"[]", "the teacher answered with status 400: []", {}),
    ],
)  # fmt: skip
def test_other_forms_of_errors_are_put_into_the_envelope(
    serve: Start, gateway: Start, body: bytes, message: str, more: Json
) -> None:
    running = gateway(serve(refuses(400, body)))
    for stream in (False, True):
        error = caught(running, openai.BadRequestError, stream=stream)
        assert error.body == {
            "message": message,
            "type": "upstream_error",
            "param": None,
            "code": None,
            **more,
        }


def test_a_redirect_is_neither_followed_nor_asked_for_again(serve: Start, gateway: Start) -> None:
    seen: list[float] = []
    running = gateway(serve(refuses(302, b"", ("location", "http://127.0.0.1:1/"), seen=seen)))
    error = caught(running, openai.NotFoundError, retries=2)
    assert error.code == "upstream_redirect"
    assert "teacher.base_url" in error.message
    assert len(seen) == 1


# -- errors of the gateway's own


def test_our_own_errors(stand_in: Start, gateway: Start) -> None:
    running = gateway(stand_in({"hello": "x"}).url, server={"api_keys": ["right"], "max_body_bytes": 2000})
    with running.client(api_key="wrong", max_retries=2) as client:
        with pytest.raises(openai.AuthenticationError) as unknown:
            create(client)
        with pytest.raises(openai.AuthenticationError):
            client.models.list()
    assert unknown.value.code == "invalid_api_key"
    with running.client(api_key="right", max_retries=2) as client:
        for wrong, param in (({"messages": []}, "messages"), ({"n": 0}, "n"), ({"model": ""}, "model")):
            with pytest.raises(openai.BadRequestError) as invalid:
                create(client, **wrong)
            assert invalid.value.param == param
            assert invalid.value.type == "invalid_request_error"
        with pytest.raises(openai.APIStatusError) as large:
            create(client, user="x" * 3000)
        assert (large.value.status_code, large.value.code) == (413, "request_too_large")
        assert create(client).choices[0].message.content == "x"
        for path in ("/../nowhere", "/%2e%2e/metrics"):
            with pytest.raises(openai.NotFoundError):
                client.get(path, cast_to=httpx.Response)
    assert running.metric("understudy_requests_total", code="413") == 1, (
        "asked once: it would be refused again"
    )
    assert running.metric("understudy_requests_total", code="400") == 3
    assert running.metric("understudy_requests_total", code="401") == 2
    for method, path, status in (("POST", "/healthz", 405), ("GET", "/v2/models", 404), ("GET", "/v1", 404)):
        error = running.request(method, path)
        assert error.status_code == status
        assert set(error.json()["error"]) == {"message", "type", "param", "code"}


def test_a_body_far_too_large_gets_its_answer_and_no_broken_connection(
    stand_in: Start, gateway: Start
) -> None:
    running = gateway(
        stand_in({"hello": "x"}).url,
        server={"max_body_bytes": 100_000, "max_upload_bytes": 100_000},
        edge=True,
    )
    with running.client(max_retries=0) as client:
        for _ in range(3):
            with pytest.raises(openai.APIStatusError) as large:
                create(client, user="x" * 20_000_000)
            assert large.value.status_code == 413
            with pytest.raises(openai.APIStatusError) as file:
                client.files.create(file=b"x" * 20_000_000, purpose="batch")
            assert file.value.status_code == 413
            assert "server.max_upload_bytes" in file.value.message


def test_a_client_that_sends_all_before_it_reads_gets_its_answer_too(stand_in: Start, gateway: Start) -> None:
    running = gateway(
        stand_in({"hello": "x"}).url,
        server={"max_body_bytes": 100_000, "max_upload_bytes": 100_000},
        edge=True,
    )
    address = ("127.0.0.1", int(running.url.rpartition(":")[2]))
    for path in ("/v1/chat/completions", "/v1/files"):
        head = f"POST {path} HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: 20000000\r\n\r\n"
        with socket.create_connection(address, timeout=20) as connection:
            connection.sendall(head.encode() + bytes(20_000_000))
            answer = b""
            while piece := connection.recv(65536):
                answer += piece
        assert answer.startswith(b"HTTP/1.1 413 ")
        assert b"connection: close" in answer
        assert b"request_too_large" in answer


def test_a_wrong_key_is_said_however_much_is_sent_with_it(stand_in: Start, gateway: Start) -> None:
    running = gateway(stand_in({"hello": "x"}).url, server={"api_keys": ["right"]}, edge=True)
    with running.client(api_key="wrong") as client:
        for _ in range(3):
            with pytest.raises(openai.AuthenticationError):
                create(client, user="x" * 10_000_000)
            with pytest.raises(openai.AuthenticationError):
                client.files.create(file=b"x" * 10_000_000, purpose="batch")


def test_a_teacher_that_cannot_be_reached_or_says_nothing(stand_in: Start, gateway: Start) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = taken.getsockname()[1]
    running = gateway(f"http://127.0.0.1:{port}")
    for stream in (False, True):
        error = caught(running, openai.InternalServerError, stream=stream)
        assert (error.status_code, error.type) == (502, "upstream_error")


def test_a_teacher_that_says_nothing(stand_in: Start, gateway: Start) -> None:
    running = gateway(stand_in({"hello": "x"}).url, teacher={"timeout_s": 0.3})
    for stream in (False, True):
        error = caught(running, openai.InternalServerError, stream=stream, metadata={"stand_in": "stall=3"})
        assert (error.status_code, error.code) == (504, "timeout")
