"""The pass-through leaves bodies alone: every type and encoding, both ways, while they come."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import openai
import pytest

Start = Callable[..., Any]
Json = dict[str, Any]

EMBEDDING = base64.b64encode(b"\x00\x00\x80?\x00\x00\x00@").decode()
EVENTS: list[Json] = [
    {"type": "response.created", "sequence_number": 0},
    {
        "type": "response.output_text.delta",
        "delta": "hel",
        "item_id": "i",
        "output_index": 0,
        "content_index": 0,
    },
]


def events() -> bytes:
    return b"".join(b"event: %s\ndata: %s\n\n" % (e["type"].encode(), json.dumps(e).encode()) for e in EVENTS)


class Teacher:
    """Knows a few more endpoints than the stand-in, and notes what it got."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        self.headers: dict[str, str] = {}
        self.first_piece = threading.Event()
        self.left = threading.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        self.headers = {name.decode(): value.decode() for name, value in scope["headers"]}
        path = scope["path"].removeprefix("/v1/")
        if path == "refused":
            await self._answer(send, 413, json.dumps({"error": {"message": "too much"}}).encode())
            return
        body = b""
        while (message := await receive())["type"] == "http.request":
            body += message["body"]
            if body:
                self.first_piece.set()
            if not message["more_body"]:
                break
        else:
            self.left.set()
            return
        self.bodies.append(body)
        await self._respond(path, send)

    async def _respond(self, path: str, send: Any) -> None:
        kinds: dict[str, tuple[int, bytes, Json]] = {
            "files": (200, json.dumps({"id": "file-1", "object": "file"}).encode(), {}),
            "audio/speech": (200, bytes(range(256)) * 500, {"content-type": "audio/mpeg"}),
            "embeddings": (200, json.dumps({"data": [{"embedding": EMBEDDING, "index": 0}]}).encode(), {}),
            "responses": (200, events(), {"content-type": "text/event-stream; charset=utf-8"}),
            "packed": (
                200,
                gzip.compress(b"hello"),
                {"content-encoding": "gzip", "content-type": "text/plain"},
            ),
            "lines": (200, b'{"a":1}\n{"a":2}\n', {"content-type": "application/x-ndjson"}),
            "part": (206, b"ell", {"content-range": "bytes 1-3/5", "accept-ranges": "bytes"}),
            "nothing": (204, b"", {}),
            "unchanged": (304, b"", {"etag": '"a"'}),
            "moved": (302, b"", {"location": "https://elsewhere.example/x?sig=1"}),
            "empty": (200, b"", {"content-length": "0"}),
        }
        status, body, headers = kinds[path]
        await self._answer(send, status, body, headers)

    async def _answer(self, send: Any, status: int, body: bytes, headers: Json | None = None) -> None:
        told = {"content-type": "application/json", **(headers or {})}
        if status not in (204, 304):
            told.setdefault("content-length", str(len(body)))
        raw = [(name.encode(), value.encode()) for name, value in told.items()]
        await send({"type": "http.response.start", "status": status, "headers": raw})
        await send({"type": "http.response.body", "body": body})


@pytest.fixture
def teacher() -> Teacher:
    return Teacher()


@pytest.fixture
def running(serve: Start, gateway: Start, teacher: Teacher) -> Any:
    return gateway(serve(teacher))


@pytest.fixture
def client(running: Any) -> Iterator[openai.OpenAI]:
    with running.client() as made:
        yield made


def test_a_file_is_uploaded(client: openai.OpenAI, teacher: Teacher) -> None:
    content = os.urandom(3_000_000)
    assert client.files.create(file=("a.jsonl", content), purpose="batch").id == "file-1"
    (got,) = teacher.bodies
    assert content in got and b'name="purpose"' in got
    assert teacher.headers["content-type"].startswith("multipart/form-data; boundary=")
    assert teacher.headers["content-length"] == str(len(got))


def test_audio_comes_as_it_is(client: openai.OpenAI) -> None:
    with client.audio.speech.with_streaming_response.create(model="tts", voice="alloy", input="hi") as answer:
        assert answer.headers["content-type"] == "audio/mpeg"
        assert answer.read() == bytes(range(256)) * 500


def test_embeddings(client: openai.OpenAI) -> None:
    assert client.embeddings.create(model="e", input="hi").data[0].embedding == [1.0, 2.0]


def test_events_of_the_responses_api_keep_their_names(client: openai.OpenAI, running: Any) -> None:
    got = list(client.responses.create(model="m", input="hi", stream=True))
    assert [event.type for event in got] == [event["type"] for event in EVENTS]
    assert running.post("/v1/responses", json={}).content == events()


def test_packed_bodies_stay_packed_both_ways(running: Any, teacher: Teacher) -> None:
    sent = gzip.compress(b'{"model": "m"}')
    with httpx.stream(
        "POST",
        f"{running.url}/v1/packed",
        verify=False,
        content=sent,
        headers={"content-encoding": "gzip", "accept-encoding": "gzip"},
    ) as answer:
        raw = b"".join(answer.iter_raw())
    assert answer.headers["content-encoding"] == "gzip"
    assert gzip.decompress(raw) == b"hello"
    assert teacher.bodies == [sent]
    assert (teacher.headers["content-encoding"], teacher.headers["accept-encoding"]) == ("gzip", "gzip")


@pytest.mark.parametrize(
    ("path", "status", "body", "kept"),
    [
        ("lines", 200, b'{"a":1}\n{"a":2}\n', {"content-type": "application/x-ndjson"}),
        ("part", 206, b"ell", {"content-range": "bytes 1-3/5", "accept-ranges": "bytes"}),
        ("nothing", 204, b"", {}),
        ("unchanged", 304, b"", {"etag": '"a"'}),
        ("moved", 302, b"", {"location": "https://elsewhere.example/x?sig=1"}),
        ("empty", 200, b"", {"content-length": "0"}),
    ],
)
def test_answers_of_every_kind(
    running: Any, teacher: Teacher, path: str, status: int, body: bytes, kept: Json
) -> None:
    for _ in range(2):  # the second one shows that nothing was left over on the connection
        answer = running.get(f"/v1/{path}", headers={"range": "bytes=1-3", "if-none-match": '"a"'})
        assert (answer.status_code, answer.content) == (status, body)
        assert {name: answer.headers.get(name) for name in kept} == kept
        assert answer.headers["x-understudy-reason"] == "passthrough"
    assert teacher.headers["range"] == "bytes=1-3"
    head = running.request("HEAD", f"/v1/{path}")
    assert (head.status_code, head.content) == (status, b"")
    assert {name: head.headers.get(name) for name in kept} == kept


def test_an_upload_passes_while_it_comes(running: Any, teacher: Teacher) -> None:
    digest = hashlib.sha256()

    def pieces() -> Iterator[bytes]:
        for number in range(40):
            piece = os.urandom(50_000)
            digest.update(piece)
            yield piece
            if number == 1:
                assert teacher.first_piece.wait(10), (
                    "nothing had reached the teacher before the upload was over"
                )

    assert running.post("/v1/files", content=pieces()).status_code == 200
    (got,) = teacher.bodies
    assert hashlib.sha256(got).digest() == digest.digest()


def test_an_upload_has_a_limit(serve: Start, gateway: Start, teacher: Teacher) -> None:
    running = gateway(serve(teacher), server={"max_upload_bytes": 200_000})

    def pieces() -> Iterator[bytes]:
        for _ in range(10):
            yield b"x" * 50_000

    for sent in (b"x" * 200_001, pieces()):
        answer = running.post("/v1/files", content=sent)
        assert answer.status_code == 413
        assert answer.json()["error"]["code"] == "request_too_large"
        assert "server.max_upload_bytes" in answer.json()["error"]["message"]
    assert teacher.bodies == []
    assert running.post("/v1/files", content=b"x" * 200_000).status_code == 200
    assert running.metric("understudy_upstream_errors_total") == 0


def test_a_teacher_that_refuses_an_upload_early_is_heard(running: Any) -> None:
    for size in (100_000, 1_000_000):
        answer = running.post("/v1/refused", content=b"x" * size)
        assert answer.status_code == 413
        assert answer.json() == {"error": {"message": "too much"}}


def test_an_upload_that_is_given_up_ends_at_the_teacher_too(
    running: Any, teacher: Teacher, eventually: Start
) -> None:
    def pieces() -> Iterator[bytes]:
        yield b"x" * 100_000
        assert teacher.first_piece.wait(10)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        running.post("/v1/files", content=pieces())
    assert teacher.left.wait(10)
    assert teacher.bodies == []
    eventually(lambda: running.metric("understudy_requests_total", code="499") == 1)
