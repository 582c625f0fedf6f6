"""A cached answer, and the bytes it is kept as.

The bytes are `<digest><JSON>`. The digest covers the format's version, the key and the JSON, so that an entry
that was torn, damaged, written by another version or found under another key is no entry.
"""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass
from typing import Literal

import orjson

from serving.exchange import STUDENT_FIELDS, TEACHER_FIELDS, Json, StudentAnswer, TeacherAnswer

_VERSION = b"1"
_DIGEST_BYTES = 16


@dataclass(frozen=True, slots=True)
class CachedAnswer:
    """One answer, whole, with what is known of how it came about.

    `completion` is the `chat.completion` as its client got it: all choices, tool calls, refusals and
    log-probabilities. `origin` is who gave it; `release`, `confidence` and `threshold` are those of the
    decision, where one was made. `eligible` says whether the request it was given to was eligible
    (STATISTICS.md §1). `student` and `teacher` are the answers as they were logged, as far as known.
    `stored_at` is in seconds since the epoch.
    """

    completion: Json
    origin: Literal["student", "teacher"]
    release: str | None
    confidence: float | None
    threshold: float | None
    eligible: bool
    student: StudentAnswer | None
    teacher: TeacherAnswer | None
    stored_at: float

    def age_s(self, now: float) -> float:
        """Return how old the answer is; 0 if another machine's clock is ahead of ours."""
        return max(0.0, now - self.stored_at)


def encode(answer: CachedAnswer, key: str) -> bytes:
    """Return the bytes that `decode` reads under the same key.

    Raises ValueError for an answer that isn't JSON.
    """
    fields = {name: getattr(answer, name) for name in _FIELDS}
    choices = answer.completion.get("choices")
    for name in ("student", "teacher"):
        given = fields[name]
        if given is not None:
            fields[name] = {item: getattr(given, item) for item in _ANSWER_FIELDS[name]}
            if given.choices == choices:
                # The client got these very choices: they are in the completion already.
                del fields[name]["choices"]
    try:
        body = orjson.dumps(fields)
    except TypeError as error:
        raise ValueError(f"not JSON: {error}") from error
    return _digest(key, body) + body


def decode(data: bytes, key: str) -> CachedAnswer | None:
    """Read an entry; None for anything that `encode` hasn't written under this key. Never raises."""
    body = data[_DIGEST_BYTES:]
    if data[:_DIGEST_BYTES] != _digest(key, body):
        return None
    try:
        fields = orjson.loads(body)
        choices = fields["completion"].get("choices")
        if fields["student"] is not None:
            fields["student"] = StudentAnswer(**{"choices": choices, **fields["student"]})
        if fields["teacher"] is not None:
            fields["teacher"] = TeacherAnswer(**{"choices": choices, **fields["teacher"]})
        return CachedAnswer(**fields)
    except (TypeError, ValueError, KeyError, AttributeError):
        # Written by a version with other fields that forgot to count itself up.
        return None


def _digest(key: str, body: bytes) -> bytes:
    name = key.encode()
    head = b"%s %d %s " % (_VERSION, len(name), name)
    return hashlib.blake2b(head + body, digest_size=_DIGEST_BYTES, person=b"understudy-cache").digest()


_FIELDS = tuple(item.name for item in dataclasses.fields(CachedAnswer))
_ANSWER_FIELDS = {"student": STUDENT_FIELDS, "teacher": TEACHER_FIELDS}
