"""The exchange: one request and the answers it got. It is what the log holds and what students learn from.

An exchange isn't stored as such. Workers append *events* (`serving.events`); the exchange is the fold of the events
that carry its id (`fold`). `schema` is part of every event, so that a reader can refuse what it doesn't know.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

SCHEMA = 1

Json = dict[str, Any]
"""A JSON object as the client or the upstream wrote it."""

Route = Literal["cache", "student", "teacher"]
Origin = Literal["student", "teacher"]
Audit = Literal["none", "pending", "answered", "missing"]
"""`none`: the coin didn't fall (or the request wasn't eligible). `pending`: it fell and an answer is still owed.
`answered`: both answers are known. `missing`: the teacher could not be had; counts as disagreement in every test."""


@dataclass(frozen=True, slots=True)
class TeacherAnswer:
    """What the teacher answered. `choices` and `usage` are OpenAI's, whole (a stream is assembled first)."""

    model: str
    choices: list[Json]
    usage: Json | None
    latency_s: float
    system_fingerprint: str | None = None
    cost_usd: float | None = None
    price_version: str | None = None
    trainable: bool = False


@dataclass(frozen=True, slots=True)
class StudentAnswer:
    """What the student answered, and what it knows about how sure it is.

    `score` is the untied ranking score that the router turns into a confidence; `signals` are the numbers behind it.
    `usage` is in the teacher's tokens, estimated from the log, since that is the price that was avoided; that of a
    language model is its own, the best estimate there is. `checkpoints` says what was known of it at fixed numbers of
    its tokens, each as `{"tokens", "bytes", "score", "signals"}` (STATISTICS.md §6), where `bytes` is how much text
    they spell (logs of before lack it). Not `complete`: it was stopped or broke off, and `choices` are what had come.
    `device_s` is how long what it runs on was at it: less than `latency_s` where others were answered at the same time
    (`serving.device_time`); None in logs of before. `billed` is the usage that a provider bills, where that is more
    than `usage`: other answers were drawn beside it.
    """

    model: str
    choices: list[Json]
    usage: Json | None
    latency_s: float
    score: float
    cost_usd: float | None = None
    signals: dict[str, float] = field(default_factory=dict)
    checkpoints: list[Json] = field(default_factory=list)
    complete: bool = True
    device_s: float | None = None
    billed: Json | None = None

    @property
    def took_s(self) -> float:
        """How long what it runs on was at it, in seconds; by its latency where that wasn't measured."""
        return self.latency_s if self.device_s is None else self.device_s

    def priced(self, usd: float) -> StudentAnswer:
        """The same answer, which has cost so much."""
        return StudentAnswer(  # `dataclasses.replace` takes three times as long
            self.model,
            self.choices,
            self.usage,
            self.latency_s,
            self.score,
            usd,
            self.signals,
            self.checkpoints,
            self.complete,
            self.device_s,
            self.billed,
        )


@dataclass(frozen=True, slots=True)
class Exchange:
    """One request and its answers, folded from the log.

    `created` is in seconds since the epoch. `propensity` is the probability with which the exchange came to have both
    answers: 1 if escalated, the audit rate if accepted (STATISTICS.md §2), None when the request isn't eligible.
    `origin` says of an answer from the cache who once gave it: `student` and `teacher` are then what was answered
    at that time, and cost nothing now.
    `redacted` names the parts (`request`, `teacher`, …) that didn't reach the log as they were (serving.redaction).
    `coin` says whether the audit coin fell (flipped for every eligible request, whatever its route).
    `agreement` is None until both answers are known.
    `repeat` is what the teacher said when it was asked the very same once more, afterwards, to see whether it agrees
    with itself; None: it wasn't asked, or gave no answer.
    """

    id: str
    request_id: str
    created: float
    task: str
    tenant: str
    request: Json
    route: Route
    reason: str
    release: str | None = None
    teacher: TeacherAnswer | None = None
    student: StudentAnswer | None = None
    confidence: float | None = None
    threshold: float | None = None
    eligible: bool = True
    coin: bool = False
    audit_rate: float = 0.0
    audit: Audit = "none"
    propensity: float | None = None
    agreement: bool | None = None
    superseded_by: str | None = None
    cancelled: bool = False
    cost_usd: float | None = None
    origin: Origin | None = None
    redacted: list[str] = field(default_factory=list)
    repeat: TeacherAnswer | None = None
    schema: int = SCHEMA

    @property
    def by_student(self) -> bool:
        """Whether the answer originates from the student, replays included: the promise is about these (§1)."""
        return "student" in (self.route, self.origin)

    @property
    def replayed(self) -> bool:
        """Whether it was an answer once given to another request, so that nobody was asked or paid for it."""
        return self.route == "cache"

    @property
    def audit_owed(self) -> bool:
        """Whether an audit has still to be done.

        One that was superseded or cancelled counts for nothing (STATISTICS.md §1), whatever the teacher would say.
        """
        return self.audit == "pending" and self.superseded_by is None and not self.cancelled

    def to_json(self) -> Json:
        """The exchange as plain JSON, the form it has on disk."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: Json) -> Exchange:
        """Read what `to_json` wrote. Unknown fields are ignored, so that newer writers can be read.

        Raises KeyError, TypeError or ValueError for anything that isn't an exchange of this schema.
        """
        if data["schema"] != SCHEMA:
            raise ValueError(f"exchange has schema {data['schema']!r}, this version reads {SCHEMA}")
        known = {name: data[name] for name in EXCHANGE_FIELDS if name in data}
        if known.get("teacher") is not None:
            known["teacher"] = TeacherAnswer(**only(TEACHER_FIELDS, known["teacher"]))
        if known.get("repeat") is not None:
            known["repeat"] = TeacherAnswer(**only(TEACHER_FIELDS, known["repeat"]))
        if known.get("student") is not None:
            known["student"] = StudentAnswer(**only(STUDENT_FIELDS, known["student"]))
        return cls(**known)


EXCHANGE_FIELDS, TEACHER_FIELDS, STUDENT_FIELDS = (
    tuple(field.name for field in dataclasses.fields(kind))
    for kind in (Exchange, TeacherAnswer, StudentAnswer)
)
"""Looking them up costs more than to write the event they make."""


def only(names: tuple[str, ...], data: Json) -> Json:
    """What of `data` has one of these names."""
    return {name: data[name] for name in names if name in data}
