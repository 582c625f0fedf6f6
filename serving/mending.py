"""Mending a teacher's answer: what strict clients stumble over, and nothing else.

Servers that call themselves OpenAI-compatible are so to different degrees. What is mended, and who sends it:

- no or an empty `id`, `object`, `created` or `model`: Azure's first chunk, many small servers. Filled from
  the first chunk that has it; every chunk of a stream gets the same `id` and `created`, as OpenAI's do (some
  make new ones for each chunk);
- no list of `choices`, a choice without `index` or `delta`: Azure's content filter, keep-alives;
- the empty string as `finish_reason`, where null is meant; and none at all in an answer that is whole;
- a `role` in every delta (Ollama), a tool call's `id` and name in every delta (vLLM): a client that appends
  strings, as `openai`'s own helper does, would read "assistantassistant";
- tool calls without `index`, without `id` or `type`, with arguments as an object; several calls under one
  index (Gemini).

What is right is left as it is, unknown fields included, so that its bytes can be passed on.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator

import orjson

from serving.exchange import Json

_CHUNK = "chat.completion.chunk"
_WHOLE = "chat.completion"


class Mender:
    """Mends the chunks of one stream, in their order. `model` is the name to fall back on."""

    def __init__(self, *, model: str) -> None:
        self._id: str | None = None
        self._created: int | None = None
        self._model: str | None = None
        self._asked_model = model
        self._known = False
        self._choices: dict[int, _Choice] = {}

    def learn(self, chunk: Json) -> None:
        """Take id, time and model from a chunk that has them, for the ones before it that don't."""
        if self._id is None:
            self._id = _text(chunk.get("id"))
        if self._created is None:
            self._created = _seconds(chunk.get("created"))
        if self._model is None:
            self._model = _text(chunk.get("model"))

    def mend(self, chunk: Json) -> bool:
        """Mend a chunk in place; say whether anything had to be."""
        changed = self._mend_head(chunk)
        choices = chunk.get("choices")
        if not isinstance(choices, list):
            chunk["choices"] = []
            return True
        for position, choice in enumerate(choices):
            if not isinstance(choice, dict):
                chunk["choices"] = _objects(choices)
                self.mend(chunk)
                return True
            index = choice.get("index")
            if not isinstance(index, int):
                choice["index"] = index = position
                changed = True
            known = self._choices.get(index)
            if known is None:
                known = self._choices[index] = _Choice()
            changed = known.mend(choice) or changed
        return changed

    def unfinished(self, *, usage: Json | None, limit: int | None) -> Iterator[Json]:
        """Yield a last chunk for every choice that never got a finish reason.

        Only for a stream that its sender called whole: then the reason is missing and not the rest of the
        answer. `usage` and `limit` (of tokens, as asked for) tell when it was cut for length.
        """
        cut = len(self._choices) == 1 and _reached(usage, limit)
        for index, choice in sorted(self._choices.items()):
            if not choice.finished:
                choice.finished = True
                reason = "length" if cut else "tool_calls" if choice.calls_tools else "stop"
                yield self.chunk([{"index": index, "delta": {}, "finish_reason": reason}])

    def chunk(self, choices: list[Json], **more: object) -> Json:
        """Make a chunk of our own for this stream."""
        made: Json = {"choices": choices}
        self._mend_head(made)
        return {**made, **more}

    def _mend_head(self, chunk: Json) -> bool:
        if not self._known:
            self.learn(chunk)
            self._id = self._id or _new_id()
            self._created = self._created or int(time.time())
            self._model = self._model or self._asked_model
            self._known = True
        changed = False
        if chunk.get("id") != self._id:
            chunk["id"] = self._id
            changed = True
        if chunk.get("object") != _CHUNK:
            chunk["object"] = _CHUNK
            changed = True
        if chunk.get("created") != self._created:
            chunk["created"] = self._created
            changed = True
        if _text(chunk.get("model")) is None:
            chunk["model"] = self._model
            changed = True
        return changed


def mend_completion(body: Json, *, model: str, limit: int | None) -> bool:
    """Mend a whole completion in place; say whether anything had to be. `choices` must be objects.

    It came whole, so that a missing finish reason is all that is missing. `limit` as in `Mender.unfinished`.
    """
    changed = False
    for key, good, instead in (
        ("id", _text(body.get("id")), _new_id),
        ("created", _seconds(body.get("created")), lambda: int(time.time())),
        ("model", _text(body.get("model")), lambda: model),
    ):
        if good is None:
            body[key] = instead()
            changed = True
        elif good != body[key]:
            body[key] = good
            changed = True
    if body.get("object") != _WHOLE:
        body["object"] = _WHOLE
        changed = True
    cut = len(body["choices"]) == 1 and _reached(body.get("usage"), limit)
    for position, choice in enumerate(body["choices"]):
        if not isinstance(choice.get("index"), int):
            choice["index"] = position
            changed = True
        message = choice.get("message")
        if not isinstance(message, dict):
            choice["message"] = message = {"role": "assistant", "content": None}
            changed = True
        if not message.get("role"):
            message["role"] = "assistant"
            changed = True
        calls = _objects(message.get("tool_calls"))
        for call in calls:
            changed = _complete_call(call) or changed
        if not choice.get("finish_reason"):
            choice["finish_reason"] = "length" if cut else "tool_calls" if calls else "stop"
            changed = True
    return changed


class _Choice:
    """What one choice of a stream has said so far, as far as it must not be said twice."""

    def __init__(self) -> None:
        self.finished = False
        self._has_role = False
        self._calls: dict[int, _Call] = {}
        self._index_of: dict[int, int] = {}
        """The index under which the teacher sends a call → the one the client gets."""

    @property
    def calls_tools(self) -> bool:
        return bool(self._calls)

    def mend(self, choice: Json) -> bool:
        changed = False
        delta = choice.get("delta")
        if not isinstance(delta, dict):
            choice["delta"] = delta = {}
            changed = True
        reason = choice.get("finish_reason")
        if reason:
            self.finished = True
        elif reason == "":
            choice["finish_reason"] = None
            changed = True
        if delta.get("role"):
            if self._has_role:
                del delta["role"]
                changed = True
            self._has_role = True
        if delta.get("tool_calls"):
            for call in _objects(delta["tool_calls"]):
                changed = self._mend_call(call) or changed
        return changed

    def _mend_call(self, call: Json) -> bool:
        function = call.get("function")
        name = _text(function.get("name")) if isinstance(function, dict) else None
        index = self._place(call.get("index"), _text(call.get("id")), name)
        known = self._calls.get(index)
        changed = call.get("index") != index
        call["index"] = index
        if known is None:
            changed = _complete_call(call) or changed
            self._calls[index] = _Call(call["id"], name)
            return changed
        if call.get("id"):
            del call["id"]
            changed = True
        if isinstance(function, dict):
            if name is not None and name == known.name:
                del function["name"]
                changed = True
            known.name = known.name or name
            changed = _arguments_as_text(function) or changed
        return changed

    def _place(self, given: object, id: str | None, name: str | None) -> int:
        """Say which call a delta belongs to, by the index its client gets; an unused one starts a call."""
        unused = max(self._calls, default=-1) + 1
        if isinstance(given, int):
            index = self._index_of.get(given)
            if index is None:
                index = unused if given in self._calls else given
            elif id and name and id != self._calls[index].id:
                # Another call under the same index. An id alone isn't one: vLLM made up one for each delta.
                index = unused
            self._index_of[given] = index
            return index
        # Whoever leaves the index out sends each call whole, or its name or id first.
        for index, call in self._calls.items():
            if id is not None and call.id == id:
                return index
        return unused if id or name or not self._calls else unused - 1


class _Call:
    def __init__(self, id: str, name: str | None) -> None:
        self.id = id
        self.name = name


def _complete_call(call: Json) -> bool:
    """Give a tool call what a client needs to answer it: an id, a type, its arguments as text."""
    changed = False
    if _text(call.get("id")) is None:
        call["id"] = f"call_{secrets.token_hex(12)}"
        changed = True
    function = call.get("function")
    if isinstance(function, dict):
        if not call.get("type"):
            call["type"] = "function"
            changed = True
        changed = _arguments_as_text(function) or changed
    return changed


def _arguments_as_text(function: Json) -> bool:
    if not isinstance(function.get("arguments"), dict | list):
        return False
    function["arguments"] = orjson.dumps(function["arguments"]).decode()
    return True


def _reached(usage: Json | None, limit: int | None) -> bool:
    spent = usage.get("completion_tokens") if isinstance(usage, dict) else None
    return limit is not None and isinstance(spent, int) and spent >= limit


def _objects(value: object) -> list[Json]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def _text(value: object) -> str | None:
    return value if isinstance(value, str) and value else None


def _seconds(value: object) -> int | None:
    """Read a time; 0, as Azure writes it, is none."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e12:
        return None
    return int(value) or None


def _new_id() -> str:
    return f"chatcmpl-{secrets.token_hex(12)}"
