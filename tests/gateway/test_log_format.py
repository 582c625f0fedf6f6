from __future__ import annotations

import json
import logging
import sys
import time
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from gateway.log_format import FIELDS, JsonFormatter, TextFormatter, Throttle

ANY_TEXT = st.text(st.characters(), max_size=3000)


def record(message: str, level: int = logging.INFO, *, line: int = 1, **fields: Any) -> logging.LogRecord:
    made = logging.LogRecord("understudy.test", level, "test.py", line, message, (), None)
    made.__dict__[FIELDS] = fields
    return made


def raised(message: str) -> Any:
    try:
        raise ValueError(message)
    except ValueError:
        return sys.exc_info()


@given(message=ANY_TEXT, field=ANY_TEXT, error=ANY_TEXT)
def test_whatever_is_said_is_one_json_object_on_one_short_line(message: str, field: str, error: str) -> None:
    made = record(message, field=field)
    made.exc_info = raised(error)
    line = JsonFormatter().format(made)
    assert "\n" not in line
    assert len(line.encode()) <= 4000
    entry = json.loads(line)
    assert set(entry) == {"time", "level", "logger", "message", "field", "error"}
    if len(message.encode("utf-8", "replace")) < 100:
        assert entry["message"] == message


def test_a_long_traceback_keeps_its_end() -> None:
    made = record("it failed", logging.ERROR)
    made.exc_info = raised("x" * 6000 + " because of this")
    assert json.loads(JsonFormatter().format(made))["error"].endswith(" because of this")


@given(value=ANY_TEXT)
def test_a_field_in_text_ends_where_it_ends(value: str) -> None:
    line = TextFormatter().format(record("request", model=value, status=200))
    assert "\n" not in line
    head, _, tail = line.partition(" model=")
    assert head.endswith("understudy.test: request")
    written = tail.removesuffix(" status=200")
    assert written == value or json.loads(written) == value


def test_a_statement_that_repeats_itself_is_throttled_and_says_how_often() -> None:
    throttle = Throttle()
    let_through = [throttle.filter(record("down", logging.WARNING)) for _ in range(100)]
    assert let_through[:20] == [True] * 20
    assert sum(let_through) == 20, "a second hasn't passed"
    assert throttle.filter(record("another", logging.ERROR, line=2))
    assert all(throttle.filter(record("request")) for _ in range(100)), "what isn't a warning isn't counted"


def test_what_was_left_out_is_counted() -> None:
    throttle = Throttle()
    for _ in range(50):
        throttle.filter(record("down", logging.WARNING))
    deadline = time.monotonic() + 10
    while not throttle.filter(last := record("down", logging.WARNING)):
        assert time.monotonic() < deadline, "one a second"
        time.sleep(0.1)
    assert last.__dict__[FIELDS]["left_out"] >= 30
