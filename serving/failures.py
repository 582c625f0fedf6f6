"""Scripted failures of the stand-in: what goes wrong, on which requests, how often.

A failure is asked for in three ways, the first that applies wins:

1. by one request, in the header `x-stand-in` or in the body's `metadata.stand_in` (which gateways pass on):
   `status=429;retry-after=1`, `stall=2`, `break-after=3`, `status=500;times=2`;
2. by a script, JSONL, one rule a line: the same names with `_`, and on which requests:
   `{"text": "Where is my parcel?", "status": 503}`, `{"every": 10, "break_after": 2}`,
   `{"from": 50, "to": 60, "stall": 5}` (the 50th to the 60th chat request), `{"status": 500, "times": 3}`;
3. by a rate: that share of the requests, drawn with a fixed seed, gets status 500.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import orjson

from serving.errors import RecordingError


@dataclass(frozen=True, slots=True)
class Failure:
    """What goes wrong with one answer.

    `status`: an error of that status instead of the answer, with `retry-after: retry_after` when given.
    `stall`: seconds of silence before anything is sent. `break_after`: the connection is cut after that many
    chunks of a stream, or after half of the body of a whole answer. `times`: it is met only so many times (by
    requests with the same text, or of the same rule), so that a retry gets through; None: always.
    """

    status: int | None = None
    retry_after: str | None = None
    stall: float = 0.0
    break_after: int | None = None
    times: int | None = None


@dataclass(frozen=True, slots=True)
class Rule:
    """A failure and the requests it is for: those of one text, every n-th, or a span (counted from 1)."""

    failure: Failure
    text: str | None = None
    every: int | None = None
    start: int | None = None
    end: int | None = None

    def applies(self, number: int, text: str) -> bool:
        """Whether chat request `number`, with this last user message, is meant."""
        return (
            (self.text is None or self.text == text)
            and (self.every is None or number % self.every == 0)
            and (self.start is None or number >= self.start)
            and (self.end is None or number <= self.end)
        )


class Failures:
    """Draws the failure of each request; keeps count of how often one has been met."""

    def __init__(self, rules: tuple[Rule, ...] = (), *, rate: float = 0.0, seed: int = 0) -> None:
        self._rules = rules
        self._rate = rate
        self._random = random.Random(seed)
        self._met: dict[Rule, int] = {}

    def draw(self, number: int, text: str, asked: str | None) -> Failure | None:
        """Return the failure of chat request `number`, or None. `asked` is what the request itself asks for.

        Raises ValueError when `asked` can't be read.
        """
        if asked is not None:
            failure = parse_failure(asked)
            return failure if self._due(Rule(failure, text)) else None
        for rule in self._rules:
            if rule.applies(number, text) and self._due(rule):
                return rule.failure
        if self._rate and self._random.random() < self._rate:
            return Failure(status=500)
        return None

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
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise RecordingError(f"{path} can't be read: {error.strerror or error}") from error
    rules = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            rules.append(_rule(orjson.loads(line)))
        except ValueError as error:
            raise RecordingError(f"{path}, line {number}: {error}") from error
    return tuple(rules)


def _rule(fields: object) -> Rule:
    if not isinstance(fields, dict):
        raise ValueError('expected a JSON object such as {"every": 10, "status": 503}')
    text = fields.pop("text", None)
    if text is not None and not isinstance(text, str):
        raise ValueError(f"`text` must be a string, got {text!r}")
    every, start, end = (_count(name, fields.pop(name, None), least=1) for name in ("every", "from", "to"))
    return Rule(_failure(fields), text, every, start, end)


def _failure(fields: Mapping[str, object]) -> Failure:
    known = ("status", "retry_after", "stall", "break_after", "times")
    for name in fields:
        if name not in known:
            raise ValueError(f"unknown failure {name!r}; known: {', '.join(known)}")
    status = _count("status", fields.get("status"), least=400)
    if status is not None and status > 599:
        raise ValueError(f"`status` must be 400 to 599, got {status}")
    stall = fields.get("stall", 0.0)
    try:
        seconds = float(stall) if isinstance(stall, str | int | float) else -1.0
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds <= 3600:
        raise ValueError(f"`stall` must be seconds, 0 to 3600, got {stall!r}")
    retry_after = fields.get("retry_after")
    break_after = _count("break_after", fields.get("break_after"), least=0)
    if status is None and not seconds and break_after is None:
        raise ValueError("no failure named; give `status`, `stall` or `break_after`")
    return Failure(
        status=status,
        retry_after=None if retry_after is None else str(retry_after),
        stall=seconds,
        break_after=break_after,
        times=_count("times", fields.get("times"), least=1),
    )


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
