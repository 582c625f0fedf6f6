"""A client that hangs up is no longer worked for: its teacher's connection is closed within 100 ms."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import openai
import pytest

Start = Callable[..., Any]
Json = dict[str, Any]

HEAD: Json = {"id": "c1", "object": "chat.completion.chunk", "created": 7, "model": "m"}
TEXT = (
    b"data: " + json.dumps({**HEAD, "choices": [{"index": 0, "delta": {"content": "a"}}]}).encode() + b"\n\n"
)
ROLE = (
    b"data: "
    + json.dumps({**HEAD, "choices": [{"index": 0, "delta": {"role": "assistant"}}]}).encode()
    + b"\n\n"
)


class Teacher:
    """Sends `first`, then nothing more; notes when it was asked and when its connection was closed."""

    def __init__(self, first: bytes | None) -> None:
        self.asked = threading.Event()
        self.left = threading.Event()
        self.left_at = 0.0
        self._first = first

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        while (await receive()).get("more_body"):
            pass
        if self._first is not None:
            headers = [(b"content-type", b"text/event-stream")]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": self._first, "more_body": True})
        self.asked.set()
        while (await receive())["type"] != "http.disconnect":
            pass
        self.left_at = time.monotonic()
        self.left.set()


WAYS: dict[str, tuple[str, bool, bytes | None, bool]] = {
    # path, stream, what the teacher sends first, whether that reaches the client
    "a whole answer": ("/v1/chat/completions", False, None, False),
    "half of a whole answer": ("/v1/chat/completions", False, b'{"id": "c1", ', False),
    "a stream before its head": ("/v1/chat/completions", True, None, False),
    "a stream whose head is held": ("/v1/chat/completions", True, ROLE, False),
    "a stream in its middle": ("/v1/chat/completions", True, TEXT, True),
    "something passed through": ("/v1/embeddings", False, None, False),
    "half of something passed through": ("/v1/audio/speech", False, b"RIFF", True),
}


@pytest.mark.parametrize("edge", [True, False], ids=["our own connection", "any ASGI server's"])
@pytest.mark.parametrize("way", WAYS)
def test_the_teacher_is_hung_up_on_within_100_ms(serve: Start, gateway: Start, way: str, edge: bool) -> None:
    path, stream, first, seen = WAYS[way]
    teacher = Teacher(first)
    running = gateway(serve(teacher), teacher={"timeout_s": 30.0}, edge=edge)
    address = ("127.0.0.1", int(running.url.rpartition(":")[2]))
    # Long enough for a connection to be left unread until somebody takes what has come.
    body = json.dumps(
        {"model": "m", "messages": [{"role": "user", "content": "hi " * 100_000}], "stream": stream}
    ).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    took: list[float] = []
    # A machine that is busy may be late now and then; a gateway that doesn't watch its client is late always.
    while len(took) < 10 and min(took, default=1.0) >= 0.1:
        teacher.asked.clear()
        teacher.left.clear()
        with socket.create_connection(address, timeout=20) as client:
            client.sendall(head.encode() + body)
            assert teacher.asked.wait(10)
            received = b""
            while seen and first is not None and first not in received:
                received += client.recv(65536)
        closed = time.monotonic()
        assert teacher.left.wait(10), "the teacher's connection stayed open"
        took.append(teacher.left_at - closed)
    assert min(took) < 0.1, took


def test_the_official_client_cancels_by_closing_its_stream(
    serve: Start, gateway: Start, eventually: Start
) -> None:
    teacher = Teacher(TEXT)
    running = gateway(serve(teacher), teacher={"timeout_s": 30.0})
    with running.client() as client:
        with client.chat.completions.create(
            model="m", messages=[{"role": "user", "content": "hi"}], stream=True
        ) as stream:
            assert next(stream).choices[0].delta.content == "a"
        assert teacher.left.wait(10)
        teacher.left.clear()
        with pytest.raises(openai.APITimeoutError):
            client.with_options(timeout=0.3).embeddings.create(model="m", input="hi")
        assert teacher.left.wait(10)
    eventually(lambda: running.metric("understudy_requests_total", code="499") == 2)
