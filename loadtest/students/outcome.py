"""What was measured of one student with one seed, and where it is kept, so that a run that broke off goes on."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import orjson

from serving.exchange import Json

SCHEMA = 3


@dataclass(frozen=True, slots=True)
class Quality:
    """On the test half: shares, unless said otherwise.

    `answered` is the share that a threshold known by hindsight answers with 5 % disagreement, `aurc` the area under the
    risk–coverage curve of its ranking, `ece` the calibration error of its confidence, which knew no label of this half.
    """

    agreement: float
    accuracy: float
    answered: float
    aurc: float
    ece: float


@dataclass(frozen=True, slots=True)
class Alone:
    """The student without a gateway, on one core: seconds, bytes of memory it adds, answers a second at saturation."""

    start_s: float
    memory_bytes: int
    p50_s: float
    p99_s: float
    per_s: float


@dataclass(frozen=True, slots=True)
class Through:
    """Through a gateway on one core, at saturation. `others` is the share of answers that weren't the student's."""

    per_s: float
    p50_s: float
    device_s: float
    usd_per_1000: float
    others: float


@dataclass(frozen=True, slots=True)
class Outcome:
    """All of it. `learning_s` is seconds of cores that learning took, `learning_usd` what they cost."""

    student: str
    seed: int
    training: int
    tested: int
    quality: Quality
    alone: Alone
    through: Through
    disk_bytes: int
    learning_s: float
    learning_usd: float
    teacher_accuracy: float
    teacher_usd_per_1000: float | None


class Kept:
    """Outcomes in a folder. `what` is all that they depend on beside student, seed and how they are measured."""

    def __init__(self, folder: Path, what: Json) -> None:
        self._folder = folder
        self._learned_key = _digest(what)
        self._key = _digest({"schema": SCHEMA, **what})

    def read(self, student: str, seed: int) -> Outcome | None:
        """What was measured before; None if nothing was, or it can't be read."""
        try:
            found = orjson.loads(self._path(student, seed).read_bytes())
            known = {field.name: found[field.name] for field in fields(Outcome)}
            known["quality"] = Quality(**found["quality"])
            known["alone"] = Alone(**found["alone"])
            known["through"] = Through(**found["through"])
            return Outcome(**known)
        except (OSError, KeyError, TypeError, ValueError):
            return None

    def write(self, outcome: Outcome) -> None:
        """Keep what was measured."""
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._path(outcome.student, outcome.seed)
        unfinished = path.with_suffix(".unfinished")
        unfinished.write_bytes(orjson.dumps(asdict(outcome), option=orjson.OPT_INDENT_2))
        unfinished.rename(path)

    def lesson(self, student: str, seed: int) -> Path:
        """The folder for what was learned, which takes longer than all that is measured of it."""
        return self._folder / "learned" / f"{student}-{seed}-{self._learned_key}"

    def _path(self, student: str, seed: int) -> Path:
        return self._folder / f"{student}-{seed}-{self._key}.json"


def _digest(what: Json) -> str:
    return hashlib.sha256(orjson.dumps(what, option=orjson.OPT_SORT_KEYS)).hexdigest()[:12]
