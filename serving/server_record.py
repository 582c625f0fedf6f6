"""What a server was seen to give and to refuse, by asking it: servers of the same API differ, and none says so before.

What is optional and refused by name is left out from then on; a feature of requests that is refused by name isn't asked
for again for a while, so that the teacher answers at once. Nothing is assumed of a server by its kind or version.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from serving.errors import UpstreamRefused
from serving.exchange import Json

_REFUSALS = frozenset({400, 403, 404, 422, 501})
_AGAIN_AFTER_S = 300.0
_NAMES: Mapping[str, tuple[str, ...]] = {
    "tools": ("tool",),
    "response_format": (
        "response_format",
        "response format",
        "json_schema",
        "json_object",
        "structured output",
    ),
    "parallel_tool_calls": ("parallel_tool_calls", "parallel tool calls"),
    "frequency_penalty": ("frequency_penalty", "frequency penalty"),
    "presence_penalty": ("presence_penalty", "presence penalty"),
    "stop": ("`stop`", "'stop'", '"stop"', "stop sequence"),
    "seed": ("seed",),
}
"""By what a refusal names each field of a request that its client may have set."""
_CHOICES = (None, "auto", "none", "required")
_FORMS = ("text", "json_object", "json_schema")


@dataclass(frozen=True, slots=True)
class Asking:
    """With which optional fields a server is asked, and by which name it is told the `limit` of an answer's length.

    They are log-probabilities, the `alternatives` of each token, and the `usage` of a stream.
    """

    logprobs: bool = True
    alternatives: bool = True
    usage: bool = True
    limit: str = "max_tokens"

    def instead(self, error: UpstreamRefused) -> Asking | None:
        """How to ask instead, if the server may have refused one of these; None: it was something else."""
        if error.status not in _REFUSALS:
            return None
        said = error.body.lower()
        if self.usage and b"stream_options" in said:
            return replace(self, usage=False)
        if self.limit == "max_tokens" and b"max_completion_tokens" in said:
            return replace(self, limit="max_completion_tokens")
        if self.logprobs and b"logprobs" in said:
            too_many = self.alternatives and (b"top_logprobs" in said or b"max" in said)
            return replace(self, alternatives=False) if too_many else replace(self, logprobs=False)
        return None


@dataclass(frozen=True, slots=True)
class Seen:
    """What an answer held: None where nothing could be seen of it yet.

    `alternatives` is how many of a token came at most; `model` the name that the server gave the model; `streamed`
    whether the answer came as the stream that was asked for.
    """

    logprobs: bool | None = None
    alternatives: int = 0
    usage: bool | None = None
    model: str | None = None
    streamed: bool | None = None


class ServerRecord:
    """The record of one model at its server, as one student has met it."""

    def __init__(self, asking: Asking | None = None, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.asking = asking or Asking()
        self.seen = Seen()
        self._clock = clock
        self._refused: dict[str, float] = {}

    def refuse(self, request: Json, error: UpstreamRefused) -> None:
        """Take note of a refusal, if it names something that the request asks for."""
        if error.status not in _REFUSALS:
            return
        said = error.body.decode("utf-8", "replace").lower()
        for name, feature in _features(request).items():
            if any(word in said for word in _NAMES[name]):
                self._refused[feature] = self._clock()

    def refuses(self, request: Json) -> bool:
        """Say whether something that the request asks for was refused a short while ago."""
        if not self._refused:
            return False
        now = self._clock()
        refused = {feature for feature, at in self._refused.items() if now - at < _AGAIN_AFTER_S}
        return not refused.isdisjoint(_features(request).values())

    @property
    def refused(self) -> frozenset[str]:
        """The features that were refused, whenever that was."""
        return frozenset(self._refused)


def _features(request: Json) -> dict[str, str]:
    """What a request asks for, by field: each with what of the field's value servers tell apart."""
    found = {name: name for name in _NAMES if request.get(name) not in (None, [], {})}
    if "tools" in found:
        choice = request.get("tool_choice")
        found["tools"] = f"tools:{choice or 'auto' if choice in _CHOICES else 'named'}"
    form = request.get("response_format")
    if "response_format" in found:
        kind = form.get("type") if isinstance(form, dict) else None
        found["response_format"] = f"response_format:{kind if kind in _FORMS else 'other'}"
    return found
