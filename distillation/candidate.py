"""A candidate: a student that was fixed to be tested by the labels to come; `state/tasks/<task>/candidate.json`."""

from __future__ import annotations

import hashlib
from base64 import b64decode, b64encode
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from distillation.past import PastRelease, past_of
from routers.candidate import FixedLevels
from routers.router import Router
from serving.disk import Disk
from serving.errors import DamagedRelease
from serving.exchange import Json
from serving.layout import task_directory
from serving.releases import CANDIDATE_FILE
from serving.settings import TaskPolicy

SCHEMA = 1

GROWTH = 2.0
"""A candidate that hasn't passed makes room for the next when there are this many times the labels it was fitted on."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A student with its confidence, its levels and their rules, fixed at the time `after` (seconds since the epoch).

    `release` serves nothing yet. `number` counts candidates since the last release, from 1: candidate k spends
    6δ/(π²k²), however often it is asked about. `labels` were there when it was fixed, `serial` is its place in the
    journal of looks, and `served` the router that is out already, where a level has passed.
    """

    release: PastRelease
    levels: FixedLevels
    number: int
    labels: int
    after: float
    serial: int
    served: Router | None = None

    def exhausted(self, labels: int) -> bool:
        """Whether it is time for another."""
        return labels >= GROWTH * self.labels


@dataclass(frozen=True, slots=True)
class CandidateFile:
    """The candidate of one task on disk: one file that is replaced whole.

    Only who learns the task may write it (`LookJournal.alone`).
    """

    state_dir: Path
    task: str
    disk: Disk = field(default_factory=Disk)

    @property
    def _path(self) -> Path:
        return task_directory(self.state_dir, self.task) / CANDIDATE_FILE

    def read(self, policy: TaskPolicy) -> Candidate | None:
        """The candidate; None if there is none, if it was fixed under another promise, or if it is damaged.

        What it spent is in the journal, whatever became of it. Raises OSError.
        """
        try:
            data = orjson.loads(self._path.read_bytes())
            content = data["content"]
            if data["schema"] != SCHEMA or data["checksum"] != _checksum(content):
                return None
            if content["promise"] != promise_of(policy):
                return None
            return _candidate(self.task, content)
        except FileNotFoundError:
            return None
        except (AttributeError, KeyError, TypeError, ValueError, DamagedRelease):
            return None

    def write(self, candidate: Candidate, policy: TaskPolicy) -> None:
        """Replace what is there, durably."""
        content: Json = {
            "promise": promise_of(policy),
            "files": {
                name: b64encode(data).decode("ascii") for name, data in candidate.release.files().items()
            },
            "levels": candidate.levels.to_json(),
            "number": candidate.number,
            "labels": candidate.labels,
            "after": candidate.after,
            "serial": candidate.serial,
            "served": None if candidate.served is None else candidate.served.dump().decode("utf-8"),
        }
        temporary = self._path.with_name(f".{CANDIDATE_FILE}")
        self.disk.remove(temporary)
        self.disk.write_file(
            temporary, orjson.dumps({"schema": SCHEMA, "checksum": _checksum(content), "content": content})
        )
        self.disk.rename(temporary, self._path)
        self.disk.sync_directory(self._path.parent)


def promise_of(policy: TaskPolicy) -> Json:
    """What a candidate was fixed for. Bets on one promise say nothing of another that was chosen afterwards."""
    return {
        "max_disagreement": policy.max_disagreement,
        "certainty": policy.certainty,
        "prove": dict(sorted(policy.prove.items())),
        "always_escalate": sorted(policy.always_escalate),
        "agreement": policy.agreement.model_dump(),
        "student": policy.student.model_dump(mode="json"),
    }


def _checksum(content: Any) -> str:
    return hashlib.sha256(orjson.dumps(content, option=orjson.OPT_SORT_KEYS)).hexdigest()


def _candidate(task: str, content: Json) -> Candidate:
    files = {str(name): b64decode(data, validate=True) for name, data in content["files"].items()}
    release: PastRelease = past_of(files, f"the candidate of task {task}")
    return Candidate(
        release=release,
        levels=FixedLevels.from_json(content["levels"]),
        number=int(content["number"]),
        labels=int(content["labels"]),
        after=float(content["after"]),
        serial=int(content["serial"]),
        served=None if content["served"] is None else Router.load(content["served"].encode("utf-8")),
    )
