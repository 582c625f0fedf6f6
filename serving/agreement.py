"""When two answers count as the same. The promise is about this and nothing else: in doubt they differ.

Whatever the kind, two answers agree only if they have the same number of choices, and their first choices
the same tool calls (names and canonical arguments, in order), the same refusal, and ended the same way: an
answer cut off at its length never agrees with a whole one.
"""

from __future__ import annotations

import math
import re
import unicodedata
from typing import Protocol

from serving.canonical import canonical, parse
from serving.exchange import Json
from serving.task_settings import AgreementChoice

# Servers differ in what they call an answer that ended by itself (a forced tool call ends with "stop").
_WHOLE = (None, "stop", "tool_calls", "function_call")
_FENCED = re.compile(r"```(?:json)?[ \t]*\n(.*?)\n?[ \t]*```", re.DOTALL | re.IGNORECASE)
_QUANTITY = re.compile(
    r"(?P<before>\D*?)"
    r"(?P<number>[-+]?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?)"
    r"(?P<after>\D*)",
    re.ASCII | re.DOTALL,
)


class Comparison(Protocol):
    """One way of comparing two answers, each given as OpenAI's `choices`. Neither method raises."""

    def agree(self, a: list[Json], b: list[Json]) -> bool:
        """Whether the two answers count as the same. Symmetric, and true of an answer and itself."""
        ...

    def key(self, choices: list[Json]) -> str | None:
        """The answer's normal form: two keys are equal if and only if the answers agree.

        None: the kind has none.
        """
        ...


def comparison(choice: AgreementChoice) -> Comparison:
    """The comparison that a task's settings ask for."""
    match choice.kind:
        case "exact":
            return ExactComparison()
        case "json":
            return JsonComparison()
        case "numeric":
            return NumericComparison(choice.tolerance)


class ExactComparison:
    """The same text, after Unicode NFKC and with white space collapsed. Case, quotes and full stops count.

    The key of an ordinary answer is that text; the key of any other begins with a space, which no such text
    does.
    """

    def agree(self, a: list[Json], b: list[Json]) -> bool:
        """Whether the texts are the same."""
        return self.key(a) == self.key(b)

    def key(self, choices: list[Json]) -> str:
        """The normalised text."""
        return _key(choices, _normal(_text(choices)))


class JsonComparison:
    """The same JSON value, however it is written; a ```json fence around it is taken off.

    What isn't JSON is compared as text and never agrees with what is.
    """

    def agree(self, a: list[Json], b: list[Json]) -> bool:
        """Whether the values are the same."""
        return self.key(a) == self.key(b)

    def key(self, choices: list[Json]) -> str:
        """The canonical JSON text."""
        return _key(choices, _canonical_text(_text(choices)))


class NumericComparison:
    """Numbers that differ by at most `tolerance`, relative to the larger one, with the same words around.

    `$1,234.50` and `1e3 kg` are numbers; commas separate thousands. Any other answer is compared as text.
    """

    def __init__(self, tolerance: float) -> None:
        self._tolerance = tolerance

    def agree(self, a: list[Json], b: list[Json]) -> bool:
        """Whether the numbers are close."""
        if _key(a, "") != _key(b, ""):
            return False
        one, other = _normal(_text(a)), _normal(_text(b))
        first, second = _QUANTITY.fullmatch(one), _QUANTITY.fullmatch(other)
        if first is None or second is None:
            return one == other
        if (first["before"], first["after"]) != (second["before"], second["after"]):
            return False
        x, y = _value(first["number"]), _value(second["number"])
        if math.isinf(x) or math.isinf(y):  # more digits than a float can hold
            return one == other
        return math.isclose(x, y, rel_tol=self._tolerance)

    def key(self, choices: list[Json]) -> None:
        """None: closeness isn't transitive, so there is no normal form."""


def _value(number: str) -> float:
    return float(number.replace(",", ""))


def _message(choices: list[Json]) -> Json:
    message = choices[0].get("message") if choices else None
    return message if isinstance(message, dict) else {}


def _text(choices: list[Json]) -> str:
    """The text of the first choice as it was written; empty if it has none."""
    content = _message(choices).get("content")
    if isinstance(content, list):
        texts = [part.get("text") for part in content if isinstance(part, dict)]
        return "".join(text for text in texts if isinstance(text, str))
    return content if isinstance(content, str) else ""


def _normal(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).split())


def _key(choices: list[Json], content: str) -> str:
    """`content` itself for an ordinary answer: one choice, ended by itself, nothing but text."""
    message = _message(choices)
    finish = choices[0].get("finish_reason") if choices else None
    broken_off = None if finish in _WHOLE else finish
    refusal, audio = message.get("refusal") or None, message.get("audio")
    calls = _calls(message)
    if len(choices) == 1 and not calls and broken_off is None and refusal is None and audio is None:
        return content
    rest: Json = {
        "choices": len(choices),
        "finish": broken_off,
        "refusal": refusal,
        "calls": calls,
        "audio": audio,
    }
    return f" {_safe({**rest, 'content': content})}"


def _calls(message: Json) -> list[Json]:
    listed = message.get("tool_calls")
    calls = [_call(call) for call in listed] if isinstance(listed, list) else []
    if message.get("function_call"):  # the way of calling before there were tools
        calls.append(_call({"function": message["function_call"]}))
    return calls


def _call(call: Json) -> Json:
    match call:
        case {"function": {"name": name, "arguments": str(arguments)}}:
            return {"name": name, "arguments": _canonical_text(arguments)}
        case {"custom": {"name": name, "input": text}}:
            return {"name": name, "input": text}
        case _:
            return {"unknown": call}


def _canonical_text(text: str) -> str:
    """Canonical JSON of `text`. If it isn't JSON, the text, marked so that no JSON looks like it."""
    fenced = _FENCED.fullmatch(text.strip())
    try:
        return canonical(parse(fenced[1] if fenced else text))
    except ValueError:
        return f" text {_normal(text)}"


def _safe(value: Json) -> str:
    try:
        return canonical(value)
    except ValueError:
        return repr(value)
