"""What of a student's chunk is an answer: one choice, whose known fields are what OpenAI's reference says they are.

A teacher's oddities pass, since its client knows them. A student answers in its place, so that a client must find
nothing there that breaks it, and a broken server must take neither memory nor the gateway's peace.
"""

from __future__ import annotations

from serving.exchange import Json

_TEXT = (str, type(None))
_OF_A_CHOICE = frozenset({"index", "delta", "logprobs", "finish_reason"})
_OF_A_DELTA = frozenset({"role", "content", "refusal"})
_OF_A_FUNCTION = ("name", "arguments")
_STRUCTURES = (dict, list)
_MOST_CALLS = 1024


def answer_of(choices: object) -> list[Json]:
    """The choices of a chunk with what an answer is made of, as new objects: none, or one.

    Of fields that aren't known here, such as `reasoning_content`, texts and numbers stay and structures don't. Raises
    ValueError, saying what is wrong, for anything that can't be passed on as an answer.
    """
    if choices is None:
        return []
    if not isinstance(choices, list):
        raise ValueError(f"choices that are {_kind(choices)}")
    if len(choices) > 1:
        raise ValueError(f"{len(choices)} choices, of which one was asked for")
    return [_choice(choice) for choice in choices]


def _choice(choice: object) -> Json:
    if not isinstance(choice, dict):
        raise ValueError(f"a choice that is {_kind(choice)}")
    index = choice.get("index")
    if index is not None and (type(index) is not int or index != 0):
        raise ValueError(f"a choice of index {str(index)[:20]!r}, where there is one of index 0")
    _must_be(choice, "finish_reason", _TEXT)
    _must_be(choice, "delta", (dict, type(None)))
    answer: Json = {name: value for name, value in choice.items() if name in _OF_A_CHOICE}
    answer["delta"] = _delta(choice.get("delta") or {})
    return answer


def _delta(delta: Json) -> Json:
    for name in _OF_A_DELTA:
        _must_be(delta, name, _TEXT)
    _must_be(delta, "tool_calls", (list, type(None)))
    plain = _plain(delta)
    if not plain.get("role"):
        plain.pop("role", None)  # some servers name it in the first chunk and leave it empty in the others
    elif plain["role"] != "assistant":
        raise ValueError(f"the role {plain['role'][:20]!r}, where an assistant answers")
    if delta.get("tool_calls"):
        plain["tool_calls"] = [_call(call) for call in delta["tool_calls"]]
    return plain


def _call(call: object) -> Json:
    if not isinstance(call, dict):
        raise ValueError(f"a tool call that is {_kind(call)}")
    for name in ("id", "type"):
        _must_be(call, name, _TEXT)
    index = call.get("index")
    if index is not None and not (type(index) is int and 0 <= index < _MOST_CALLS):
        raise ValueError(f"a tool call of index {str(index)[:20]!r}")
    plain = _plain(call)
    if "function" in call:
        _must_be(call, "function", (dict,))
        function = call["function"]
        _must_be(function, "name", _TEXT)
        _must_be(function, "arguments", (*_TEXT, *_STRUCTURES))
        plain["function"] = {
            name: function[name] for name in _OF_A_FUNCTION if function.get(name) is not None
        }
    return plain


def _plain(fields: Json) -> Json:
    return {name: value for name, value in fields.items() if not isinstance(value, _STRUCTURES)}


def _must_be(fields: Json, name: str, types: tuple[type, ...]) -> None:
    if not isinstance(fields.get(name), types):
        raise ValueError(f"{name} that is {_kind(fields.get(name))}")


def _kind(value: object) -> str:
    return {dict: "an object", list: "a list", str: "a text", bool: "a boolean", type(None): "null"}.get(
        type(value), "a number"
    )
