"""A recorded answer in OpenAI's two forms, a whole completion and a stream of chunks.

Tokens are counted by a rule, since there is no tokenizer: ⌈UTF-8 bytes / 4⌉ of all message texts, and of the
answer (where log-probabilities are recorded, their number of entries). A stream has one chunk a token.
Log-probabilities are sent where they were asked for and recorded, or made from a recorded confidence
(`serving.recorded_confidence`); otherwise `logprobs` is null.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import orjson

from serving.exchange import Json
from serving.recorded_confidence import token_logprobs
from serving.recording import Recorded

FINGERPRINT = "fp_stand_in"


class Reply:
    """One recorded answer in OpenAI's two forms."""

    def __init__(self, *, id: str, created: int, model: str, row: Recorded, request: Json) -> None:
        self._head = {"id": id, "created": created, "model": model, "system_fingerprint": FINGERPRINT}
        self._row = row
        self._finish = "tool_calls" if row.tool_calls else "stop"
        self._logprobs = logprobs(row, request) if request.get("logprobs") is True else None
        choices = request.get("n")
        self._choices = choices if isinstance(choices, int) and choices > 1 else 1
        prompt, answer = prompt_tokens(request), answer_tokens(row)
        self._usage = {
            "prompt_tokens": prompt,
            "completion_tokens": answer * self._choices,
            "total_tokens": prompt + answer * self._choices,
        }
        options = request.get("stream_options")
        self._include_usage = isinstance(options, dict) and options.get("include_usage") is True

    @functools.cached_property
    def _deltas(self) -> list[Json]:
        """Only a stream needs them, and of a long answer there are many."""
        return list(deltas(self._row))

    @property
    def length(self) -> int:
        """Number of chunks a stream of this reply has."""
        return (len(self._deltas) + 2) * self._choices + self._include_usage

    def whole(self) -> Json:
        """Return the `chat.completion`."""
        message: Json = {"role": "assistant", "content": self._row.teacher, "refusal": None}
        if self._row.tool_calls:
            message["tool_calls"] = [
                tool_call(call, index) for index, call in enumerate(self._row.tool_calls)
            ]
        logprobs = None if self._logprobs is None else {"content": self._logprobs, "refusal": None}
        return {
            **self._head,
            "object": "chat.completion",
            "choices": [
                {"index": index, "message": message, "logprobs": logprobs, "finish_reason": self._finish}
                for index in range(self._choices)
            ],
            "usage": self._usage,
        }

    def chunks(self) -> Iterator[Json]:
        """Yield the `chat.completion.chunk`s: role, tokens, finish, and the usage if it was asked for."""
        for index in range(self._choices):
            yield self._chunk(index, {"role": "assistant", "content": "", "refusal": None})
            for position, delta in enumerate(self._deltas):
                yield self._chunk(index, delta, position=position)
            yield self._chunk(index, {}, finish=self._finish)
        if self._include_usage:
            yield {**self._head, "object": "chat.completion.chunk", "choices": [], "usage": self._usage}

    def _chunk(
        self, index: int, delta: Json, *, position: int | None = None, finish: str | None = None
    ) -> Json:
        logprobs = None
        if self._logprobs is not None and position is not None and position < len(self._logprobs):
            logprobs = {"content": [self._logprobs[position]], "refusal": None}
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        chunk = {**self._head, "object": "chat.completion.chunk", "choices": [choice]}
        if self._include_usage:
            chunk["usage"] = None
        return chunk


def prompt_tokens(request: Json) -> int:
    """Count the prompt by the rule: ⌈UTF-8 bytes of all message texts / 4⌉."""
    return -(-sum(len(content_text(message.get("content")).encode()) for message in request["messages"]) // 4)


def answer_tokens(row: Recorded) -> int:
    """Count the answer: recorded tokens, else ⌈UTF-8 bytes / 4⌉ of the text and of the tool calls."""
    if row.logprobs is not None:
        return len(row.logprobs)
    if row.confidence is not None:
        return sum(1 for _ in deltas(row))
    calls = b"" if row.tool_calls is None else orjson.dumps(row.tool_calls)
    return -(-(len((row.teacher or "").encode()) + len(calls)) // 4)


def logprobs(row: Recorded, request: Json) -> list[Json] | None:
    """Return an entry for each token: as recorded, else made from the recorded confidence; None if there is neither."""
    if row.logprobs is not None or row.confidence is None:
        return row.logprobs
    top = request.get("top_logprobs")
    return token_logprobs(
        [_said(delta) for delta in deltas(row)], row.confidence, top=top if isinstance(top, int) else 0
    )


def _said(delta: Json) -> str:
    """Return the token that a delta adds: its text, else the name or the arguments of its tool call."""
    if "content" in delta:
        return str(delta["content"])
    function = delta["tool_calls"][0]["function"]
    return str(function["arguments"] or function.get("name", ""))


def deltas(row: Recorded) -> Iterator[Json]:
    """Yield what the chunks of a stream add: recorded tokens, else four characters each; then tool calls."""
    text = row.teacher or ""
    tokens = [str(entry["token"]) for entry in row.logprobs or []]
    if "".join(tokens) != text:
        tokens = [text[start : start + 4] for start in range(0, len(text), 4)]
    for token in tokens:
        yield {"content": token}
    for index, recorded in enumerate(row.tool_calls or []):
        call = tool_call(recorded, index)
        arguments = call["function"]["arguments"]
        yield {"tool_calls": [{"index": index, **call, "function": {**call["function"], "arguments": ""}}]}
        yield {"tool_calls": [{"index": index, "function": {"arguments": arguments}}]}


def tool_call(recorded: Json, index: int) -> Json:
    """Complete a recorded tool call: an id and a type if it has none, its arguments as a string."""
    function = recorded["function"]
    arguments = function.get("arguments", "{}")
    if not isinstance(arguments, str):
        arguments = orjson.dumps(arguments).decode()
    return {
        "id": recorded.get("id", f"call_{index}"),
        "type": "function",
        "function": {"name": function.get("name", ""), "arguments": arguments},
    }


def content_text(content: object) -> str:
    """Return the text of a message: the string, or its text parts joined."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        return ""
    return "".join(
        part["text"] for part in content if isinstance(part, dict) and isinstance(part.get("text"), str)
    )
