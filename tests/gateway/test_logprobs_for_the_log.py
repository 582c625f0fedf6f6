"""Log-probabilities that the operator wants in the log, and the client didn't ask for."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import openai
import pytest

from serving.chat import chunks, sse

Start = Callable[..., Any]
Json = dict[str, Any]

TOKENS: list[Json] = [
    {"token": token, "logprob": -0.25, "bytes": None, "top_logprobs": []} for token in ("hel", "lo")
]
ASKED: Json = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


def teacher(seen: list[Json], *, refuses: str | None = None, status: int = 400) -> Any:
    """A teacher that gives log-probabilities when asked; for the model `refuses` that is an error."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        body = json.loads((await receive())["body"])
        seen.append(body)
        if body.get("logprobs") and body["model"] == refuses:
            said = {"message": "You are not allowed to request logprobs from this model.", "code": None}
            await answer(send, status, json.dumps({"error": said}).encode())
            return
        choice: Json = {
            "index": 0,
            "message": {"role": "assistant", "content": "hello"},
            "logprobs": {"content": TOKENS, "refusal": None} if body.get("logprobs") else None,
            "finish_reason": "stop",
        }
        choices = [{**choice, "index": at} for at in range(body.get("n", 1))]
        whole = {
            "id": "c",
            "object": "chat.completion",
            "created": 7,
            "model": body["model"],
            "choices": choices,
        }
        if body.get("stream"):
            frames = b"".join(map(sse, chunks(whole, include_usage=True))) + b"data: [DONE]\n\n"
            await answer(send, 200, frames, b"text/event-stream")
        else:
            await answer(send, 200, json.dumps(whole).encode())

    async def answer(send: Any, status: int, body: bytes, kind: bytes = b"application/json") -> None:
        headers = [(b"content-type", kind)]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    return app


def streamed(client: openai.OpenAI, **more: Any) -> list[Any]:
    """The choices of all chunks."""
    stream: Any = client.chat.completions.create(**ASKED, stream=True, **more)
    return [choice for chunk in stream for choice in chunk.choices]


def logged(running: Any) -> list[Any]:
    return [
        [choice["logprobs"] and choice["logprobs"]["content"] for choice in exchange.teacher.choices]
        for exchange in running.exchanges()
    ]


@pytest.fixture
def seen() -> list[Json]:
    return []


def test_the_log_has_them_and_the_client_does_not(serve: Start, gateway: Start, seen: list[Json]) -> None:
    running = gateway(serve(teacher(seen)), teacher={"logprobs": True})
    with running.client() as client:
        whole = client.chat.completions.create(**ASKED)
        assert [(c.message.content, c.logprobs) for c in whole.choices] == [("hello", None)]
        both = client.chat.completions.create(**ASKED, n=2)
        assert [c.logprobs for c in both.choices] == [None, None]
        parts = streamed(client)
        assert "".join(part.delta.content or "" for part in parts) == "hello"
        assert all(part.logprobs is None for part in parts)
    assert [body["logprobs"] for body in seen] == [True] * 3
    assert logged(running) == [[TOKENS], [TOKENS, TOKENS], [TOKENS]]
    assert all("logprobs" not in exchange.request for exchange in running.exchanges())


def test_a_client_that_asks_gets_what_it_asked_for(serve: Start, gateway: Start, seen: list[Json]) -> None:
    running = gateway(serve(teacher(seen)), teacher={"logprobs": True})
    with running.client() as client:
        whole = client.chat.completions.create(**ASKED, logprobs=True)
        assert whole.choices[0].logprobs is not None
        tokens = [
            token
            for part in streamed(client, logprobs=True)
            if part.logprobs
            for token in part.logprobs.content
        ]
        assert [token.token for token in tokens] == ["hel", "lo"]
        refused: Json = {"logprobs": False}
        alone: Json = {"top_logprobs": 3}
        for more in (refused, alone):
            client.chat.completions.create(**ASKED, **more)
    assert [body.get("logprobs") for body in seen] == [True, True, False, None]
    assert seen[3] == {**ASKED, **alone}, "the teacher is to judge what the client sent"


def test_nothing_is_asked_by_default(serve: Start, gateway: Start, seen: list[Json]) -> None:
    assert gateway(serve(teacher(seen))).post(json=ASKED).json()["choices"][0]["logprobs"] is None
    assert seen == [ASKED]


@pytest.mark.parametrize("status", [400, 403])
def test_a_model_without_them_is_asked_without_them(
    serve: Start, gateway: Start, seen: list[Json], status: int
) -> None:
    running = gateway(serve(teacher(seen, refuses="reasons", status=status)), teacher={"logprobs": True})
    for stream in (False, True, False):
        assert running.post(json={**ASKED, "model": "reasons", "stream": stream}).status_code == 200
    assert running.post(json=ASKED).status_code == 200
    assert [body.get("logprobs") for body in seen] == [True, None, None, None, True]
    theirs = running.post(json={**ASKED, "model": "reasons", "logprobs": True})
    assert theirs.status_code == status
    assert "not allowed to request logprobs" in theirs.json()["error"]["message"]
