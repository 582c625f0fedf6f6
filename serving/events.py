"""Events: what the log holds, one checksummed JSON line each, and the exchange as the fold of them.

    {"crc":"<crc32 of the event's bytes, 8 hex digits>","event":{…}}<newline>

Kinds (the event's own field `event`):

- `answered`: every field of an Exchange; what is known when the client has its answer.
- `audited`: `id`, `teacher` (the answer fetched afterwards, or null: it is missing), `agreement`, `requested`
  (the model that the request asks for), `at`.
- `repeated`: `id`, `teacher` (what it said when it was asked the same once more, or null: it gave no answer), `at`. It
  labels nothing: it says whether the teacher agrees with itself.
- `superseded`: `id`, `by` (the id of the retry that replaces it), `at`.
- `completed`: `id`, `student` (what it said in the end, whose answer wasn't whole when the exchange was logged),
  `agreement`, `usd` (what that cost on top), `at`.
- `cancelled`: `id`, `teacher` (the answer that still came, or null), `at`; the client went away. If the teacher's
  answer was incomplete then: `cost_usd`, what it cost all the same, and `estimated`.

Events of one exchange may be written by different processes, so they may be read in any order.
"""

from __future__ import annotations

import json
import math
import re
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Literal

import orjson

from serving.exchange import (
    EXCHANGE_FIELDS,
    SCHEMA,
    STUDENT_FIELDS,
    TEACHER_FIELDS,
    Exchange,
    Json,
    StudentAnswer,
    TeacherAnswer,
    only,
)

_HEAD = b'{"crc":"'
_MIDDLE = b'","event":'
_TAIL = b"}\n"
_CRC = slice(len(_HEAD), len(_HEAD) + 8)
_BODY = slice(_CRC.stop + len(_MIDDLE), -len(_TAIL))

EVENT_ID = re.compile(
    rb'\{"crc":"[0-9a-f]{8}","event":\{"event":"[a-z]+",(?:"schema":[0-9]+,)?"id":"([^"\\]*)"'
)
"""Finds the id of an event in its line without parsing it; an event that was written otherwise has to be parsed."""

Outcome = Literal["taken", "unknown", "damaged"]


def answered(exchange: Exchange) -> Json:
    """The event of an exchange whose client has its answer. Encode it before the exchange's dicts change."""
    event: Json = {"event": "answered"}
    for name in EXCHANGE_FIELDS:
        event[name] = getattr(exchange, name)
    if exchange.teacher is not None:
        event["teacher"] = _plain(exchange.teacher, TEACHER_FIELDS)
    if exchange.student is not None:
        event["student"] = _plain(exchange.student, STUDENT_FIELDS)
    return event


def audited(
    id: str, *, teacher: TeacherAnswer | None, agreement: bool | None, at: float, requested: str | None = None
) -> Json:
    """The event of an audit's end: the teacher's answer, or None when it could not be had.

    `at`: seconds since the epoch. `requested`: the model that the request asks for.
    """
    answer = None if teacher is None else _plain(teacher, TEACHER_FIELDS)
    return {
        "event": "audited",
        "schema": SCHEMA,
        "id": id,
        "teacher": answer,
        "agreement": agreement,
        "requested": requested,
        "at": at,
    }


def repeated(id: str, *, teacher: TeacherAnswer | None, at: float) -> Json:
    """The event of a teacher that was asked the same once more; None when it gave no answer.

    `at`: seconds since the epoch.
    """
    answer = None if teacher is None else _plain(teacher, TEACHER_FIELDS)
    return {"event": "repeated", "schema": SCHEMA, "id": id, "teacher": answer, "at": at}


def completed(id: str, *, student: StudentAnswer, agreement: bool | None, usd: float, at: float) -> Json:
    """The event of a student that has come to its end after its exchange was logged, `usd` later.

    `at`: seconds since the epoch.
    """
    answer = _plain(student, STUDENT_FIELDS)
    return {
        "event": "completed",
        "schema": SCHEMA,
        "id": id,
        "student": answer,
        "agreement": agreement,
        "usd": usd,
        "at": at,
    }


def superseded(id: str, *, by: str, at: float) -> Json:
    """The event of a retry, `by`, taking the place of exchange `id`. `at`: seconds since the epoch."""
    return {"event": "superseded", "schema": SCHEMA, "id": id, "by": by, "at": at}


def cancelled(
    id: str, *, teacher: TeacherAnswer | None, at: float, estimated_usd: float | None = None
) -> Json:
    """The event of a client that went away; `teacher` is the answer that still came.

    `at`: seconds since the epoch. `estimated_usd`: what an answer cost that didn't come to its end.
    """
    answer = None if teacher is None else _plain(teacher, TEACHER_FIELDS)
    event: Json = {"event": "cancelled", "schema": SCHEMA, "id": id, "teacher": answer, "at": at}
    if estimated_usd is not None:
        event |= {"cost_usd": estimated_usd, "estimated": True}
    return event


def plain_student(answer: StudentAnswer) -> Json:
    """A student's answer as it stands in an event."""
    return _plain(answer, STUDENT_FIELDS)


def read_student(data: Json) -> StudentAnswer:
    """Read what `plain_student` made and JSON has kept. Raises KeyError, TypeError or ValueError."""
    if not isinstance(data, dict):
        raise TypeError("a student's answer is an object")
    read = _student(data)
    return StudentAnswer(**{name: read[name] for name in STUDENT_FIELDS if name in read})


def encode(event: Json) -> bytes:
    """One line of the log, newline included. Raises ValueError for what can't be written as JSON.

    NaN and infinity are written as null; `fold` reads a null score or signal as NaN again.
    """
    try:
        body = orjson.dumps(event)
    except TypeError:
        # orjson stops at 254 levels; a request that was just shallow enough to serve is a few levels deeper
        # in here.
        try:
            body = json.dumps(event, separators=(",", ":"), allow_nan=False).encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise ValueError(f"event {event.get('id')!r} can't be written as JSON: {error}") from error
    return b"".join((_HEAD, b"%08x" % zlib.crc32(body), _MIDDLE, body, _TAIL))


def decode(line: bytes) -> Json | None:
    """The event on one line (newline included), or None for a line that is torn, foreign or damaged.

    Never raises.
    """
    if not (line.startswith(_HEAD) and line.endswith(_TAIL) and line[_CRC.stop : _BODY.start] == _MIDDLE):
        return None
    body = line[_BODY]
    if line[_CRC] != b"%08x" % zlib.crc32(body):
        return None
    try:
        event = orjson.loads(body)
    except orjson.JSONDecodeError:
        return None
    return event if isinstance(event, dict) else None


def fold(events: Iterable[Json]) -> dict[str, Exchange]:
    """Exchanges by id. Events that don't fit are left out; use `Fold` to know how many."""
    folded = Fold()
    for event in events:
        folded.add(event)
    return folded.exchanges()


class Fold:
    """Takes events in any order and gives the exchanges they make.

    The same event twice changes nothing. Of two `answered` events with one id the first one read wins; of two
    audits or repeats the one that has an answer, then the first. Events of an exchange that was never `answered` wait
    in vain. A repeat that was redacted is left out: what it says can't be compared.
    """

    def __init__(self) -> None:
        self._answered: dict[str, Exchange] = {}
        self._audited: dict[str, _Late] = {}
        self._repeated: dict[str, TeacherAnswer] = {}
        self._completed: dict[str, tuple[StudentAnswer, bool | None, float]] = {}
        self._superseded: dict[str, str] = {}
        self._cancelled: dict[str, TeacherAnswer | None] = {}
        self._broken_off: dict[str, float] = {}
        self._redacted: dict[str, set[str]] = {}

    def add(self, event: Json) -> Outcome:
        """Take one event.

        `damaged`: a field is missing or of the wrong type. `unknown`: a kind or schema of another version.
        Both leave the fold as it was.
        """
        if event.get("schema", SCHEMA) != SCHEMA:
            return "unknown"
        try:
            match event.get("event"):
                case "answered":
                    exchange = _exchange(event)
                    self._answered.setdefault(exchange.id, exchange)
                case "audited":
                    _check(event, _LATE_TYPES)
                    self._add_audit(event["id"], _teacher(event["teacher"]), event.get("agreement"))
                case "repeated":
                    _check(event, _LATE_TYPES)
                    again = _teacher(event["teacher"])
                    if again is not None and not event.get("redacted"):
                        self._repeated.setdefault(event["id"], again)
                    return "taken"  # what was redacted of it was none of the exchange's own
                case "completed":
                    _check(event, _LATE_TYPES)
                    student = StudentAnswer(**only(STUDENT_FIELDS, _student(event["student"])))
                    known = (student, event.get("agreement"), event.get("usd") or 0.0)
                    self._completed.setdefault(event["id"], known)
                case "superseded":
                    _check(event, _LATE_TYPES)
                    self._superseded.setdefault(event["id"], event["by"])
                case "cancelled":
                    _check(event, _LATE_TYPES)
                    teacher = _teacher(event.get("teacher"))
                    self._cancelled[event["id"]] = self._cancelled.get(event["id"]) or teacher
                    if event.get("cost_usd") is not None:
                        self._broken_off[event["id"]] = event["cost_usd"]
                case _:
                    return "unknown"
            if event.get("redacted"):
                self._redacted.setdefault(event["id"], set()).update(event["redacted"])
        except (KeyError, TypeError, ValueError):
            return "damaged"
        return "taken"

    def exchanges(self) -> dict[str, Exchange]:
        """The exchanges so far, by id."""
        return {id: self._exchange(exchange) for id, exchange in self._answered.items()}

    @property
    def unanswered_usd(self) -> float:
        """What requests cost whose clients left before the answer was whole: they make no exchange."""
        return sum(usd for id, usd in self._broken_off.items() if id not in self._answered)

    def _add_audit(self, id: str, teacher: TeacherAnswer | None, agreement: bool | None) -> None:
        known = self._audited.get(id)
        if known is None or (known[0] is None and teacher is not None):
            self._audited[id] = (teacher, agreement)

    def _exchange(self, exchange: Exchange) -> Exchange:
        id = exchange.id
        if id in self._completed and not (exchange.student is not None and exchange.student.complete):
            student, agreement, usd = self._completed[id]
            exchange = replace(
                exchange,
                student=student,
                agreement=exchange.agreement if agreement is None else agreement,
                cost_usd=None if exchange.cost_usd is None else exchange.cost_usd + usd,
            )
        if id in self._audited:
            teacher, agreement = self._audited[id]
            exchange = replace(
                exchange,
                teacher=exchange.teacher or teacher,
                agreement=exchange.agreement if agreement is None else agreement,
                audit="missing" if teacher is None else "answered",
            )
        if id in self._repeated:
            exchange = replace(exchange, repeat=self._repeated[id])
        if id in self._redacted:
            exchange = replace(exchange, redacted=sorted(self._redacted[id]))
        if id in self._superseded:
            exchange = replace(exchange, superseded_by=self._superseded[id])
        if id in self._cancelled:
            exchange = replace(exchange, cancelled=True, teacher=exchange.teacher or self._cancelled[id])
        return exchange


_Late = tuple[TeacherAnswer | None, bool | None]
_Types = Mapping[str, tuple[type, ...]]

_NONE = type(None)
_NUMBER = (int, float)
_EXCHANGE_TYPES: _Types = {
    "id": (str,),
    "request_id": (str,),
    "created": _NUMBER,
    "task": (str,),
    "tenant": (str,),
    "request": (dict,),
    "route": (str,),
    "reason": (str,),
    "release": (str, _NONE),
    "teacher": (dict, _NONE),
    "student": (dict, _NONE),
    "confidence": (*_NUMBER, _NONE),
    "threshold": (*_NUMBER, _NONE),
    "eligible": (bool,),
    "coin": (bool,),
    "audit_rate": _NUMBER,
    "audit": (str,),
    "propensity": (*_NUMBER, _NONE),
    "agreement": (bool, _NONE),
    "superseded_by": (str, _NONE),
    "cancelled": (bool,),
    "redacted": (list,),
    "repeat": (dict, _NONE),
    "cost_usd": (*_NUMBER, _NONE),
    "origin": (str, _NONE),
    "schema": (int,),
}
_LATE_TYPES: _Types = {
    "id": (str,),
    "teacher": (dict, _NONE),
    "agreement": (bool, _NONE),
    "requested": (str, _NONE),
    "by": (str,),
    "at": _NUMBER,
    "redacted": (list,),
    "cost_usd": (*_NUMBER, _NONE),
    "estimated": (bool,),
    "student": (dict,),
    "usd": _NUMBER,
}
_TEACHER_TYPES: _Types = {
    "model": (str,),
    "choices": (list,),
    "usage": (dict, _NONE),
    "latency_s": _NUMBER,
    "system_fingerprint": (str, _NONE),
    "cost_usd": (*_NUMBER, _NONE),
    "price_version": (str, _NONE),
    "trainable": (bool,),
}
_STUDENT_TYPES: _Types = {
    "model": (str,),
    "choices": (list,),
    "usage": (dict, _NONE),
    "latency_s": _NUMBER,
    "score": (*_NUMBER, _NONE),
    "cost_usd": (*_NUMBER, _NONE),
    "signals": (dict,),
    "checkpoints": (list,),
    "complete": (bool,),
    "device_s": (*_NUMBER, _NONE),
    "billed": (dict, _NONE),
}
_CHECKPOINT_TYPES: _Types = {
    "tokens": (int,),
    "bytes": (int,),
    "score": (*_NUMBER, _NONE),
    "signals": (dict,),
}
_ROUTES = ("cache", "student", "teacher")
_ORIGINS = (None, "student", "teacher")
_AUDITS = ("none", "pending", "answered", "missing")


def _plain(answer: TeacherAnswer | StudentAnswer, names: tuple[str, ...]) -> Json:
    return {name: getattr(answer, name) for name in names}


def _check(data: Json, types: _Types) -> None:
    """Compares types exactly: a bool is no number. Missing fields are the constructors' affair."""
    for name, value in data.items():
        if name in types and type(value) not in types[name]:
            raise TypeError(f"{name} is {type(value).__name__}")


def _check_choices(choices: list[object]) -> None:
    if not all(isinstance(choice, dict) for choice in choices):
        raise TypeError("a choice isn't an object")


def _exchange(event: Json) -> Exchange:
    _check(event, _EXCHANGE_TYPES)
    if event["route"] not in _ROUTES or event.get("audit", "none") not in _AUDITS:
        raise ValueError("route or audit")
    if event.get("origin") not in _ORIGINS or (event["route"] == "cache") is not (
        event.get("origin") is not None
    ):
        raise ValueError("origin")
    if event.get("teacher") is not None:
        _check(event["teacher"], _TEACHER_TYPES)
        _check_choices(event["teacher"]["choices"])
    if event.get("repeat") is not None:
        _teacher(event["repeat"])
    if event.get("student") is not None:
        event = {**event, "student": _student(event["student"])}
    return Exchange.from_json(event)


def _student(data: Json) -> Json:
    _check(data, _STUDENT_TYPES)
    _check_choices(data["choices"])
    known = {**data, "score": _number(data["score"]), "signals": _signals(data.get("signals", {}))}
    if data.get("checkpoints"):
        known["checkpoints"] = [_checkpoint(checkpoint) for checkpoint in data["checkpoints"]]
    return known


def _checkpoint(data: object) -> Json:
    if not isinstance(data, dict):
        raise TypeError("a checkpoint isn't an object")
    _check(data, _CHECKPOINT_TYPES)
    score, signals = _number(data["score"]), _signals(data["signals"])
    spelled = {"bytes": data["bytes"]} if "bytes" in data else {}
    return {"tokens": data["tokens"], **spelled, "score": score, "signals": signals}


def _signals(signals: Json) -> dict[str, float]:
    if any(type(value) not in (int, float, _NONE) for value in signals.values()):
        raise TypeError("a signal isn't a number")
    return {name: _number(value) for name, value in signals.items()}


def _number(value: float | None) -> float:
    """What was no finite number is null in the log."""
    return math.nan if value is None else value


def _teacher(data: Json | None) -> TeacherAnswer | None:
    if data is None:
        return None
    _check(data, _TEACHER_TYPES)
    _check_choices(data["choices"])
    return TeacherAnswer(**{name: data[name] for name in TEACHER_FIELDS if name in data})
