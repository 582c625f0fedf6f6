"""Everything else under /v1: to the teacher and back, byte for byte."""

from __future__ import annotations

import asyncio
import gzip
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import openai
import pytest

from serving.server_settings import ServerSettings

Start = Callable[..., Any]
ANSWERS = {"hello": "greeting"}


@pytest.fixture
def running(stand_in: Start, gateway: Start) -> Any:
    return gateway(stand_in(ANSWERS, api_key="teacher-key").url)


def test_binary_bodies_come_back_as_they_were(running: Any) -> None:
    for size in (0, 1, 70_000, 3_000_000):
        sent = os.urandom(size)
        answer = running.post("/v1/echo", content=sent, headers={"content-type": "audio/wav"})
        assert answer.content == sent
        assert answer.headers["content-type"] == "audio/wav"
        assert answer.headers["x-understudy-reason"] == "passthrough"


def test_a_body_of_unknown_length_is_streamed(running: Any) -> None:
    def pieces() -> Iterator[bytes]:
        for _ in range(50):
            yield b"a" * 10_000

    assert running.post("/v1/echo", content=pieces()).content == b"a" * 500_000


def test_a_multipart_upload_arrives_whole(running: Any) -> None:
    files = {"file": ("train.jsonl", os.urandom(200_000), "application/octet-stream")}
    request = httpx.Request("POST", f"{running.url}/v1/echo", files=files, data={"purpose": "fine-tune"})
    sent = request.read()
    with httpx.Client() as client:
        answer = client.send(request)
    assert answer.content == sent
    assert answer.headers["content-type"] == request.headers["content-type"]


def test_events_come_through_while_they_come(running: Any) -> None:
    with httpx.stream(
        "POST", f"{running.url}/v1/echo/sse", verify=False, content=b"one\ntwo\nthree\n"
    ) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        text = answer.read().decode()
    assert "data: one\n\n" in text
    assert "data: three\n\n" in text


def test_method_path_and_query_are_kept_and_our_headers_are_not(running: Any) -> None:
    answer = httpx.request(
        "DELETE",
        f"{running.url}/v1/files/a%20b?limit=2&after=x%2Fy",
        headers={
            "authorization": "Bearer client-key",
            "x-understudy-task": "intents",
            "openai-project": "p1",
            "cookie": "session=1",
        },
    )
    seen = answer.json()
    text = answer.text
    assert seen["method"] == "DELETE"
    assert "a%20b" in text or "a b" in text
    assert "limit=2&after=x%2Fy" in text
    assert "openai-project" in text
    assert "x-understudy-task" not in text
    assert "client-key" not in text
    assert "session=1" not in text


def test_an_answer_comes_before_it_is_whole(serve: Start, gateway: Start) -> None:
    read = threading.Event()

    async def slow(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"first", "more_body": True})
        await asyncio.to_thread(read.wait, 60)
        await send({"type": "http.response.body", "body": b"second"})

    running = gateway(serve(slow))
    try:
        with httpx.stream("GET", f"{running.url}/v1/audio", verify=False, timeout=20) as answer:
            pieces = answer.iter_raw()
            assert next(pieces) == b"first"
            read.set()
            assert next(pieces) == b"second"
    finally:
        read.set()


def test_an_answer_that_breaks_isnt_made_to_look_whole(serve: Start, gateway: Start) -> None:
    async def broken(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"first", "more_body": True})
        raise RuntimeError("the power went out")

    running = gateway(serve(broken))
    with pytest.raises(httpx.RemoteProtocolError):
        running.get("/v1/audio")


def test_an_error_page_that_is_compressed_is_not_quoted(serve: Start, gateway: Start) -> None:
    async def proxy(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            headers = [(b"content-type", b"text/html"), (b"content-encoding", b"gzip")]
            await send({"type": "http.response.start", "status": 503, "headers": headers})
            await send({"type": "http.response.body", "body": gzip.compress(b"<h1>Busy</h1>")})

    answer = gateway(serve(proxy)).get("/v1/models")
    assert answer.status_code == 503
    assert "content-encoding" not in answer.headers
    assert answer.json()["error"]["message"] == "the teacher answered with status 503"


def test_there_is_one_date(running: Any) -> None:
    assert len(running.get("/v1/models").headers.get_list("date")) == 1


def test_pass_through_is_metered(running: Any) -> None:
    running.get("/v1/models")
    assert running.metric("understudy_requests_total", reason="passthrough", code="200") == 1
    assert running.exchanges() == []


def test_only_what_is_offered_is_passed_on(stand_in: Start, gateway: Start) -> None:
    """Tenants behind one key of the teacher's would read and delete each other's files."""
    teacher = stand_in(ANSWERS, api_key="teacher-key")
    running = gateway(teacher.url, server={"pass_through": ["echo", "images/generations"]})
    body = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}
    assert running.post(json=body).json()["choices"][0]["message"]["content"] == "greeting"
    for path in ("echo", "echo/sse", "ech%6f", "images/generations?n=1"):
        assert running.post(f"/v1/{path}", content=b"x").status_code != 404, path
    for method, path in (
        ("GET", "chat/completions"),
        ("DELETE", "chat/completions/chatcmpl-1"),
        ("GET", "files"),
        ("GET", "%66iles"),
        ("POST", "echoes"),
        ("POST", "images"),
        ("POST", "echo%2f..%2ffiles"),
        ("POST", "echo/%252e%252e/files"),
        ("POST", "/echo"),
        ("POST", "echo//files"),
    ):
        refused = running.request(method, f"/v1/{path}")
        assert refused.status_code == 404, path
        error = refused.json()["error"]
        assert (error["type"], error["code"]) == ("invalid_request_error", "not_passed_through"), path
    with running.client() as client, pytest.raises(openai.NotFoundError, match=r"server\.pass_through"):
        client.files.list()


def test_without_a_list_everything_is_passed_on(running: Any) -> None:
    assert running.get("/v1/files").status_code == 200


@pytest.mark.parametrize("path", ["/v1/files", "files/", "", "../files", "files?x"])
def test_a_path_that_could_never_match_is_a_mistake(path: str) -> None:
    with pytest.raises(ValueError, match="should be paths below /v1/"):
        ServerSettings(pass_through=[path])
