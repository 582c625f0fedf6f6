"""An answer from the cache is the answer that was given, whether it comes whole or as a stream."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import openai
import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

Start = Callable[..., Any]

TEXTS = st.text(alphabet='ab é"\\\n{}', max_size=20)
CALLS = st.lists(
    st.tuples(st.sampled_from(["look_up", "refund"]), st.sampled_from(["", "{}", '{"id": "é 1"}'])),
    min_size=1,
    max_size=3,
)


class Recorded:
    """A teacher that gives the answers it was told to, whole or cut into the chunks OpenAI sends."""

    def __init__(self) -> None:
        self.answers: dict[str, dict[str, Any]] = {}
        self.asked = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        assert scope["type"] == "http"
        raw, more = b"", True
        while more:
            message = await receive()
            raw, more = raw + message.get("body", b""), message.get("more_body", False)
        request = orjson.loads(raw)
        self.asked += 1
        answer = self.answers[request["messages"][-1]["content"]]
        kind, body = b"application/json", orjson.dumps(answer)
        if request.get("stream"):
            kind = b"text/event-stream"
            frames = [b"data: " + orjson.dumps(chunk) + b"\n\n" for chunk in cut(answer)]
            body = b"".join([*frames, b"data: [DONE]\n\n"])
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", kind)]})
        await send({"type": "http.response.body", "body": body})


def cut(answer: dict[str, Any]) -> list[dict[str, Any]]:
    """Cut an answer as a provider might: each choice in its own chunks, everything of a kind in two pieces."""
    head = {k: v for k, v in answer.items() if k not in ("choices", "usage", "object")}
    head = {**head, "object": "chat.completion.chunk", "usage": None, "obfuscation": "xyz"}
    made = []

    def add(choice: dict[str, Any], delta: dict[str, Any], **more: Any) -> None:
        part = {"index": choice["index"], "delta": delta, "finish_reason": None, **more}
        made.append({**head, "choices": [part]})

    for choice in answer["choices"]:
        message = choice["message"]
        add(choice, {"role": "assistant", "content": "" if message["content"] is not None else None})
        for name in ("content", "refusal"):
            said = message.get(name)
            if said and not (name == "content" and choice.get("logprobs")):
                half = len(said) // 2
                for piece in (said[:half], said[half:]):
                    add(choice, {name: piece})
        if choice.get("logprobs"):
            for entry in choice["logprobs"]["content"]:
                add(choice, {"content": entry["token"]}, logprobs={"content": [entry], "refusal": None})
        for index, call in enumerate(message.get("tool_calls") or ()):
            name, arguments = call["function"]["name"], call["function"]["arguments"]
            begun = {"index": index, "id": call["id"], "type": "function"}
            add(choice, {"tool_calls": [{**begun, "function": {"name": name, "arguments": ""}}]})
            if arguments:
                add(choice, {"tool_calls": [{"index": index, "function": {"arguments": arguments}}]})
        add(choice, {})
        made[-1]["choices"][0]["finish_reason"] = choice["finish_reason"]
    return [*made, {**head, "choices": [], "usage": answer["usage"]}]


@st.composite
def choice(draw: st.DrawFn, index: int) -> dict[str, Any]:
    kind = draw(st.sampled_from(["text", "refusal", "calls", "logprobs", "cut off"]))
    message: dict[str, Any] = {"role": "assistant", "content": None, "refusal": None}
    made: dict[str, Any] = {"index": index, "message": message, "logprobs": None, "finish_reason": "stop"}
    match kind:
        case "text" | "cut off":
            message["content"] = draw(TEXTS.filter(bool))
            made["finish_reason"] = "stop" if kind == "text" else "length"
        case "refusal":
            message["refusal"] = draw(TEXTS.filter(bool))
        case "calls":
            message["tool_calls"] = [
                {"id": f"call_{i}", "type": "function", "function": {"name": name, "arguments": arguments}}
                for i, (name, arguments) in enumerate(draw(CALLS))
            ]
            made["finish_reason"] = "tool_calls"
        case _:
            tokens = draw(st.lists(TEXTS.filter(bool), min_size=1, max_size=4))
            message["content"] = "".join(tokens)
            made["logprobs"] = {
                "content": [
                    {"token": token, "logprob": -0.5, "bytes": list(token.encode()), "top_logprobs": []}
                    for token in tokens
                ],
                "refusal": None,
            }
    return made


@st.composite
def answers(draw: st.DrawFn) -> dict[str, Any]:
    count = draw(st.integers(1, 2))
    return {
        "id": "chatcmpl-upstream",
        "object": "chat.completion",
        "created": 1_700_000_000,
        "model": "big",
        "choices": [draw(choice(index)) for index in range(count)],
        "usage": {"prompt_tokens": 9, "completion_tokens": 4, "total_tokens": 13},
        "system_fingerprint": "fp_1",
        "service_tier": "default",
        "x_provider": {"region": "eu"},
    }


def ask(client: openai.OpenAI, text: str, stream: bool) -> tuple[str, dict[str, Any]]:
    """Ask with the official client; a stream is put together by that client's own accumulator."""
    asked: dict[str, Any] = {
        "model": "m",
        "messages": [{"role": "user", "content": text}],
        "temperature": 0,
        "logprobs": True,
    }
    if not stream:
        whole = client.chat.completions.create(**asked)
        return whole.id, plain(whole.model_dump())
    with client.chat.completions.stream(**asked, stream_options={"include_usage": True}) as opened:
        for _ in opened:
            pass
        final = opened.current_completion_snapshot
    return final.id, plain(final.model_dump())


def plain(completion: dict[str, Any]) -> dict[str, Any]:
    """What must be the same; what the accumulator adds or leaves out is no matter of ours."""
    return {
        **{
            key: completion.get(key)
            for key in ("created", "model", "usage", "system_fingerprint", "service_tier")
        },
        "usage": {k: v for k, v in completion["usage"].items() if v is not None},
        "choices": [
            {
                "index": one["index"],
                "finish_reason": one["finish_reason"],
                "content": one["message"].get("content") or None,
                "refusal": one["message"].get("refusal"),
                "calls": [
                    (call["id"], call["function"]["name"], call["function"]["arguments"])
                    for call in one["message"].get("tool_calls") or ()
                ],
                "logprobs": [entry["token"] for entry in (one.get("logprobs") or {}).get("content") or ()],
            }
            for one in completion["choices"]
        ],
    }


@pytest.mark.parametrize("stream_first", [False, True])
def test_every_form_holds_the_same_answer(serve: Start, gateway: Start, stream_first: bool) -> None:
    teacher = Recorded()
    running = gateway(serve(teacher))
    numbers = itertools.count()

    @settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
    @given(answer=answers())
    def every_form(answer: dict[str, Any]) -> None:
        text = f"question {next(numbers)}"
        teacher.answers[text] = answer
        before = teacher.asked
        first_id, first = ask(client, text, stream_first)
        forms = [ask(client, text, stream) for stream in (not stream_first, stream_first)]
        assert teacher.asked == before + 1
        assert first == plain(answer)
        assert [form for _, form in forms] == [first] * 2
        assert len({first_id, *(id for id, _ in forms)}) == 3

    with running.client() as client:
        every_form()


@pytest.mark.parametrize("stream_first", [False, True])
def test_what_isnt_known_is_kept(serve: Start, gateway: Start, stream_first: bool) -> None:
    teacher = Recorded()
    answer = {
        "id": "c",
        "object": "chat.completion",
        "created": 1,
        "model": "big",
        "x_provider": {"region": "eu"},
    }
    said = {"role": "assistant", "content": "hello", "annotations": [{"url": "u"}]}
    answer |= {"choices": [{"index": 0, "message": said, "finish_reason": "stop"}], "usage": None}
    teacher.answers["hi"] = answer
    running = gateway(serve(teacher))
    asked = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "temperature": 0}
    running.post(json={**asked, "stream": stream_first})
    hit = running.post(json=asked)
    assert hit.headers["x-understudy-route"] == "cache"
    assert hit.json()["x_provider"] == {"region": "eu"}
    assert "obfuscation" not in hit.json()
    if not stream_first:
        assert hit.json()["choices"][0]["message"]["annotations"] == [{"url": "u"}]
    streamed = running.post(json={**asked, "stream": True})
    assert streamed.headers["x-understudy-route"] == "cache"
    assert '"x_provider":{"region":"eu"}' in streamed.text
