"""Redaction: what must not reach the disk is replaced by the name of its kind before anything is written.

`[log].redact` lists kinds. Five are built in; any other is a name and a regular expression, `name:pattern`:

    redact = ["email", "card", "ticket:TCK-[0-9]{6}"]        # → [email], [card], [ticket]

The student sees what the log holds: a request is redacted before the student reads it, so that what it was trained on
and what it is asked are the same. Every string of a request and of its answers is searched, names of fields in them
included, and whole numbers with them; strings that hold JSON (the arguments of tool calls) by what they say, however
they are escaped. Text that is told in pieces (tokens with their log-probabilities) is searched as a whole.
"""

from __future__ import annotations

import operator
import re
import string
from bisect import bisect_right
from collections.abc import Callable, Sequence
from ipaddress import ip_address
from itertools import accumulate
from typing import Any

import orjson

from serving.exchange import Json

_NAMED = re.compile(r"([a-z][a-z0-9_-]{0,31}):(.+)", re.S)
_SMALLEST_NUMBER = 10**6
"""From here on a number may say who somebody is; smaller ones are counts and settings."""
_MOST_ROUNDS = 8
_API_WORDS = {
    "role": {"system", "developer", "user", "assistant", "tool", "function"},
    "type": {"text", "image_url", "input_audio", "file", "refusal", "function", "json_object", "json_schema"},
    "finish_reason": {"stop", "length", "tool_calls", "content_filter", "function_call"},
}
"""Words of the API itself: without them a request couldn't be read any more."""


Span = tuple[int, int]

# How many characters an account number has, by country (SWIFT's registry, ISO 13616).
_IBAN_LENGTHS = {
    length: countries.split()
    for length, countries in {
        15: "NO",
        16: "BE",
        18: "DK FI FO GL NL SD",
        19: "MK SI",
        20: "AT BA EE KZ LT LU MN XK",
        21: "CH CR HR LI LV",
        22: "BG BH DE GB GE IE ME RS VA",
        23: "AE GI IL IQ OM SO TL",
        24: "AD CZ ES MD PK RO SA SE SK TN VG",
        25: "LY PT ST",
        26: "IS TR",
        27: "BI DJ FR GR IT MC MR SM",
        28: "AL AZ BY CY DO GT HU LB NI PL SV",
        29: "BR EG PS QA UA",
        30: "JO KW MU",
        31: "MT SC",
        32: "LC",
        33: "RU",
    }.items()
}
_IBAN_LENGTH = {country: length for length, countries in _IBAN_LENGTHS.items() for country in countries}
_IBAN_START = re.compile(r"(?<![A-Za-z0-9])([A-Za-z]{2})\d\d")
# Cheap to look for, and in every one of its kind.
_SOME_OF_A_PHONE = re.compile(r"\d(?:[ ./()-]{0,2}\d){5}")
_SOME_OF_AN_IBAN = re.compile(r"\d\d(?: ?[A-Za-z0-9]){11}")
_SOME_OF_AN_IP = re.compile(r"\d\.\d|:[0-9A-Fa-f]{0,4}:")
_GROUPS = re.compile(r"(?<!\d)(?<!\d\.)\d{3,19}(?!\d)(?:[ -]\d{3,19}(?!\d))*")
_GROUP = re.compile(r"\d+")
_MOST_GROUPS = 6
_DIGIT_VALUES = bytes.maketrans(b"0123456789", bytes(range(10)))
_DOUBLED = bytes.maketrans(bytes(range(10)), bytes([0, 2, 4, 6, 8, 1, 3, 5, 7, 9]))
# The beginnings and lengths of the card networks' numbers.
_CARD = re.compile(
    r"4\d{12}(?:\d{3}){0,2}|(?:5[1-5]|2[2-7])\d{14}|3[47]\d{13}|3[0689]\d{12}|35\d{14,17}|(?:5[06-8]|6\d)\d{10,17}"
)
# The mailbox is looked for from its beginning only: from each of its letters would take the square of its length.
_EMAIL = re.compile(
    r"(?<![^\s@<>()\[\],;:\"'\\])[^\s@<>()\[\],;:\"'\\]++@(?:[^\W_](?:[\w-]{0,61}[^\W_])?\.)+[^\W\d_]{2,24}"
)
_IP = re.compile(
    r"(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?!\w|\.\d)|(?<![\w:.])(?:[0-9A-Fa-f]{0,4}:){2,7}[0-9A-Fa-f]{0,4}(?![\w:])"
)
# With a country's code; or with an area's, in brackets or set off by the usual signs.
_PHONE = re.compile(
    r"(?<![\w+])(?:\+|00)[1-9](?:[ ./()-]{0,2}\d){6,14}(?!\d)"
    r"|(?<!\w)\(0?\d{2,5}\)[ ./-]?\d(?:[ ./-]?\d){4,9}(?!\d)"
    r"|(?<![\w.-])0\d{1,4}[ /.-]\d(?:[ /.-]?\d){4,9}(?![\w-])"
    r"|(?<![\w.-])\d{3}[ .-]\d{3}[ .-]\d{4}(?![\w-])"
)


def _emails(text: str) -> list[Span]:
    return [found.span() for found in _EMAIL.finditer(text)] if "@" in text else []


def _ips(text: str) -> list[Span]:
    if _SOME_OF_AN_IP.search(text) is None:
        return []
    return [found.span() for found in _IP.finditer(text) if _is_address(found[0])]


def _phones(text: str) -> list[Span]:
    return [found.span() for found in _PHONE.finditer(text)] if _SOME_OF_A_PHONE.search(text) else []


def _cards(text: str) -> list[Span]:
    """Payment cards: in groups of three digits or more, or in one, with a right check digit."""
    spans: list[Span] = []
    for run in _GROUPS.finditer(text):
        groups = [group.span() for group in _GROUP.finditer(text, *run.span())]
        first = 0
        while first < len(groups):
            last = _last_of_card(text, groups, first)
            if last is not None:
                spans.append((groups[first][0], groups[last][1]))
            first = first + 1 if last is None else last + 1
    return spans


def _last_of_card(text: str, groups: list[Span], first: int) -> int | None:
    """The last group of the longest card's number that begins with the group `first`."""
    found, digits = None, ""
    for position in range(first, min(first + _MOST_GROUPS, len(groups))):
        digits += text[groups[position][0] : groups[position][1]]
        if _is_card(digits):
            found = position
    return found


def _ibans(text: str) -> list[Span]:
    """Account numbers: as long as their country's are, in groups or not, with right check digits."""
    if _SOME_OF_AN_IBAN.search(text) is None:
        return []
    spans = []
    for start in _IBAN_START.finditer(text):
        end = _end_of_iban(text, start.start(), _IBAN_LENGTH.get(start[1].upper(), 0))
        if end is not None:
            spans.append((start.start(), end))
    return spans


def _end_of_iban(text: str, start: int, length: int) -> int | None:
    characters, position = "", start
    while position < len(text) and len(characters) < length:
        if text[position] in _ALPHANUMERIC:
            characters += text[position]
        elif text[position] != " " or text[position - 1] == " ":
            return None
        position += 1
    whole = len(characters) == length > 0
    ends = position == len(text) or text[position] not in _ALPHANUMERIC
    return position if whole and ends and _passes_mod_97(characters) else None


_ALPHANUMERIC = string.ascii_letters + string.digits


def _is_card(digits: str) -> bool:
    """Whether a network has such numbers, and the check digit is right (ISO/IEC 7812-1)."""
    if _CARD.fullmatch(digits) is None:
        return False
    values = digits.encode().translate(_DIGIT_VALUES)
    return (sum(values[-1::-2]) + sum(values[-2::-2].translate(_DOUBLED))) % 10 == 0


def _passes_mod_97(characters: str) -> bool:
    """The check digits of account numbers (ISO 7064)."""
    return int("".join(str(int(character, 36)) for character in characters[4:] + characters[:4])) % 97 == 1


def _is_address(text: str) -> bool:
    try:
        ip_address(text)
    except ValueError:
        return False
    return True


_BUILT_IN: dict[str, Callable[[str], list[Span]]] = {
    # The stricter ones first: a card's or an account's number could be read as a telephone number.
    "email": _emails,
    "iban": _ibans,
    "card": _cards,
    "ip": _ips,
    "phone": _phones,
}


def parse_kinds(kinds: Sequence[str]) -> dict[str, str | None]:
    """Read `[log].redact`: built-in kinds, and names with their patterns.

    Raises ValueError, with what is wrong, for anything else.
    """
    parsed: dict[str, str | None] = {}
    for kind in kinds:
        name, pattern = _parse(kind)
        if name in parsed:
            raise ValueError(f"{name} is there twice; give each pattern a name of its own")
        parsed[name] = pattern
    for name, pattern in parsed.items():
        for mark in parsed:
            if pattern is not None and re.search(pattern, f"[{mark}]") is not None:
                raise ValueError(
                    f"the pattern of {name} finds [{mark}], which takes the place of what was found"
                )
    return parsed


def _parse(kind: str) -> tuple[str, str | None]:
    if kind in _BUILT_IN:
        return kind, None
    named = _NAMED.fullmatch(kind)
    if named is None:
        raise ValueError(f"{kind!r} is neither one of {', '.join(_BUILT_IN)} nor name:pattern")
    name, pattern = named[1], named[2]
    if name in _BUILT_IN:
        raise ValueError(f"{name} is built in; give your own pattern another name")
    try:
        empty = re.compile(pattern).search("") is not None
    except re.error as error:
        raise ValueError(f"the pattern of {name} should be a regular expression: {error}") from None
    if empty:
        raise ValueError(f"the pattern of {name} finds an empty text, so it would be found everywhere")
    return name, pattern


class Redactor:
    """Replaces what is of the configured kinds (see `parse_kinds`). Immutable."""

    def __init__(self, kinds: Sequence[str]) -> None:
        parsed = parse_kinds(kinds)
        self._finders: list[tuple[str, Callable[[str], list[Span]]]] = [
            (f"[{name}]", _finder(re.compile(pattern)))
            for name, pattern in parsed.items()
            if pattern is not None
        ]
        self._finders += [(f"[{name}]", find) for name, find in _BUILT_IN.items() if name in parsed]

    def text(self, text: str) -> str:
        """The text without what is to be replaced; the same object if there is nothing."""
        for _ in range(_MOST_ROUNDS):
            before = text
            for mark, find in self._finders:
                spans = find(text)
                if spans:
                    text = _replaced(text, spans, mark)
            if text == before:
                return text
        # Made to be found again and again: nothing of it is worth keeping.
        return self._finders[0][0]

    def value(self, value: Any, key: str | None = None) -> Any:
        """A JSON value without what is to be replaced; the same object if there is nothing. `key`: its name."""
        match value:
            case str():
                return value if value in _API_WORDS.get(key or "", ()) else self._string(value)
            case dict():
                return self._object(value)
            case list():
                items = [self.value(item, key) for item in value]
                return value if all(map(operator.is_, items, value)) else items
            case int() if abs(value) >= _SMALLEST_NUMBER:
                said = self.text(str(value))
                return value if said == str(value) else said
        return value

    def event(self, event: Json) -> Json:
        """An event of the log as it may be written. Which of its parts were changed stands in `redacted`.

        Raises ValueError for one that is nested too deeply to be searched.
        """
        try:
            return self._event(event)
        except RecursionError:
            raise ValueError(f"event {event.get('id')!r} is nested too deeply to be redacted") from None

    def _event(self, event: Json) -> Json:
        changed: dict[str, Any] = {}
        for part in ("request", "request_id", "requested", "teacher", "student"):
            before = event.get(part)
            after: Any = before
            if part in ("teacher", "student") and isinstance(before, dict):
                choices = self.value(before["choices"])
                after = before if choices is before["choices"] else {**before, "choices": choices}
            elif before is not None:
                after = self.value(before)
            if after is not before:
                changed[part] = after
        if not changed:
            return event
        return {**event, **changed, "redacted": sorted({*event.get("redacted", ()), *changed})}

    def _string(self, text: str) -> str:
        if ("\\" in text or '"token"' in text) and text.lstrip()[:1] in ("{", "["):
            # JSON in a string: what is escaped in there, or told in tokens, doesn't look like what it says.
            try:
                said = orjson.loads(text)
                redacted = self.value(said)
                if redacted is not said:
                    text = orjson.dumps(redacted).decode()
            except orjson.JSONDecodeError:
                pass  # no JSON
            except (RecursionError, TypeError):
                return self._finders[0][0]  # nested too deeply to be searched, or to be written again
        return self.text(text)

    def _object(self, value: Json) -> Json:
        changed = False
        redacted: Json = {}
        for key, item in value.items():
            if key in ("content", "refusal") and _are_tokens(item):
                new: Any = self._tokens(item)
            else:
                new = self.value(item, key)
            name = self.text(key)
            while name in redacted:
                name += "_"  # two fields whose names say the same now
            changed = changed or new is not item or name != key
            redacted[name] = new
        if redacted.get("token") != value.get("token") and "bytes" in redacted:
            redacted["bytes"] = None  # they spell the token
        return redacted if changed else value

    def _tokens(self, tokens: list[Json]) -> list[Json]:
        """Tokens with their log-probabilities: what is found in all of them together goes from each it touches.

        The first of those says what was found, the others nothing; alternatives to them are left out.
        """
        redacted = [self._object(token) for token in tokens]
        for _ in range(_MOST_ROUNDS):
            texts = [token["token"] for token in redacted]
            mark, spans = self._found("".join(texts))
            if not spans:
                return redacted if any(map(operator.is_not, redacted, tokens)) else tokens
            ends = list(accumulate(map(len, texts)))
            for start, end in spans:
                first = i = bisect_right(ends, start)
                while i < len(ends) and ends[i] - len(texts[i]) < end:
                    redacted[i] = _blanked(redacted[i], mark if i == first else "")
                    i += 1
        return [_blanked(token, "") for token in redacted]

    def _found(self, text: str) -> tuple[str, list[Span]]:
        """What is found first in the order of the kinds, and by which mark it is to be replaced."""
        for mark, find in self._finders:
            spans = find(text)
            if spans:
                return mark, spans
        return "", []


def _replaced(text: str, spans: list[Span], mark: str) -> str:
    """Put the mark in the place of each span; of those that overlap only one."""
    parts: list[str] = []
    at = 0
    for start, end in spans:
        if start >= at:
            parts += [text[at:start], mark]
        at = max(at, end)
    return "".join([*parts, text[at:]])


def _blanked(token: Json, text: str) -> Json:
    emptied: Json = {name: empty for name, empty in (("bytes", None), ("top_logprobs", [])) if name in token}
    return {**token, "token": text, **emptied}


def _are_tokens(value: object) -> bool:
    return (
        isinstance(value, list)
        and len(value) > 0
        and all(isinstance(item, dict) and isinstance(item.get("token"), str) for item in value)
    )


def _finder(pattern: re.Pattern[str]) -> Callable[[str], list[Span]]:
    return lambda text: [found.span() for found in pattern.finditer(text) if found.end() > found.start()]
