"""What a segment says about audits and its age, without parsing most of it.

A task's log may be gigabytes; a gateway that starts, and its keeper every half minute, only want to know which
audits there are and which are still owed. So a line is parsed only if it may say something about that, and what a
sealed segment says is kept beside it, since it never changes:

    state/tasks/<task>/events/<boot>-<pid>-<n>.jsonl.digest

That file is a shortcut: it may be deleted, and one that doesn't fit its segment is made anew.
"""

from __future__ import annotations

import contextlib
import re
import zlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import orjson

from serving.audit_trail import Trail
from serving.events import decode
from serving.exchange import SCHEMA, Json

DIGEST_SUFFIX = ".digest"
_VERSION = 3
_WORTH_KEEPING_BYTES = 1 << 20
"""A smaller segment is read as fast as its digest is found."""

_ANSWERED = re.compile(
    rb'\{"crc":"[0-9a-f]{8}","event":\{"event":"answered","id":"([^"\\]+)","request_id":"[^"\\]*(?:\\.[^"\\]*)*",'
    rb'"created":([0-9]+(?:\.[0-9]+)?)[,}]'
)
_AUDITED = (b'"audit":"pending"', b'"audit":"answered"', b'"audit":"missing"')
_LATE = ("audited", "superseded", "cancelled")
_TEACHER = b'"teacher":{"model":"'
_NO_TEACHER = b'"teacher":null,"student":'
_ROUTE = b'"route":"'
_FORCED = b'teacher","reason":"forced"'
_REQUEST = b',"request":{'
_ANY_MODEL = b'"model":'
_REQUESTED = re.compile(rb'"model":("(?:[^"\\]|\\.){1,200}")')
_MODEL = re.compile(rb'"teacher":\{"model":"([^"\\]{1,200})"')
_FINGERPRINT = re.compile(rb'"system_fingerprint":"([^"\\]{1,200})"')


@dataclass(slots=True)
class Digest:
    """What the first `size` bytes of a segment say; a torn last line isn't taken in.

    `newest` is the time of the latest event, in seconds since the epoch (0: there is none). `audits` counts, by
    release, the exchanges a student answered and a coin picked. `owed` are those of them whose audit hasn't come to
    an end in this segment: id → (offset of the line, its length). `settled` are the ids of audits, retries and
    cancellations whose exchange lies in another segment. `trail` is for the watch.
    """

    size: int = 0
    newest: float = 0.0
    audits: Counter[str] = field(default_factory=Counter)
    owed: dict[str, tuple[int, int]] = field(default_factory=dict)
    settled: set[str] = field(default_factory=set)
    trail: Trail = field(default_factory=Trail)

    def read_on(self, path: Path) -> None:
        """Take in what was appended since. Raises OSError."""
        here: set[str] = set()
        late: set[str] = set()
        with path.open("rb") as file:
            file.seek(self.size)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self._take(line, here, late)
                self.size += len(line)
        for id in late:
            self.owed.pop(id, None)
        self.settled |= late - here

    def _take(self, line: bytes, here: set[str], late: set[str]) -> None:
        known = _ANSWERED.match(line)
        if known is not None:
            here.add(known[1].decode("utf-8", "replace"))
            self.newest = max(self.newest, float(known[2]))
            self._see_teacher(line, float(known[2]))
            # The field stands there as it is; inside of a text its quotes would be escaped.
            if not any(mark in line for mark in _AUDITED):
                return
        event = decode(line)
        if event is None or event.get("schema", SCHEMA) != SCHEMA:
            return
        id, at = event.get("id"), event.get("created", event.get("at"))
        if not isinstance(id, str):
            return
        if isinstance(at, int | float):
            self.newest = max(self.newest, float(at))
        if event.get("event") in _LATE:
            late.add(id)
            self._take_late(line, id, event)
        elif event.get("event") == "answered":
            here.add(id)
            self._count(id, event, len(line))

    def _count(self, id: str, event: Json, length: int) -> None:
        release = audited_release(event)
        if release is not None:
            self.audits[release] += 1
            self.trail.take_answered(event, release)
        if event.get("audit") == "pending":
            self.owed[id] = self.size, length

    def _take_late(self, line: bytes, id: str, event: Json) -> None:
        if event.get("event") != "audited":
            self.trail.void.add(id)
            return
        self.trail.take_outcome(event)
        at, requested = event.get("at"), event.get("requested")
        if isinstance(at, int | float) and isinstance(requested, str):
            self._see_teacher(line, float(at), requested)

    def _see_teacher(self, line: bytes, at: float, requested: str | None = None) -> None:
        """Note which teacher answered who had asked for `requested` (None: the line says so).

        Of what looks like its name the last is the one: what the client wrote stands before it.
        """
        place = line.rfind(_TEACHER)
        if place < line.rfind(_NO_TEACHER):
            return
        route = line.rfind(_ROUTE, 0, place) + len(_ROUTE)
        model = _MODEL.match(line, place) if place >= 0 else None
        # A replayed answer says who the teacher was then. Who forces the teacher may ask for another than the task's,
        # and that is nothing the promise speaks of.
        if model is None or line.startswith((b"cache", _FORCED), route):
            return
        fingerprint = None
        for found in _FINGERPRINT.finditer(line, place):
            fingerprint = _text(found[1])
        asked_for = _requested(line, route) if requested is None else requested
        if asked_for is not None:
            self.trail.take_teacher(at, asked_for, _text(model[1]), fingerprint)


def _requested(line: bytes, end: int) -> str | None:
    """The model that the request before `end` asks for; None where it names none.

    What looks like its name stands there once, or more than once if the request has such keys deeper down.
    """
    begin = line.find(_REQUEST, 0, end)
    if begin < 0:
        return None
    if line.count(_ANY_MODEL, begin, end) > 1:
        request = (decode(line) or {}).get("request")
        model = request.get("model") if isinstance(request, dict) else None
    else:
        found = _REQUESTED.search(line, begin, end)
        model = None if found is None else orjson.loads(found[1])
    return model if isinstance(model, str) else None


def _text(name: bytes) -> str:
    return name.decode("utf-8", "replace")


def audited_release(event: Json) -> str | None:
    """The release whose answer an `answered` event tells of, if a coin picked it."""
    release = event.get("release")
    by_student = "student" in (event.get("route"), event.get("origin"))
    if by_student and isinstance(release, str) and event.get("audit") in ("pending", "answered", "missing"):
        return release
    return None


def digest_of(path: Path) -> Digest:
    """The digest of a sealed segment: the one that is kept if it fits, else a new one, which is kept.

    Raises OSError for a segment that can't be read. One whose digest can't be written is read again next time.
    """
    status = path.stat()
    stamp = [status.st_size, status.st_mtime_ns]
    kept = path.with_name(path.name + DIGEST_SUFFIX)
    if status.st_size >= _WORTH_KEEPING_BYTES:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            return _load(kept.read_bytes(), stamp)
    digest = Digest()
    digest.read_on(path)
    if status.st_size >= _WORTH_KEEPING_BYTES:
        with contextlib.suppress(OSError):
            _replace(kept, _dump(digest, stamp))
    return digest


def _dump(digest: Digest, stamp: list[int]) -> bytes:
    body = orjson.dumps(
        {
            "version": _VERSION,
            "stamp": stamp,
            "size": digest.size,
            "newest": digest.newest,
            "audits": dict(digest.audits),
            "owed": digest.owed,
            "settled": sorted(digest.settled),
            "trail": digest.trail.to_json(),
        }
    )
    return b"%08x" % zlib.crc32(body) + body


def _load(data: bytes, stamp: list[int]) -> Digest:
    """Read what `_dump` wrote. Raises ValueError, KeyError or TypeError for anything else."""
    crc, body = data[:8], data[8:]
    if crc != b"%08x" % zlib.crc32(body):
        raise ValueError("the digest is damaged")
    found = orjson.loads(body)
    if found["version"] != _VERSION or found["stamp"] != stamp:
        raise ValueError("the digest is that of another segment")
    return Digest(
        size=found["size"],
        newest=found["newest"],
        audits=Counter(found["audits"]),
        owed={id: (offset, length) for id, (offset, length) in found["owed"].items()},
        settled=set(found["settled"]),
        trail=Trail.from_json(found["trail"]),
    )


def _replace(path: Path, data: bytes) -> None:
    """Not synced: what a loss of power leaves of it is found damaged, and made anew."""
    temporary = path.with_name(f".{path.name}.writing")
    temporary.write_bytes(data)
    temporary.replace(path)
