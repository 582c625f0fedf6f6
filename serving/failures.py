"""Scripted failures of the stand-in: what goes wrong, on which requests, how often.

A failure is asked for in three ways, the first that applies wins:

1. by one request, in the header `x-stand-in` or in the body's `metadata.stand_in` (which gateways pass on):
   `status=429;retry-after=1`, `stall=2`, `break-after=3`, `status=500;times=2`;
2. by a script, JSONL, one rule a line: the same names with `_`, and on which requests:
   `{"text": "Where is my parcel?", "status": 503}`, `{"every": 10, "break_after": 2}`,
   `{"from": 50, "to": 60, "stall": 5}` (the 50th to the 60th chat request), `{"status": 500, "times": 3}`,
   `{"share": 0.3, "reset_after": 0}` (three in ten), `{"beyond_per_s": 20, "status": 429, "retry_after": 1}`
   (those beyond 20 within one second). Another script can take its place while the stand-in runs:
   `POST /failures` with the new one as its body; an empty body ends them all;
3. by a rate: that share of the requests, drawn with a fixed seed, gets status 500.

What can go wrong:

| name | what the client meets |
|---|---|
| `status` | an error of that status, with `retry-after` if given |
| `stall` | seconds of silence before anything is sent |
| `hang-after` | silence without end after so many chunks of a stream or half of a whole answer; 0: at once |
| `break-after` | the connection ends there; 0: after the head |
| `reset-after` | the connection is reset (RST) there; 0: instead of any answer |
| `drip` | the body comes byte by byte, so many seconds apart |
| `send=truncated` | half of the answer, as if it were whole |
| `send=garbage` | bytes that are no JSON and no events, with status 200 |
| `send=empty` | nothing, with status 200 |
| `send=short-length` | an answer longer than its `content-length` says |
| `send=noise` | bytes that aren't HTTP |
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import orjson

from serving.errors import RecordingError

SENT_INSTEAD = ("truncated", "garbage", "empty", "short-length", "noise")


@dataclass(frozen=True, slots=True)
class Failure:
    """What goes wrong with one answer; the module says what each name means.

    `times`: it is met only so many times (by requests with the same text, or of the same rule), so that a
    retry gets through; None: always.
    """

    status: int | None = None
    retry_after: str | None = None
    stall: float = 0.0
    hang_after: int | None = None
    break_after: int | None = None
    reset_after: int | None = None
    drip: float = 0.0
    send: str | None = None
    times: int | None = None


@dataclass(frozen=True, slots=True)
class Rule:
    """A failure and the requests it is for; every condition must hold.

    They are those of one text, every n-th, a span (counted from 1), a share drawn with a fixed seed, or those
    beyond so many within a second.
    """

    failure: Failure
    text: str | None = None
    every: int | None = None
    start: int | None = None
    end: int | None = None
    share: float | None = None
    beyond_per_s: int | None = None

    def applies(self, number: int, text: str) -> bool:
        """Whether chat request `number`, with this last user message, may be meant."""
        return (
            (self.text is None or self.text == text)
            and (self.every is None or number % self.every == 0)
            and (self.start is None or number >= self.start)
            and (self.end is None or number <= self.end)
        )


class Failures:
    """Draws the failure of each request; keeps count of how often one has been met."""

    def __init__(
        self,
        rules: tuple[Rule, ...] = (),
        *,
        rate: float = 0.0,
        seed: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._rules = rules
        self._rate = rate
        self._random = random.Random(seed)
        self._clock = clock
        self._met: dict[Rule, int] = {}
        self._second: dict[Rule, tuple[int, int]] = {}

    def replace(self, rules: tuple[Rule, ...]) -> None:
        """Let these rules take the place of the script, and end the rate."""
        self._rules, self._rate = rules, 0.0
        self._met, self._second = {}, {}

    def draw(self, number: int, text: str, asked: str | None) -> Failure | None:
        """Return the failure of chat request `number`, or None. `asked` is what the request itself asks for.

        Raises ValueError when `asked` can't be read.
        """
        if asked is not None:
            failure = parse_failure(asked)
            return failure if self._due(Rule(failure, text)) else None
        for rule in self._rules:
            if rule.applies(number, text) and self._drawn(rule) and self._due(rule):
                return rule.failure
        if self._rate and self._random.random() < self._rate:
            return Failure(status=500)
        return None

    def _drawn(self, rule: Rule) -> bool:
        if rule.share is not None and self._random.random() >= rule.share:
            return False
        if rule.beyond_per_s is None:
            return True
        now = int(self._clock())
        second, seen = self._second.get(rule, (now, 0))
        seen = seen + 1 if second == now else 1
        self._second[rule] = (now, seen)
        return seen > rule.beyond_per_s

    def _due(self, rule: Rule) -> bool:
        if rule.failure.times is None:
            return True
        met = self._met.get(rule, 0)
        self._met[rule] = met + 1
        return met < rule.failure.times


def parse_failure(asked: str) -> Failure:
    """Read `status=429;retry-after=1`. Raises ValueError naming what it doesn't know."""
    fields: dict[str, object] = {}
    for part in asked.split(";"):
        name, _, value = part.strip().partition("=")
        fields[name.strip().replace("-", "_")] = value.strip()
    return _failure(fields)


def read_script(path: Path) -> tuple[Rule, ...]:
    """Read a script of failures. Raises RecordingError, which names file and line."""
    try:
        script = path.read_bytes()
    except OSError as error:
        raise RecordingError(f"{path} can't be read: {error.strerror or error}") from error
    try:
        return parse_script(script)
    except ValueError as error:
        raise RecordingError(f"{path}, {error}") from error


def parse_script(script: bytes) -> tuple[Rule, ...]:
    """Read the rules of a script, one a line. Raises ValueError, which names the line."""
    rules = []
    for number, line in enumerate(script.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            rules.append(_rule(orjson.loads(line)))
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from error
    return tuple(rules)


def _rule(fields: object) -> Rule:
    if not isinstance(fields, dict):
        raise ValueError('expected a JSON object such as {"every": 10, "status": 503}')
    text = fields.pop("text", None)
    if text is not None and not isinstance(text, str):
        raise ValueError(f"`text` must be a string, got {text!r}")
    every, start, end, beyond = (
        _count(name, fields.pop(name, None), least=least)
        for name, least in (("every", 1), ("from", 1), ("to", 1), ("beyond_per_s", 0))
    )
    share = None
    if "share" in fields:
        share = _number("share", fields.pop("share"), most=1.0, what="a number")
    return Rule(_failure(fields), text, every, start, end, share, beyond)


def _failure(fields: Mapping[str, object]) -> Failure:
    known = (
        *("status", "retry_after", "stall", "hang_after", "break_after", "reset_after", "drip", "send"),
        "times",
    )
    for name in fields:
        if name not in known:
            raise ValueError(f"unknown failure {name!r}; known: {', '.join(known)}")
    status = _count("status", fields.get("status"), least=400)
    if status is not None and status > 599:
        raise ValueError(f"`status` must be 400 to 599, got {status}")
    send = fields.get("send")
    if send is not None and send not in SENT_INSTEAD:
        raise ValueError(f"`send` must be one of {', '.join(SENT_INSTEAD)}, got {send!r}")
    retry_after = fields.get("retry_after")
    failure = Failure(
        status=status,
        retry_after=None if retry_after is None else str(retry_after),
        stall=_number("stall", fields.get("stall", 0.0), most=3600.0, what="seconds"),
        hang_after=_count("hang_after", fields.get("hang_after"), least=0),
        break_after=_count("break_after", fields.get("break_after"), least=0),
        reset_after=_count("reset_after", fields.get("reset_after"), least=0),
        drip=_number("drip", fields.get("drip", 0.0), most=60.0, what="seconds"),
        send=None if send is None else str(send),
        times=_count("times", fields.get("times"), least=1),
    )
    if failure == Failure(retry_after=failure.retry_after, times=failure.times):
        raise ValueError(
            "no failure named; give `status`, `stall`, `hang_after`, `break_after`, `reset_after`, `drip` or `send`"
        )
    return failure


def _number(name: str, value: object, *, most: float, what: str) -> float:
    try:
        number = float(value) if isinstance(value, str | int | float) else -1.0
    except ValueError:
        number = -1.0
    if not 0 <= number <= most:
        raise ValueError(f"`{name}` must be {what}, 0 to {most:g}, got {value!r}")
    return number


def _count(name: str, value: object, *, least: int) -> int | None:
    if value is None:
        return None
    try:
        number = int(value) if isinstance(value, str | int) else least - 1
    except ValueError:
        number = least - 1
    if number < least:
        raise ValueError(f"`{name}` must be a whole number, at least {least}, got {value!r}")
    return number
