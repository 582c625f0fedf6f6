"""Errors: OpenAI's envelope everywhere, the upstream's own status, and nothing of the inside."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from typing import Any

import httpx
import openai
import pytest

Start = Callable[..., Any]
ANSWERS = {"hello": "greeting", "long one": "one two three four five six seven eight"}


def body(text: str = "hello", **more: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": text}], **more}


def fails(how: str, **more: Any) -> dict[str, Any]:
    """Ask the stand-in to fail on this request."""
    return body(metadata={"stand_in": how}, **more)


def envelope(answer: httpx.Response, status: int) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-request-id"]
    error: dict[str, Any] = answer.json()["error"]
    assert set(error) >= {"message", "type", "param", "code"}
    assert error["message"]
    return error


def test_a_malformed_body_is_the_clients_fault(stand_in: Start, gateway: Start) -> None:
    running = gateway(stand_in(ANSWERS).url)
    for raw, param in (
        (b"", None),
        (b"{", None),
        (b"[1]", None),
        (b"\xff\xfe", None),
        (b'{"messages": [{"role": "user", "content": "a"}]}', "model"),
        (b'{"model": 3, "messages": [{"role": "user", "content": "a"}]}', "model"),
        (b'{"model": "m"}', "messages"),
        (b'{"model": "m", "messages": []}', "messages"),
        (b'{"model": "m", "messages": [{"role": "user", "content": "a"}], "stream": "yes"}', "stream"),
    ):
        error = envelope(running.post(content=raw), 400)
        assert error["param"] == param
        assert error["type"] == "invalid_request_error"
    assert running.exchanges() == []
    assert running.metric("understudy_requests_total", reason="refused", code="400") == 9


def test_a_huge_body_is_refused_before_and_while_it_is_read(stand_in: Start, gateway: Start) -> None:
    running = gateway(stand_in(ANSWERS).url, server={"max_body_bytes": 2000})
    assert running.post(json=body("x" * 1000)).status_code == 404, (
        "not too large: the stand-in doesn't know it"
    )
    assert envelope(running.post(json=body("x" * 3000)), 413)["code"] == "request_too_large"

    def pieces() -> Iterator[bytes]:
        for _ in range(30):
            yield b" " * 100

    assert envelope(running.post(content=pieces()), 413)["code"] == "request_too_large"


def test_the_frameworks_own_errors_are_in_the_envelope(stand_in: Start, gateway: Start) -> None:
    running = gateway(stand_in(ANSWERS).url)
    envelope(running.get("/nowhere"), 404)
    forgot_v1 = envelope(running.request("POST", "/chat/completions", json=body("x")), 404)
    assert "base_url ends in /v1" in forgot_v1["message"]
    envelope(running.post("/healthz"), 405)
    envelope(running.get("/v1/a/../../stats"), 404)
    envelope(running.get("/v1/%2e%2e/stats"), 404)


def test_a_refusal_of_the_teacher_keeps_its_status(stand_in: Start, gateway: Start) -> None:
    running = gateway(stand_in(ANSWERS).url)
    for status in (400, 401, 403, 404, 409, 422, 429, 500, 503):
        for stream in (False, True):
            answer = running.post(json=fails(f"status={status};retry-after=7", stream=stream))
            envelope(answer, status)
            assert answer.headers["retry-after"] == "7"
            assert answer.headers["x-understudy-route"] == "teacher"
        assert running.metric("understudy_requests_total", code=str(status)) == 2
    assert running.exchanges() == []
    assert running.metric("understudy_upstream_errors_total", kind="status") == 18


def test_the_official_client_raises_its_own_errors(stand_in: Start, gateway: Start) -> None:
    running = gateway(stand_in(ANSWERS).url)
    with running.client() as client:
        for status, kind in ((429, openai.RateLimitError), (422, openai.UnprocessableEntityError)):
            with pytest.raises(kind):
                client.chat.completions.create(
                    model="m",
                    messages=[{"role": "user", "content": "hello"}],
                    metadata={"stand_in": f"status={status}"},
                )


def test_an_error_page_of_a_proxy_is_wrapped(serve: Start, gateway: Start) -> None:
    async def proxy(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            headers = [(b"content-type", b"text/html"), (b"x-should-retry", b"false")]
            await send({"type": "http.response.start", "status": 502, "headers": headers})
            await send({"type": "http.response.body", "body": b"<h1>Bad Gateway</h1>"})

    running = gateway(serve(proxy))
    for answer in (running.post(json=body()), running.get("/v1/models")):
        assert "Bad Gateway" in envelope(answer, 502)["message"]
        assert answer.headers["x-should-retry"] == "false"


def test_a_teacher_that_is_not_there(gateway: Start) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = taken.getsockname()[1]
    running = gateway(f"http://127.0.0.1:{port}")
    for stream in (False, True):
        assert envelope(running.post(json=body(stream=stream)), 502)["type"] == "upstream_error"
    envelope(running.get("/v1/models"), 502)


def test_a_teacher_that_is_silent(stand_in: Start, gateway: Start) -> None:
    running = gateway(stand_in(ANSWERS).url, teacher={"timeout_s": 0.3})
    for stream in (False, True):
        assert envelope(running.post(json=fails("stall=3", stream=stream)), 504)["code"] == "timeout"
    assert running.metric("understudy_upstream_errors_total", kind="timeout") == 2


def test_a_stream_that_breaks_says_so_and_has_no_end(stand_in: Start, gateway: Start) -> None:
    running = gateway(stand_in(ANSWERS).url)
    text = ""
    with running.client() as client, pytest.raises(openai.APIError):
        stream = client.chat.completions.create(
            model="m",
            messages=[{"role": "user", "content": "long one"}],
            metadata={"stand_in": "break-after=4"},
            stream=True,
        )
        for chunk in stream:
            text += chunk.choices[0].delta.content or ""
    assert text, "what came before the break reached the client"
    assert text != ANSWERS["long one"]
    raw = running.post(
        json={**fails("break-after=4", stream=True), **{"messages": body("long one")["messages"]}}
    )
    frames = raw.text.strip().split("\n\n")
    assert "[DONE]" not in raw.text
    assert frames[-1].startswith('data: {"error":')
    assert running.exchanges() == []


def test_a_whole_answer_that_breaks_is_a_502(stand_in: Start, gateway: Start) -> None:
    running = gateway(stand_in(ANSWERS).url)
    envelope(running.post(json=fails("break-after=1")), 502)


def test_retries_reach_the_teacher_within_the_deadline(stand_in: Start, gateway: Start) -> None:
    teacher = stand_in(ANSWERS)
    running = gateway(teacher.url, teacher={"max_retries": 2})
    answer = running.post(json=fails("status=500;retry-after=0;times=2"))
    assert answer.status_code == 200
    assert teacher.stats()["chat"] == 3


def test_the_clients_request_id_is_kept_if_it_is_safe(stand_in: Start, gateway: Start) -> None:
    running = gateway(stand_in(ANSWERS).url)
    for given, kept in (("my-id-1", True), ("x" * 128, True), ("x" * 129, False), ("two words", False)):
        headers = {"x-request-id": given}
        answers = [
            running.post(json=body(), headers=headers),
            running.post(json={}, headers=headers),
            running.get("/v1/models", headers=headers),
            running.get("/nowhere", headers=headers),
        ]
        for answer in answers:
            assert (answer.headers["x-request-id"] == given) is kept
            assert len(answer.headers.get_list("x-request-id")) == 1
        assert (running.exchanges()[-1].request_id == given) is kept


def test_a_client_that_leaves_frees_the_teacher(stand_in: Start, gateway: Start, eventually: Start) -> None:
    teacher = stand_in({"hello": "word " * 50}, latency_ms=4000, latency_spread=0)
    running = gateway(teacher.url, teacher={"timeout_s": 20.0})
    with httpx.stream(
        "POST", f"{running.url}/v1/chat/completions", verify=False, json=body(stream=True)
    ) as answer:
        next(answer.iter_bytes())
    eventually(lambda: teacher.stats()["disconnected"] == 1)
    eventually(lambda: running.metric("understudy_requests_total", code="499") == 1)
    assert running.exchanges() == []


def test_a_client_that_leaves_before_the_answer_frees_the_teacher(
    stand_in: Start, gateway: Start, eventually: Start
) -> None:
    teacher = stand_in({"hello": "x"}, latency_ms=4000, latency_spread=0)
    running = gateway(teacher.url, teacher={"timeout_s": 20.0})
    with pytest.raises(httpx.ReadTimeout):
        running.post(json=body(), timeout=0.3)
    eventually(lambda: running.metric("understudy_requests_total", code="499") == 1)
    eventually(lambda: teacher.stats()["disconnected"] == 1)
    assert running.exchanges() == []


def test_many_clients_leaving_at_once_leave_a_gateway_that_works(stand_in: Start, gateway: Start) -> None:
    teacher = stand_in({"hello": "word " * 50, "quick": "x"}, latency_ms=900, latency_spread=0)
    running = gateway(teacher.url, teacher={"timeout_s": 20.0})

    def leave() -> None:
        with pytest.raises(httpx.ReadTimeout):
            running.post(json=body(), timeout=0.4)

    threads = [threading.Thread(target=leave) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert running.get("/healthz").json() == {"status": "alive"}
    assert running.post(json=body(), timeout=10).status_code == 200
