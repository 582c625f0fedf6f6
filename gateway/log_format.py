"""What the gateway says on stderr: as text for people or as JSON for machines, and never without end.

Everything goes through the standard library's root logger: our modules, uvicorn, asyncio, warnings, what
`understudy learn` says, and errors that nothing caught. So one format holds for every line.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import threading
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Literal

import orjson

Value = str | int | float | bool | None
Fields = Mapping[str, Value]
LogFormat = Literal["text", "json"]

FIELDS = "fields"
"""The key of `extra` under which a record carries `Fields`."""

_LONGEST_LINE = 4000
"""Bytes. A pipe takes up to 4096 (PIPE_BUF) in one piece: longer lines of several workers may be mixed."""
_SHORTEST_CUT = 64
_BURST = 20
_PER_S = 1.0
_BARE = re.compile(r"[A-Za-z0-9_./:@%+*,-]+")


def configure_logging(kind: LogFormat) -> None:
    """Send this process's log to stderr in one format. Does nothing where logging is configured already."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if kind == "json" else TextFormatter())
    handler.addFilter(Throttle())
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
    logging.getLogger("understudy").setLevel(logging.INFO)
    logging.captureWarnings(True)
    sys.excepthook = _log_uncaught
    threading.excepthook = _log_uncaught_in_thread


class TextFormatter(logging.Formatter):
    """`time LEVEL logger: message key=value …`, and tracebacks as Python prints them."""

    def __init__(self) -> None:
        super().__init__()
        self._clock = _Clock(time.localtime, "%Y-%m-%d %H:%M:%S", ",")

    def format(self, record: logging.LogRecord) -> str:
        """Write the line, and below it the traceback."""
        at = self._clock.read(record.created)
        line = f"{at} {record.levelname} {record.name}: {record.getMessage()}"
        fields = fields_of(record)
        if fields:
            line += "".join([f" {key}={_bare(value)}" for key, value in fields.items()])
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class JsonFormatter(logging.Formatter):
    """One JSON object a line: `time` (RFC 3339, UTC), `level`, `logger`, `message`, the record's fields, `error`.

    `error` is the traceback. A line has at most 4,000 bytes: what is too long is cut, a traceback at its
    beginning, since its end says what happened.
    """

    def __init__(self) -> None:
        super().__init__()
        self._clock = _Clock(time.gmtime, "%Y-%m-%dT%H:%M:%S", ".", "Z")

    def format(self, record: logging.LogRecord) -> str:
        """Write the line."""
        entry: dict[str, Value] = {
            "time": self._clock.read(record.created),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        entry.update(fields_of(record))
        if record.exc_info:
            entry["error"] = self.formatException(record.exc_info)
        line = _dumped(entry)
        while len(line) > _LONGEST_LINE and _shorten(entry):
            line = _dumped(entry)
        return line.decode()


class Throttle(logging.Filter):
    """Lets any one statement of WARNING or above speak 20 times in a row, then once a second.

    A teacher that is down or a disk that is full fails every request, and mustn't fill the disk with it. The
    first line after some were left out says how many (`left_out`).
    """

    def __init__(self) -> None:
        super().__init__()
        self._budgets: dict[tuple[str, int], _Budget] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Say whether the record is written."""
        if record.levelno < logging.WARNING:
            return True
        # As many as there are statements in the code.
        budget = self._budgets.setdefault((record.pathname, record.lineno), _Budget())
        if not budget.spend(time.monotonic()):
            return False
        if budget.left_out:
            record.__dict__[FIELDS] = {**fields_of(record), "left_out": budget.left_out}
            budget.left_out = 0
        return True


class _Clock:
    """Writes times to the millisecond. What stays the same within a second is written once."""

    def __init__(
        self, parts: Callable[[float], time.struct_time], pattern: str, point: str, zone: str = ""
    ) -> None:
        self._parts = parts
        self._pattern = pattern
        self._point = point
        self._zone = zone
        self._second = -1
        self._written = ""

    def read(self, at: float) -> str:
        second = int(at)
        if second != self._second:
            self._written = time.strftime(self._pattern, self._parts(second))
            self._second = second
        return f"{self._written}{self._point}{int((at - second) * 1000):03d}{self._zone}"


class _Budget:
    """A token bucket. The handler's lock guards it."""

    def __init__(self) -> None:
        self.left_out = 0
        self._tokens = float(_BURST)
        self._at = 0.0

    def spend(self, now: float) -> bool:
        self._tokens = min(_BURST, self._tokens + (now - self._at) * _PER_S)
        self._at = now
        if self._tokens < 1:
            self.left_out += 1
            return False
        self._tokens -= 1
        return True


def fields_of(record: logging.LogRecord) -> Fields:
    """Return what a record carries beside its message."""
    fields: Fields = record.__dict__.get(FIELDS) or {}
    return fields


def _dumped(entry: Fields) -> bytes:
    try:
        return orjson.dumps(entry)
    except TypeError:
        # A lone surrogate, as in the name of a file that isn't UTF-8.
        return json.dumps(entry).encode()


def _shorten(entry: dict[str, Value]) -> bool:
    """Cut the longest text to half; False when there is none left to cut."""
    texts = {key: value for key, value in entry.items() if isinstance(value, str)}
    longest = max(texts, key=lambda key: len(texts[key]))
    text = texts[longest]
    half = len(text) // 2
    if half < _SHORTEST_CUT:
        return False
    entry[longest] = f"…{text[-half:]}" if longest == "error" else f"{text[:half]}…"
    return True


def _bare(value: Value) -> str:
    """Write a value so that it ends where it ends: what isn't plain is quoted as JSON does it."""
    if isinstance(value, str):
        return value if _BARE.fullmatch(value) else json.dumps(value)
    return repr(value) if type(value) in (int, float) else json.dumps(value)


def _log_uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        return
    logging.getLogger("understudy").critical("an error that nothing caught", exc_info=(kind, error, trace))


def _log_uncaught_in_thread(args: threading.ExceptHookArgs) -> None:
    if args.exc_value is not None and not issubclass(args.exc_type, SystemExit):
        name = args.thread.name if args.thread else "?"
        logging.getLogger("understudy").error(
            "an error that nothing caught, in the thread %s",
            name,
            exc_info=(args.exc_type, args.exc_value, args.exc_traceback),
        )
