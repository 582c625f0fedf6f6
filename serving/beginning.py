"""Whether an answer that isn't whole yet may become one that a rule is about. In doubt it may.

Rules name answers by their keys (`serving.agreement`), which are normal forms: of JSON they hold neither the order in
which it is written nor its escapes, nor a fence around it.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterator

from serving.exchange import Json

_NO_JSON = " text "
_FENCE = re.compile(r"\s*```[^\n`]*\n")
_STRING = re.compile(r'"((?:[^"\\]|\\.)*+)("?)', re.DOTALL)
_HALF_AN_ESCAPE = re.compile(r"(?:\\u[0-9a-fA-F]{0,3}|\\)$")
_HALF_A_PAIR = re.compile("[\ud800-\udbff]$")
_OPENINGS = ((dict, "{"), (list, "["), (str, '"'))


def begun(choices: list[Json], spelled: int) -> str:
    """The text of an answer up to a point by which its tokens spell so many bytes, whatever has come beyond."""
    content = choices[0]["message"].get("content") if choices else None
    text = content if isinstance(content, str) else ""
    return text.encode("utf-8", "replace")[:spelled].decode("utf-8", "ignore")


def may_become(said: str, key: str) -> bool:
    """Whether an answer that begins with the text `said` may have this key in the end.

    White space doesn't count. Of JSON every text that was said, field names included, must be one of the key's, the
    last as far as it has come; numbers and the order aren't looked at.
    """
    text = _text_of(key)
    return _squashed(text).startswith(_settled(_squashed(said))) or _may_become_json(said, text)


def _text_of(key: str) -> str:
    """The text of the answer that has this key, or its canonical JSON."""
    if key.startswith(" {"):  # one that was cut off, calls tools, or the like
        found = _json(key)
        key = str(found.get("content") or "") if isinstance(found, dict) else key
    return key.removeprefix(_NO_JSON)


def _squashed(text: str) -> str:
    return "".join(unicodedata.normalize("NFKC", text).split())


def _settled(begun: str) -> str:
    """Without the last character, which may yet be joined with what comes next."""
    end = len(begun) - 1
    while end > 0 and unicodedata.combining(begun[end]):
        end -= 1
    return begun[: max(end, 0)]


def _may_become_json(said: str, text: str) -> bool:
    if not text.startswith(("{", "[", '"')):
        return False
    value = _json(text)
    opening = next((opening for kind, opening in _OPENINGS if isinstance(value, kind)), None)
    if opening is None:
        return False
    begun = _FENCE.sub("", said, count=1).lstrip()
    if not begun or begun.startswith("`"):
        return True
    return begun.startswith(opening) and _spells(begun, frozenset(_texts(value)))


def _spells(begun: str, texts: frozenset[str]) -> bool:
    for found in _STRING.finditer(begun):
        body, closed = found.groups()
        read = _json(f'"{body if closed else _HALF_AN_ESCAPE.sub("", body)}"')
        if not isinstance(read, str):
            continue
        if closed and read not in texts:
            return False
        if not closed and not any(text.startswith(_HALF_A_PAIR.sub("", read)) for text in texts):
            return False
    return True


def _texts(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for name, item in value.items():
            yield name
            yield from _texts(item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)


def _json(text: str) -> Json | list[object] | str | None:
    try:
        found: Json | list[object] | str | None = json.loads(text, strict=False)
    except (ValueError, RecursionError):
        return None
    return found
