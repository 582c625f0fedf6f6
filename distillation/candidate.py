"""A candidate: a student that was fixed to be tested by the labels to come; `state/tasks/<task>/candidate.json`.

A sentence encoder that it is built on lies beside, under the checksums of its files:

    state/tasks/<task>/candidate/<SHA-256>
"""

from __future__ import annotations

import contextlib
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
from serving.engines import MODEL_FILE, TOKENIZER_FILE, Engines
from serving.errors import DamagedRelease
from serving.exchange import Json
from serving.layout import task_directory
from serving.releases import CANDIDATE_FILE
from serving.shared_files import write_shared
from serving.student_choice import StudentChoice
from serving.task_settings import TaskPolicy

SCHEMA = 1
_BESIDE = (MODEL_FILE, TOKENIZER_FILE)

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

    Only who learns the task may write it (`LookJournal.alone`). `engines` is what its student may share with others.
    """

    state_dir: Path
    task: str
    disk: Disk = field(default_factory=Disk)
    engines: Engines | None = None

    @property
    def _path(self) -> Path:
        return task_directory(self.state_dir, self.task) / CANDIDATE_FILE

    def read(self, policy: TaskPolicy) -> Candidate | None:
        """The candidate; None if there is none, if it was fixed under another promise, or if it is damaged.

        What it spent is in the journal, whatever became of it. Raises OSError, and ConfigError where what its student
        runs on isn't there.
        """
        try:
            data = orjson.loads(self._path.read_bytes())
            content = data["content"]
            if data["schema"] != SCHEMA or data["checksum"] != _checksum(content):
                return None
            if not _is_same(content["promise"], promise_of(policy)):
                return None
            return self._candidate(content)
        except FileNotFoundError:
            return None
        except (AttributeError, KeyError, TypeError, ValueError, DamagedRelease):
            return None

    def write(self, candidate: Candidate, policy: TaskPolicy) -> None:
        """Replace what is there, durably."""
        files = candidate.release.files()
        beside = {name: hashlib.sha256(files[name]).hexdigest() for name in _BESIDE if name in files}
        for name, checksum in beside.items():
            self._put_beside(files[name], checksum)
        content: Json = {
            "promise": promise_of(policy),
            "files": {
                name: b64encode(data).decode("ascii") for name, data in files.items() if name not in beside
            },
            "beside": beside,
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
        for left in self._beside.glob("*"):
            if left.name not in beside.values():
                self.disk.remove(left)

    @property
    def _beside(self) -> Path:
        return self._path.with_suffix("")

    def _put_beside(self, data: bytes, checksum: str) -> None:
        """Durable before the candidate that names it is."""
        self.disk.make_directory(self._beside)
        path = self._beside / checksum
        with contextlib.suppress(FileNotFoundError):
            if hashlib.sha256(path.read_bytes()).hexdigest() == checksum:
                return
            self.disk.remove(path)
        temporary = path.with_name(".writing")
        self.disk.remove(temporary)
        write_shared(temporary, data, checksum, state_dir=self.state_dir, disk=self.disk)
        self.disk.rename(temporary, path)
        self.disk.sync_directory(self._beside)

    def _candidate(self, content: Json) -> Candidate:
        files = {str(name): b64decode(data, validate=True) for name, data in content["files"].items()}
        for name, checksum in content.get("beside", {}).items():
            files[name] = (self._beside / str(checksum)).read_bytes()
            if hashlib.sha256(files[name]).hexdigest() != checksum:
                raise DamagedRelease(
                    f"{name} of the candidate of task {self.task} doesn't match its checksum"
                )
        release = past_of(files, f"the candidate of task {self.task}", self.engines)
        return Candidate(
            release=release,
            levels=FixedLevels.from_json(content["levels"]),
            number=int(content["number"]),
            labels=int(content["labels"]),
            after=float(content["after"]),
            serial=int(content["serial"]),
            served=None if content["served"] is None else Router.load(content["served"].encode("utf-8")),
        )


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


def _is_same(fixed_for: Json, promise: Json) -> bool:
    """Whether it is the promise that a candidate was fixed for. Settings there weren't then had their defaults."""
    student = {**StudentChoice().model_dump(mode="json"), **fixed_for["student"]}
    return {**fixed_for, "student": student} == promise


def _checksum(content: Any) -> str:
    return hashlib.sha256(orjson.dumps(content, option=orjson.OPT_SORT_KEYS)).hexdigest()
