"""What of a request a student sees, and which requests it can't serve for that.

Chosen per task (`student.sees`), stored in the release, and the same for learning, for redoing past decisions and
for serving:

- `message`: the one user message of a request that has no other turns
- `last`: the last user message, whatever came before it
- `conversation`: all turns of user and assistant, the newest first
"""

from __future__ import annotations

import re
from typing import Literal

from serving.chat import text_of
from serving.exchange import Json

Sees = Literal["message", "last", "conversation"]

SIGHTS: tuple[Sees, ...] = ("message", "last", "conversation")

_SYSTEM_ROLES = ("system", "developer")
_TOOL_ROLES = ("tool", "function")
_MARKS = {"user": "u_", "assistant": "a_"}
_WORD = re.compile(r"\w+")
_FEATURES = frozenset(
    (
        *("tools", "functions", "n", "logprobs", "top_logprobs", "audio", "modalities", "logit_bias"),
        "web_search_options",
    )
)
"""What a request may ask for beside an answer: most ask for nothing of it, which is seen at a glance."""
_EARLIER_CHARACTERS = 1000
"""So much of what came before the last message is seen: more would drown it."""


def unsupported(request: Json, sees: Sees = "message") -> str | None:
    """The first feature of `request` that a student with this sight can't serve, or None.

    It has seen text, behind any instructions; it answers once, with a known answer. `system`: instructions between
    the turns. `prefill`: the answer was begun by the client.
    """
    feature = None if _FEATURES.isdisjoint(request) else _unsupported_feature(request)
    return feature or _unsupported_turns(_turns(request), sees)


def seen_text(request: Json, sees: Sees = "message") -> str:
    """What the student sees of a supported request.

    The last message stands first, as it is. Of a conversation the earlier turns follow, backwards, until 1,000
    characters of them are had; each of their words bears a mark of who said it (`u_`, `a_`), so that it isn't taken
    for one of the last message.
    """
    *earlier, last = _turns(request)
    parts = [text_of(last.get("content")) or ""]
    left = _EARLIER_CHARACTERS if sees == "conversation" else 0
    for turn in reversed(earlier):
        if left <= 0:
            break
        text = (text_of(turn.get("content")) or "")[:left]
        left -= len(text)
        mark = _MARKS[turn["role"]]
        parts.append(" ".join(mark + word for word in _WORD.findall(text)))
    return "\n".join(parts)


def spoken_characters(request: Json) -> int:
    """The length of all turns that are text, seen or not: what the teacher's prompt tokens grow with."""
    return sum(len(text_of(turn.get("content")) or "") for turn in _turns(request))


def _unsupported_feature(request: Json) -> str | None:
    if request.get("tools") or request.get("functions"):
        return "tools"
    if request.get("n") not in (None, 1):
        return "n"
    if request.get("logprobs") or request.get("top_logprobs"):
        return "logprobs"
    if request.get("audio") or request.get("modalities") not in (None, [], ["text"]):
        return "audio"
    if request.get("logit_bias"):
        return "logit_bias"
    if request.get("web_search_options") is not None:
        return "web_search"
    return None


def _turns(request: Json) -> list[Json]:
    """The messages from the first on that isn't an instruction."""
    messages: list[Json] = request.get("messages") or []
    for position, message in enumerate(messages):
        if message.get("role") not in _SYSTEM_ROLES:
            return messages[position:]
    return []


def _unsupported_turns(turns: list[Json], sees: Sees) -> str | None:
    roles = [turn.get("role") for turn in turns]
    if any(role in _SYSTEM_ROLES for role in roles):
        return "system"
    if roles and roles[-1] == "assistant":
        return "prefill"
    if roles and roles[-1] in _TOOL_ROLES:
        return "tools"
    if not roles or roles[-1] != "user" or (sees == "message" and len(turns) > 1):
        return "turns"
    if sees == "conversation":
        for turn in turns[:-1]:
            if turn["role"] in _TOOL_ROLES or turn.get("tool_calls") or turn.get("function_call"):
                return "tools"
            if turn["role"] not in _MARKS:
                return "turns"
            if text_of(turn.get("content")) is None:
                return "content"
    return "content" if text_of(turns[-1].get("content")) is None else None
