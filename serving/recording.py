"""A recording: messages and the answers a teacher gave to them, as CSV or JSONL.

Columns: `text` (the user's message), `teacher` (the answer; `answer` is read too), and, all optional,
`gold` (the right answer), `latency_s` (how long the teacher took), `model` (the teacher's name), `logprobs`
(JSON: OpenAI's `logprobs.content`, a list of token entries), `confidence` (a probability above 0, at most 1:
log-probabilities are made from it), `tool_calls` (JSON: OpenAI's `message.tool_calls`). Other columns are ignored.
In JSONL an answer may be any JSON value; what isn't a string becomes its compact JSON text.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import orjson

from serving.errors import RecordingError
from serving.exchange import Json

Answers = Literal["teacher", "gold"]
"""Which column holds the answers: a labelled set without a teacher's can stand in with its gold ones."""

MAX_FIELD = 131_072
"""Characters in one field; also the standard library's limit for CSV."""

_ANSWER = ("teacher", "answer")


@dataclass(frozen=True, slots=True)
class Recorded:
    """One message and its recorded answer.

    `teacher` is None only when the answer is tool calls alone. `logprobs` has an entry per token; where there are none,
    they are made from `confidence`.
    """

    text: str
    teacher: str | None
    gold: str | None = None
    latency_s: float | None = None
    model: str | None = None
    logprobs: list[Json] | None = None
    tool_calls: list[Json] | None = None
    confidence: float | None = None


@dataclass(frozen=True, slots=True)
class Recording:
    """The rows of one file, in its order; there is at least one. A text may occur more than once."""

    path: Path
    rows: tuple[Recorded, ...]

    def __len__(self) -> int:
        return len(self.rows)

    def write(self, path: Path) -> None:
        """Write the rows to `path` as JSONL that `read_recording` reads back as they are."""
        path.write_bytes(b"".join(orjson.dumps(row) + b"\n" for row in self.rows))

    @property
    def model(self) -> str | None:
        """The first model named in the recording, if any."""
        return next((row.model for row in self.rows if row.model), None)


def read_recording(path: Path, *, answers: Answers = "teacher") -> Recording:
    """Read `path`; whether it is CSV or JSONL shows in its first character (`{` begins JSONL).

    With `answers="gold"` the `gold` column is required and is taken as the teacher's answer.

    Raises RecordingError, which names the file, the line, the column, and the columns that were found.
    """
    text = _read_text(path)
    if not text.strip():
        raise RecordingError(f"{path} is empty; a recording has a column `text` and a column `teacher`")
    rows = _jsonl(path, text) if text.lstrip()[0] == "{" else _csv(path, text)
    read = tuple(_recorded(f"{path}, line {line}", row, answers) for line, row in rows)
    if not read:
        raise RecordingError(f"{path} has a header but no rows")
    return Recording(path, read)


def _read_text(path: Path) -> str:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise RecordingError(f"{path} can't be read: {error.strerror or error}") from error
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise RecordingError(
            f"{path}, line {line}: not UTF-8 ({error.reason}); save the file as UTF-8"
        ) from error


def _csv(path: Path, text: str) -> Iterator[tuple[int, dict[str, object]]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    columns: list[str] = []
    while True:
        line = reader.line_num + 1
        try:
            row = next(reader, None)
        except csv.Error as error:
            raise RecordingError(f"{path}, line {line}: not valid CSV ({error})") from error
        if row is None:
            return
        if not row:
            continue
        if not columns:
            columns = [name.strip() for name in row]
            for name in columns:
                if columns.count(name) > 1:
                    raise RecordingError(f"{path}, line {line}: the column `{name}` occurs twice")
            continue
        if len(row) != len(columns):
            raise RecordingError(
                f"{path}, line {line}: {len(row)} fields where the header has {len(columns)} "
                f"({', '.join(columns)}); quote fields that hold commas or line breaks"
            )
        # An empty cell is how CSV says that there is nothing.
        yield line, {name: value if value else None for name, value in zip(columns, row, strict=True)}


def _jsonl(path: Path, text: str) -> Iterator[tuple[int, dict[str, object]]]:
    for line, raw in enumerate(text.split("\n"), start=1):
        if not raw.strip():
            continue
        try:
            row = orjson.loads(raw)
        except orjson.JSONDecodeError as error:
            raise RecordingError(f"{path}, line {line}: not valid JSON ({error})") from error
        if not isinstance(row, dict):
            raise RecordingError(f"{path}, line {line}: expected a JSON object, got {_kind(row)}")
        yield line, row


def _recorded(where: str, row: Mapping[str, object], answers: Answers) -> Recorded:
    text = row.get("text")
    if text is None and "text" not in row:
        raise _missing(where, "text", row)
    if not isinstance(text, str) or not text.strip():
        raise RecordingError(f"{where}: column `text` must be a non-empty string, got {_kind(text)}")
    wanted = ("gold",) if answers == "gold" else _ANSWER
    column = next((name for name in wanted if name in row), None)
    tool_calls = None if answers == "gold" else _json_list(where, row, "tool_calls")
    if column is None and tool_calls is None:
        raise _missing(where, wanted[0], row)
    answer = _answer(row.get(column)) if column is not None else None
    if answer is None and tool_calls is None:
        raise RecordingError(f"{where}: column `{column}` is empty, and there are no tool calls either")
    for name, value in (("text", text), (column or "teacher", answer or "")):
        if len(value) > MAX_FIELD:
            raise RecordingError(
                f"{where}: column `{name}` has {len(value):,} characters; {MAX_FIELD:,} is the limit"
            )
    return Recorded(
        text=text,
        teacher=answer,
        gold=_answer(row.get("gold")),
        latency_s=_seconds(where, row),
        model=_model(where, row),
        logprobs=None if answers == "gold" else _json_list(where, row, "logprobs"),
        tool_calls=tool_calls,
        confidence=_confidence(where, row),
    )


def _missing(where: str, column: str, row: Mapping[str, object]) -> RecordingError:
    hint = ""
    if column == "teacher":
        hint = " (the teacher's answer; `answer` is read too)"
        if "gold" in row:
            hint += "; a file with gold answers only can be used with --answers gold"
    return RecordingError(f"{where}: there is no column `{column}`{hint}; found: {', '.join(row) or 'none'}")


def _answer(value: object) -> str | None:
    if value is None or isinstance(value, str):
        return value
    return orjson.dumps(value).decode()


def _seconds(where: str, row: Mapping[str, object]) -> float | None:
    seconds = _number(row.get("latency_s"))
    if seconds is not None and not (0 <= seconds < math.inf):
        raise RecordingError(
            f"{where}: column `latency_s` must be seconds, 0 or more, got {row['latency_s']!r}"
        )
    return seconds


def _confidence(where: str, row: Mapping[str, object]) -> float | None:
    confidence = _number(row.get("confidence"))
    if confidence is not None and not (0 < confidence <= 1):
        raise RecordingError(
            f"{where}: column `confidence` must be a probability above 0, at most 1, got {row['confidence']!r}"
        )
    return confidence


def _number(value: object) -> float | None:
    """Read a number, in CSV as text; NaN for what is none."""
    if value is None:
        return None
    try:
        return float(value) if isinstance(value, str | int | float) else math.nan
    except ValueError:
        return math.nan


def _model(where: str, row: Mapping[str, object]) -> str | None:
    value = row.get("model")
    if value is not None and not isinstance(value, str):
        raise RecordingError(f"{where}: column `model` must be a string, got {_kind(value)}")
    return value


def _json_list(where: str, row: Mapping[str, object], column: str) -> list[Json] | None:
    """Read a column that holds a JSON list of objects; in CSV as text. `{"content": […]}` is unwrapped."""
    value: Any = row.get(column)
    if value is None:
        return None
    if isinstance(value, str):
        try:
            value = orjson.loads(value)
        except orjson.JSONDecodeError as error:
            raise RecordingError(f"{where}: column `{column}` isn't valid JSON ({error})") from error
    if isinstance(value, dict) and isinstance(value.get("content"), list):
        value = value["content"]
    if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
        raise RecordingError(f"{where}: column `{column}` must be a JSON list of objects, got {_kind(value)}")
    _check_entries(where, column, value)
    return value or None


def _check_entries(where: str, column: str, entries: list[Json]) -> None:
    key, kind = ("token", str) if column == "logprobs" else ("function", dict)
    for entry in entries:
        if not isinstance(entry.get(key), kind):
            raise RecordingError(
                f"{where}: an entry of column `{column}` has no `{key}`; found: {', '.join(entry)}"
            )


def _kind(value: object) -> str:
    """Say what a value is in a person's words."""
    if value is None:
        return "nothing"
    if isinstance(value, str) and not value.strip():
        return "an empty string"
    names = {
        str: "a string",
        bool: "true or false",
        int: "a number",
        float: "a number",
        list: "a list",
        dict: "an object",
    }
    return names.get(type(value), type(value).__name__)
