"""From a stream of chunks back to the whole answer."""

from __future__ import annotations

from typing import Any

from serving.exchange import Json

_KNOWN = frozenset(
    {
        "id",
        "object",
        "created",
        "model",
        "choices",
        "usage",
        "service_tier",
        "system_fingerprint",
        "obfuscation",
    }
)
"""Fields of a chunk that need no keeping: they are read, or (`obfuscation`) pad this one chunk to an even length."""


class Assembler:
    """Puts `chat.completion.chunk` objects together again: the inverse of `serving.chat.chunks`.

    Strings of a delta are appended, lists extended, objects merged; tool calls are merged by their `index`.
    What isn't shaped like a chunk is ignored: providers send keep-alives and annotations of their own in
    between.
    """

    def __init__(self) -> None:
        self.id: str | None = None
        self.created: int | None = None
        self.model: str | None = None
        self.system_fingerprint: str | None = None
        self.service_tier: str | None = None
        self.usage: Json | None = None
        self._more: Json = {}
        self._choices: dict[int, _Choice] = {}

    def add(self, chunk: Json) -> None:
        """Take the next chunk. It is not kept and not changed."""
        if self.id is None and isinstance(chunk.get("id"), str):
            self.id = chunk["id"]
        if self.created is None and isinstance(chunk.get("created"), int):
            self.created = chunk["created"]
        if not self.model and isinstance(chunk.get("model"), str):
            self.model = chunk["model"] or None
        if isinstance(chunk.get("system_fingerprint"), str):
            self.system_fingerprint = chunk["system_fingerprint"]
        if isinstance(chunk.get("service_tier"), str):
            self.service_tier = chunk["service_tier"]
        if isinstance(chunk.get("usage"), dict):
            self.usage = chunk["usage"]
        for key, value in chunk.items():
            if key not in _KNOWN and (value is not None or key not in self._more):
                self._more[key] = value
        choices = chunk.get("choices")
        for part in choices if isinstance(choices, list) else ():
            if isinstance(part, dict):
                index = part.get("index")
                at = index if isinstance(index, int) else 0
                self._choices.setdefault(at, _Choice(at)).add(part)

    def completion(self, *, id: str, created: int) -> Json:
        """The whole `chat.completion` so far; `id` and `created` are for streams that had none.

        Fields of the chunks that aren't known here are kept, with the value they had last.
        """
        whole: Json = {
            "id": self.id or id,
            "object": "chat.completion",
            "created": created if self.created is None else self.created,
            "model": self.model,
            "choices": self.choices,
            **self._more,
        }
        told = {
            "usage": self.usage,
            "service_tier": self.service_tier,
            "system_fingerprint": self.system_fingerprint,
        }
        return whole | {key: value for key, value in told.items() if value is not None}

    @property
    def choices(self) -> list[Json]:
        """The choices so far, whole, in the order of their index."""
        return [self._choices[index].whole() for index in sorted(self._choices)]

    @property
    def finished(self) -> bool:
        """Whether there is an answer and every choice of it has its finish reason."""
        return bool(self._choices) and all(
            choice.finish_reason is not None for choice in self._choices.values()
        )


class _Choice:
    def __init__(self, index: int) -> None:
        self.index = index
        self.finish_reason: str | None = None
        self._message: dict[str, Any] = {}
        self._tool_calls: dict[int, dict[str, Any]] | None = None
        self._logprobs: dict[str, Any] | None = None
        self._more: Json = {}

    def add(self, part: Json) -> None:
        delta = part.get("delta")
        for key, value in (delta if isinstance(delta, dict) else {}).items():
            if key == "tool_calls":
                self._add_tool_calls(value)
            elif key == "role":
                if not self._message.get("role"):
                    self._message["role"] = value
            else:
                _append(self._message, key, value)
        for key, value in part.items():
            if key == "logprobs":
                self._add_logprobs(value)
            elif key == "finish_reason":
                self.finish_reason = value or self.finish_reason
            elif key not in ("index", "delta") and (value is not None or key not in self._more):
                self._more[key] = value

    def _add_logprobs(self, value: object) -> None:
        if value is None:
            self._more.setdefault("logprobs", None)
        elif isinstance(value, dict):
            self._logprobs = {} if self._logprobs is None else self._logprobs
            for key, entries in value.items():
                _append(self._logprobs, key, entries)

    def _add_tool_calls(self, calls: object) -> None:
        if not isinstance(calls, list) or not calls:
            self._message.setdefault("tool_calls", calls)
            return
        slots = self._tool_calls = {} if self._tool_calls is None else self._tool_calls
        for call in calls:
            if not isinstance(call, dict):
                continue
            index = call.get("index")
            if not isinstance(index, int):
                # Some providers leave the index out and send each call whole: an id then starts a new one.
                index = len(slots) if call.get("id") or not slots else max(slots)
            slot = slots.setdefault(index, {})
            for key, value in call.items():
                if key in ("id", "type"):
                    slot[key] = slot.get(key) or value
                elif key in ("function", "custom") and isinstance(value, dict):
                    inner = slot.setdefault(key, {})
                    for name, text in value.items():
                        # A name comes whole; providers that repeat it exist, ones that split it are not
                        # known.
                        if name == "name":
                            inner[name] = inner.get(name) or text
                        else:
                            _append(inner, name, text)
                elif key != "index":
                    _append(slot, key, value)

    def whole(self) -> Json:
        message = {"role": "assistant", "content": None, **_joined(self._message)}
        if self._tool_calls is not None:
            message["tool_calls"] = [_joined(self._tool_calls[index]) for index in sorted(self._tool_calls)]
        choice = {"index": self.index, "message": message, "finish_reason": self.finish_reason, **self._more}
        if self._logprobs is not None:
            choice["logprobs"] = _joined(self._logprobs)
        return choice


class _Text(list[str]):
    """A string in pieces: appending to a string of n characters n times would cost n² in the end."""


def _append(into: dict[str, Any], key: str, value: Any) -> None:
    known = into.get(key)
    match value:
        case str():
            if isinstance(known, _Text):
                known.append(value)
            else:
                into[key] = _Text([value])
        case list():
            if isinstance(known, list) and not isinstance(known, _Text):
                known.extend(value)
            else:
                into[key] = list(value)
        case dict():
            inner = known if isinstance(known, dict) else into.setdefault(key, {})
            if not isinstance(inner, dict):
                inner = into[key] = {}
            for name, item in value.items():
                _append(inner, name, item)
        case None:
            into.setdefault(key, None)
        case _:
            into[key] = value


def _joined(value: Any) -> Any:
    match value:
        case _Text():
            return "".join(value)
        case dict():
            return {key: _joined(item) for key, item in value.items()}
        case _:
            return value
