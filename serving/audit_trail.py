"""What a task's log tells the watch: the audits of what students answered, and which teacher has answered lately.

A `Trail` is gathered segment by segment (serving.segment_digest) and put together for one release (`put_together`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from serving.exchange import Json

MISSING, DISAGREED, AGREED = -1, 0, 1
"""How an audit ended. One that is missing counts as disagreement; an answer that comes later takes its place."""

SIGHTINGS = 20
"""Of how many of a teacher's latest answers the times are kept, for each name it gave itself."""
_MOST_NAMES = 50
"""Names of one kind that a segment keeps: a server that makes up a new one each time isn't followed. Of the models that
were asked for, the latest: a client may make them up."""

Sightings = dict[str, dict[str, list[float]]]
"""By the model that clients asked for: when the teacher last answered under each name.

Which model answers is compared within what was asked for: a client that asks for another one changes no teacher.
"""


@dataclass(frozen=True, slots=True)
class Audited:
    """An exchange whose student's answer the coin picked. `rate` is the chance it had; `outcome` None: still owed."""

    id: str
    release: str
    created: float
    rate: float
    outcome: int | None


@dataclass(slots=True)
class Trail:
    """What a part of a log says. All times are in seconds since the epoch.

    `audited` are by id; `outcomes` those of audits whose exchange may lie in another part; `void` are exchanges that
    count for nothing, superseded by a retry or given up by their clients. `models` and `fingerprints` hold when the
    teacher last answered under each name, by the model that was asked for.
    """

    audited: dict[str, Audited] = field(default_factory=dict)
    outcomes: dict[str, int] = field(default_factory=dict)
    void: set[str] = field(default_factory=set)
    models: Sightings = field(default_factory=dict)
    fingerprints: Sightings = field(default_factory=dict)

    def take_answered(self, event: Json, release: str) -> None:
        """Take in an exchange that the coin picked, and that `release` answered."""
        id, created, rate = event["id"], event.get("created"), event.get("audit_rate")
        if not (isinstance(created, int | float) and isinstance(rate, int | float)):
            return
        ended = {"answered": AGREED if event.get("agreement") is True else DISAGREED, "missing": MISSING}
        outcome = ended.get(str(event.get("audit")))
        self.audited.setdefault(id, Audited(id, release, float(created), float(rate), outcome))

    def take_outcome(self, event: Json) -> None:
        """Take in how an audit ended."""
        outcome = AGREED if event.get("agreement") is True else DISAGREED
        if event.get("teacher") is None:
            outcome = MISSING
        id = event["id"]
        if self.outcomes.get(id, MISSING) == MISSING:
            self.outcomes[id] = outcome

    def take_teacher(self, at: float, requested: str, model: str, fingerprint: str | None) -> None:
        """Take in that the teacher answered who had asked for `requested`, and the names it gave itself."""
        _sight(self.models, requested, model, [at])
        if fingerprint is not None:
            _sight(self.fingerprints, requested, fingerprint, [at])

    def to_json(self) -> Json:
        """The trail as plain JSON."""
        return {
            "audited": [[a.id, a.release, a.created, a.rate, a.outcome] for a in self.audited.values()],
            "outcomes": self.outcomes,
            "void": sorted(self.void),
            "models": self.models,
            "fingerprints": self.fingerprints,
        }

    @classmethod
    def from_json(cls, data: Json) -> Trail:
        """Read what `to_json` wrote. Raises KeyError, TypeError or ValueError for anything else."""
        audited = [Audited(*entry) for entry in data["audited"]]
        return cls(
            {one.id: one for one in audited},
            dict(data["outcomes"]),
            set(data["void"]),
            dict(data["models"]),
            dict(data["fingerprints"]),
        )


def put_together(trails: Iterable[Trail]) -> Trail:
    """One trail of many parts, in any order: every outcome with its exchange, without what is void."""
    whole = Trail()
    parts = list(trails)
    for part in parts:
        whole.void |= part.void
        for id, outcome in part.outcomes.items():
            if whole.outcomes.get(id, MISSING) == MISSING:
                whole.outcomes[id] = outcome
        for mine, theirs in ((whole.models, part.models), (whole.fingerprints, part.fingerprints)):
            for requested, names in theirs.items():
                for name, times in names.items():
                    _sight(mine, requested, name, times)
    for part in parts:
        for id, one in part.audited.items():
            if id not in whole.void:
                whole.audited[id] = replace(one, outcome=whole.outcomes.get(id, one.outcome))
    return whole


def _sight(sightings: Sightings, requested: str, name: str, times: list[float]) -> None:
    if requested not in sightings and len(sightings) >= _MOST_NAMES:
        del sightings[min(sightings, key=lambda one: max(max(seen) for seen in sightings[one].values()))]
    names = sightings.setdefault(requested, {})
    if name not in names and len(names) >= _MOST_NAMES:
        return
    names[name] = sorted([*names.get(name, []), *times])[-SIGHTINGS:]
