"""Chat completions as they cross the wire: reading a request, and turning an answer into a stream and back.

The shapes are those of OpenAI's API reference (https://platform.openai.com/docs/api-reference/chat). Fields
we don't know pass through untouched in both directions.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import orjson

from serving.assembler import Assembler as Assembler
from serving.errors import RequestError
from serving.exchange import Json

SSE_DONE = b"data: [DONE]\n\n"
"""The last frame of every complete stream."""

_WORDS = re.compile(r"\s*\S+\s*$|\s*\S+|\s+")
_EXACT_INTEGERS = range(-(2**63), 2**64)
_EXPONENTS = (b"e+", b"e1", b"e2", b"e3")
_SYSTEM_ROLES = ("system", "developer")
_MOST_VALUES = 100_000
"""A request may hold so many values. A megabyte of text is one of them; a megabyte of `[]` is 350,000, takes 25 MB in
memory and holds up everybody else for half a second."""
_BETWEEN_VALUES = (b",", b"[", b"{")
_TEXT_OR_BETWEEN = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?|[,\[{]', re.DOTALL)


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """A chat completion request that is well-formed enough to be served.

    `body` is what the client wrote, unknown fields included. `raw` is `body` serialised again, never the
    client's own bytes: what we judged and what the upstream reads must be the same thing, and a body with
    duplicate keys is read differently by different parsers (here the last one wins).
    """

    body: Json
    raw: bytes
    model: str
    stream: bool
    wants_usage: bool

    @classmethod
    def parse(cls, raw: bytes) -> ChatRequest:
        """Read a request body.

        Raises RequestError (400, with `param` where one field is to blame) for anything that isn't a JSON
        object with a model and at least one message, for numbers and nesting that could not be passed on
        unchanged, and for more than 100,000 values.
        """
        body = _read_object(raw)
        model = body.get("model")
        if not isinstance(model, str) or not model:
            raise _wrong("model", "the name of a model as a string", body)
        _check_messages(body)
        stream = body.get("stream")
        if stream is not None and not isinstance(stream, bool):
            raise _wrong("stream", "true or false", body)
        n = body.get("n")
        if n is not None and (not isinstance(n, int) or isinstance(n, bool) or n < 1):
            raise _wrong("n", "a whole number of at least 1", body)
        options = body.get("stream_options")
        if options is not None and not isinstance(options, dict):
            raise _wrong("stream_options", "an object", body)
        return cls(
            body=body,
            raw=_write_object(body, raw),
            model=model,
            stream=bool(stream),
            wants_usage=bool(stream and options and options.get("include_usage")),
        )


def system_text(request: Json) -> str:
    """Join the text of all system and developer messages by newlines; empty when there is none."""
    texts = (text_of(m.get("content")) for m in request["messages"] if m.get("role") in _SYSTEM_ROLES)
    return "\n".join(text for text in texts if text)


def last_user_text(request: Json) -> str | None:
    """Return the last message's text if it is the user's and plain text, else None (images, …)."""
    last = request["messages"][-1]
    return text_of(last.get("content")) if last.get("role") == "user" else None


def token_limit(request: Json) -> int | None:
    """Return how many tokens the request allows for an answer, if it says so."""
    for name in ("max_completion_tokens", "max_tokens"):
        limit = request.get(name)
        if isinstance(limit, int):
            return limit
    return None


def wants_continuous_usage(request: Json) -> bool:
    """Say whether the client asked for the usage so far in every chunk, which vLLM offers."""
    options = request.get("stream_options")
    return bool(options and options.get("include_usage") and options.get("continuous_usage_stats"))


def completion(
    *,
    id: str,
    created: int,
    model: str,
    choices: list[Json],
    usage: Json | None,
    system_fingerprint: str | None = None,
) -> Json:
    """Build a whole `chat.completion`; `usage` and `system_fingerprint` are left out when not known."""
    body: Json = {
        "id": id,
        "object": "chat.completion",
        "created": created,
        "model": model,
        "choices": choices,
    }
    if usage is not None:
        body["usage"] = usage
    if system_fingerprint is not None:
        body["system_fingerprint"] = system_fingerprint
    return body


def chunks(completion: Json, *, include_usage: bool) -> Iterator[Json]:
    """Cut an answer into `chat.completion.chunk` objects, in the order OpenAI sends them.

    For each choice: the role, the text word by word (token by token where log-probabilities come with it),
    the tool calls, the finish reason; then the usage in a chunk without choices, if it is asked for and
    known. `Assembler` is the inverse.
    """
    own = {key: value for key, value in completion.items() if key not in ("object", "choices", "usage")}
    own["object"] = "chat.completion.chunk"
    if include_usage:
        own["usage"] = None
    for choice in completion["choices"]:
        for part in _choice_parts(choice):
            yield {**own, "choices": [part]}
    if include_usage and completion.get("usage") is not None:
        yield {**own, "choices": [], "usage": completion["usage"]}


def sse(data: Json | bytes) -> bytes:
    """Frame one server-sent event. Bytes must be JSON on a single line and are framed as they are."""
    return b"data: " + (data if isinstance(data, bytes) else orjson.dumps(data)) + b"\n\n"


def _read_object(raw: bytes) -> Json:
    _refuse_crowded(raw)
    try:
        body = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise RequestError(f"The request body isn't valid JSON: {error}.") from None
    if not isinstance(body, dict):
        raise RequestError(f"The request body must be a JSON object, not {_kind(body)}.")
    return body


def _refuse_crowded(raw: bytes) -> None:
    """Refuse too many values before they are made: what stands between them is counted, texts left out."""
    if len(raw) < _MOST_VALUES or sum(map(raw.count, _BETWEEN_VALUES)) < _MOST_VALUES:
        return
    values = 0
    for number, found in enumerate(_TEXT_OR_BETWEEN.finditer(raw)):
        values += found[0] in _BETWEEN_VALUES
        if values >= _MOST_VALUES:
            raise RequestError(
                f"The request body holds more than {_MOST_VALUES} values (lists, objects, numbers, texts), which is "
                "more than any chat request needs. Send data as text."
            )
        if number >= 4 * _MOST_VALUES:
            return  # texts with nothing between them: no JSON, which its parser finds out faster


def _write_object(body: Json, raw: bytes) -> bytes:
    try:
        written = orjson.dumps(body)
    except TypeError:
        raise RequestError(
            "The request body is nested too deeply: at most 254 levels can be passed on."
        ) from None
    # orjson reads integers beyond 64 bits as floats and writes every float that large with an exponent, so
    # only a body with an exponent (or with text that looks like one) needs the slow second look.
    if any(map(written.__contains__, _EXPONENTS)):
        _refuse_inexact(raw)
    return written


def _refuse_inexact(raw: bytes) -> None:
    def exact(literal: str) -> int:
        digits = literal.lstrip("-").lstrip("0")
        if len(digits) > 20 or int(literal) not in _EXACT_INTEGERS:
            raise RequestError(
                f"The request holds the whole number {literal[:40]}, which doesn't fit into 64 bits and "
                "could not be passed on unchanged. Send a smaller number, or a string."
            )
        return int(literal)

    # orjson has accepted the same bytes, so that this can only fail in `exact`.
    json.loads(raw, parse_int=exact)


def _check_messages(body: Json) -> None:
    messages = body.get("messages")
    if not isinstance(messages, list):
        raise _wrong("messages", "a list of messages", body)
    if not messages:
        raise RequestError("'messages' is empty: send at least one message.", param="messages")
    for position, message in enumerate(messages):
        if not isinstance(message, dict):
            raise RequestError(
                f"'messages[{position}]' must be an object with a role and content, not {_kind(message)}.",
                param=f"messages[{position}]",
            )
        role = message.get("role")
        if not isinstance(role, str) or not role:
            raise RequestError(
                f"'messages[{position}].role' must be a string such as \"user\", not {_kind(role)}.",
                param=f"messages[{position}].role",
            )


def _wrong(param: str, expected: str, body: Json) -> RequestError:
    if param not in body:
        return RequestError(
            f"'{param}' is missing: send {expected}.", param=param, code="missing_required_parameter"
        )
    return RequestError(
        f"'{param}' must be {expected}, not {_kind(body[param])}.", param=param, code="invalid_type"
    )


def _kind(value: object) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "true" if value else "false"
        case int() | float():
            return f"the number {value}"
        case str():
            return f"the string {value[:40]!r}" if value else "an empty string"
        case list():
            return "a list"
        case _:
            return "an object"


def text_of(content: object) -> str | None:
    """Return the text of a message's `content`, its parts joined; None for what isn't text only."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        return None
    texts: list[str] = []
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            return None
        texts.append(part["text"])
    return "".join(texts)


def _choice_parts(choice: Json) -> Iterator[Json]:
    """Cut one choice into what stands in the chunks' `choices`. What isn't text goes with the role."""
    message: Json = choice.get("message") or {}
    index = choice.get("index", 0)
    logprobs = choice.get("logprobs")
    known_logprobs = {"logprobs": None} if "logprobs" in choice else {}

    def part(delta: Json, logprobs: Json | None = None) -> Json:
        at: Json = {"index": index, "delta": delta, **known_logprobs, "finish_reason": None}
        if logprobs is not None:
            at["logprobs"] = logprobs
        return at

    content = message.get("content")
    tokens = _tokens_of(content, logprobs)
    first: Json = {"role": message.get("role", "assistant")}
    first |= {k: v for k, v in message.items() if k not in ("role", "tool_calls", "function_call")}
    for name in ("content", "refusal"):
        if isinstance(message.get(name), str):
            first[name] = ""
    if "tool_calls" in message and not message["tool_calls"]:
        first["tool_calls"] = message["tool_calls"]
    if "function_call" in message and message["function_call"] is None:
        first["function_call"] = None
    yield part(first, logprobs if tokens is None else None)

    if tokens is not None and logprobs is not None:
        rest = {key: value for key, value in logprobs.items() if key != "content"}
        for token in tokens:
            yield part({"content": token["token"]}, {"content": [token], **rest})
            rest = dict.fromkeys(rest)
    elif isinstance(content, str):
        for piece in _WORDS.findall(content):
            yield part({"content": piece})
    if isinstance(message.get("refusal"), str):
        for piece in _WORDS.findall(message["refusal"]):
            yield part({"refusal": piece})
    for position, call in enumerate(message.get("tool_calls") or ()):
        for delta in _tool_call_deltas(position, call):
            yield part({"tool_calls": [delta]})
    function_call = message.get("function_call")
    if function_call is not None:
        yield part({"function_call": {**function_call, "arguments": ""}})
        yield part({"function_call": {"arguments": function_call.get("arguments", "")}})

    more = {k: v for k, v in choice.items() if k not in ("index", "message", "logprobs", "finish_reason")}
    yield {**part({}), **more, "finish_reason": choice.get("finish_reason")}


def _tokens_of(content: object, logprobs: Any) -> list[Json] | None:
    """Return the log-probability entries if they spell `content`: text and entry can travel together."""
    entries = logprobs.get("content") if isinstance(logprobs, dict) else None
    if not isinstance(content, str) or not isinstance(entries, list) or not entries:
        return None
    return entries if "".join(entry["token"] for entry in entries) == content else None


def _tool_call_deltas(position: int, call: Json) -> Iterator[Json]:
    """Id, type and name once, then the arguments, as OpenAI does it."""
    function = call.get("function")
    if not isinstance(function, dict) or not function.get("arguments"):
        yield {"index": position, **call}
        return
    yield {"index": position, **call, "function": {**function, "arguments": ""}}
    yield {"index": position, "function": {"arguments": function["arguments"]}}
