"""How far the watch of a task's live release has come: `state/tasks/<task>/watch.json`, replaced atomically.

The state of the test and the audits it has taken in stand in one file: whenever its writer is killed, each audit is
counted once. A file that is damaged or gone is no loss but of audits that are no longer in the log: they are counted
anew.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import orjson

from serving.disk import Disk
from serving.exchange import Json
from serving.layout import task_directory

SCHEMA = 2
ANY = "*"
"""Stands for every model that may be asked for, where it isn't known which names answered which: in files of schema 1,
and of releases from before. A model that is really called so isn't followed."""

Names = dict[str, dict[str, float]]
"""By the model that clients asked for: the names that the teacher is known by, and when it last answered under each."""

LATE_S = 3600.0
"""An audit that is older by this than the newest one counted can't come any more: it would have counted as missing."""
_FILE = "watch.json"


@dataclass(frozen=True, slots=True)
class WatchRecord:
    """The watch of one release, from `since` on (seconds since the epoch; see `Live`).

    `watch` is `routers.watch.Watch` as JSON. `counted` holds the audits taken in, id → when their request came, as far
    back as one might still come late. `answers` is about how many answers of the release they stand for. `models` and
    `fingerprints` are the names that the teacher is known by.
    """

    release: str
    since: float
    watch: Json
    counted: dict[str, float] = field(default_factory=dict)
    answers: float = 0.0
    models: Names = field(default_factory=dict)
    fingerprints: Names = field(default_factory=dict)

    @property
    def until(self) -> float:
        """When the request of the newest audit counted came; `since` before there was one."""
        return max(self.counted.values(), default=self.since)

    @property
    def too_late(self) -> float:
        """An audit whose request came before that isn't taken in any more. Looks through all that is counted."""
        return max(self.since, self.until - LATE_S)

    def without_old(self) -> WatchRecord:
        """The same, without the ids of audits that would come too late anyway."""
        oldest = self.until - LATE_S
        return replace(self, counted={id: at for id, at in self.counted.items() if at >= oldest})


def read_watch_record(state_dir: Path, task: str) -> WatchRecord | None:
    """The record of a task; None if there is none that can be read."""
    try:
        found = orjson.loads((task_directory(state_dir, task) / _FILE).read_bytes())
        if found["schema"] not in (1, SCHEMA):
            return None
        names = _names if found["schema"] == SCHEMA else _names_for_any
        record = WatchRecord(
            str(found["release"]),
            float(found["since"]),
            dict(found["watch"]),
            _times(found["counted"]),
            float(found["answers"]),
            names(found["models"]),
            names(found["fingerprints"]),
        )
    except (OSError, AttributeError, KeyError, TypeError, ValueError):
        return None
    return record


def _times(found: Json) -> dict[str, float]:
    return {str(name): float(at) for name, at in found.items()}


def _names(found: Json) -> Names:
    return {str(requested): _times(names) for requested, names in found.items()}


def _names_for_any(found: Json) -> Names:
    return {ANY: _times(found)} if found else {}


def write_watch_record(state_dir: Path, task: str, record: WatchRecord, disk: Disk) -> None:
    """Replace the record of a task, durably. Only the keeper writes. Raises OSError."""
    path = task_directory(state_dir, task) / _FILE
    temporary = path.with_name(f".{_FILE}.writing")
    disk.remove(temporary)
    disk.write_file(temporary, orjson.dumps({"schema": SCHEMA, **asdict(record)}))
    disk.rename(temporary, path)
    disk.sync_directory(path.parent)
