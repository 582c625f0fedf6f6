"""What a teacher's answer that broke off has used: an estimate, since the usage comes with the end.

A provider bills the prompt and what was generated until the connection closed, and tells nobody how much that was.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import orjson

from serving.assembler import Assembler
from serving.exchange import Json

_CHARACTERS_A_TOKEN = 4
"""OpenAI's rule of thumb for English: https://help.openai.com/en/articles/4936856."""


def unfinished_usage(request: Json, received: Assembler | None) -> Json:
    """Estimate the usage of a request whose answer is incomplete; `received` is what came of it, if it streams.

    A usage that the teacher sent on the way (some servers do with every chunk) is taken before any estimate.
    Images, audio and files in the prompt aren't counted: what they cost can't be told from their size.
    """
    known = received.usage if received is not None and received.usage is not None else {}
    prompt = _count(known, "prompt_tokens") or _tokens(_prompt_characters(request))
    answer = _tokens(sum(map(_answer_characters, received.choices)) if received is not None else 0)
    completion = max(_count(known, "completion_tokens"), answer)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }


def _tokens(characters: int) -> int:
    return math.ceil(characters / _CHARACTERS_A_TOKEN)


def _count(usage: Json, name: str) -> int:
    value = usage.get(name)
    return value if type(value) is int and value > 0 else 0


def _prompt_characters(request: Json) -> int:
    messages = request.get("messages")
    counted = sum(map(_message_characters, messages)) if isinstance(messages, list) else 0
    return counted + sum(
        len(orjson.dumps(request[name])) for name in ("tools", "response_format") if name in request
    )


def _message_characters(message: Json) -> int:
    calls = message.get("tool_calls")
    return sum(map(len, _texts(message.get("content")))) + (len(orjson.dumps(calls)) if calls else 0)


def _texts(content: object) -> Iterable[str]:
    if isinstance(content, str):
        yield content
    for part in content if isinstance(content, list) else ():
        if isinstance(part, dict) and isinstance(part.get("text"), str):
            yield part["text"]


def _answer_characters(choice: Json) -> int:
    """Count what was generated: text, refusal, reasoning where it is shown, and the arguments of calls."""
    message: Json = choice["message"]
    said = sum(len(value) for key, value in message.items() if key != "role" and isinstance(value, str))
    calls = message.get("tool_calls")
    return said + (len(orjson.dumps(calls)) if calls else 0)
