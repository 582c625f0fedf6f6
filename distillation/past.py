"""The releases a task has been through, with decisions that can be redone on any labelled exchange."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol, TypeVar

import numpy as np
import orjson
from numpy.typing import NDArray

from distillation.ahead import Ahead
from distillation.dataset import Dataset, Row
from distillation.refused import Refused
from routers.propensity import Period, pooled_propensity
from routers.router import SCORE_SCHEMA, Decision, Router
from serving.closed_answers import ClosedStudent, TextTooLong
from serving.closed_students import load_closed_student
from serving.engines import Engines
from serving.errors import DamagedRelease, UnknownRelease
from serving.releases import HELD_OUT_FILE, TAUGHT_FILE, ReleaseStore
from serving.sight import seen_text, unsupported

ROUTER_FILE = "router.json"

P = TypeVar("P", bound="Past")


@dataclass(frozen=True, slots=True)
class Redone:
    """What a release makes of a labelled exchange: its answer's rank and key, whether it agrees, and the decision.

    No key: answers of the task's kind have no normal form.
    """

    rank: float
    key: str | None
    agreed: bool
    decision: Decision


class Past(Protocol):
    """What looks and reports need of a release: its decisions can be redone, and it can be written down."""

    @property
    def router(self) -> Router:
        """The release's router."""
        ...

    @property
    def held_out(self) -> Mapping[str, tuple[float, str | None]]:
        """The rank and answer key of each row it was fitted on, by students that weren't; by the rows' ids."""
        ...

    def redo(self, row: Row) -> Redone | None:
        """What the release makes of a row, had it not been fitted on it; None where it can't serve such a request."""
        ...

    def accepts_row(self, row: Row) -> bool:
        """Whether the release would have answered a row's request, had it not been fitted on it."""
        ...

    def files(self) -> dict[str, bytes]:
        """The whole as files of a release."""
        ...


@dataclass(frozen=True, slots=True)
class PastRelease:
    """A release whose answer space is closed: the student, its router, and how it ranked the rows it was fitted on.

    `held_out` maps the ids of those rows to the rank and answer key that cross-fitting gave them: the released
    student and confidence have seen them and would be too sure. `refused` says which of them other rows' vetoes refuse.
    What `ahead` skips is never accepted. `taught` are the ids of what trained a student that wasn't cross-fitted: there
    is no telling what the release would have made of them, and nothing is to be asked about them
    (distillation/split.py).
    """

    student: ClosedStudent
    router: Router
    held_out: Mapping[str, tuple[float, str]]
    ahead: Ahead = field(default_factory=Ahead)
    refused: Refused = field(default_factory=Refused)
    taught: frozenset[str] = frozenset()
    _made: dict[str, tuple[float, Mapping[str, float], str]] = field(
        default_factory=dict, repr=False, compare=False
    )

    def accepts(self, id: str, text: str) -> bool:
        """Whether the release would have answered, had it not been fitted on this exchange."""
        return self._judge(id, *(self.held_out.get(id) or self.rank(text))).accepted

    def accepts_row(self, row: Row) -> bool:
        """Whether the release would have answered a row's request, by what this release's own student sees of it."""
        redone = self.redo(row)
        return redone is not None and redone.decision.accepted

    def redo(self, row: Row) -> Redone | None:
        """What the release makes of a row, had it not been fitted on it; None where it can't serve such a request."""
        sees, text = self.student.sees, row.text
        if row.request is not None:
            if unsupported(row.request, sees) is not None:
                return None
            text = seen_text(row.request, sees)
        ranked = self.held_out.get(row.id)
        try:
            rank, key = self.rank(text) if ranked is None else ranked
        except TextTooLong:
            return None
        decision = self._judge(row.id, rank, key)
        if self.ahead.skips(row, self.held_out.keys()):
            decision = replace(decision, accepted=False, reason="skipped")
        return Redone(rank, key, key == row.answer, decision)

    def _judge(self, id: str, rank: float, key: str) -> Decision:
        return self.router.judge(rank, key, vetoed=self.refused.vetoed(id, self.held_out.keys()))

    def rank(self, text: str) -> tuple[float, str]:
        """The rank and key of the student's answer to a text, as they would be served."""
        score, signals, key = self.predict(text)
        return self.router.confidence.rank(score, signals, key), key

    def predict(self, text: str) -> tuple[float, Mapping[str, float], str]:
        """The student's score, signals and answer key for a text. Remembered: every look asks for the whole log."""
        known = self._made.get(text)
        if known is None:
            prediction = self.student.predict(text)
            key = self.student.answers[prediction.index].key
            known = self._made[text] = prediction.score, prediction.signals, key
        return known

    def files(self) -> dict[str, bytes]:
        """The whole as files of a release; `read_past` reads them back."""
        return {
            **self.student.files(),
            ROUTER_FILE: self.router.dump(),
            HELD_OUT_FILE: orjson.dumps(self.held_out),
            **self.ahead.files(),
            **self.refused.files(self.router.vetoed),
            **({TAUGHT_FILE: orjson.dumps(dict.fromkeys(sorted(self.taught), True))} if self.taught else {}),
        }


def read_past(store: ReleaseStore, task: str, name: str, engines: Engines | None = None) -> PastRelease:
    """A release of the store. Raises UnknownRelease or DamagedRelease.

    `engines`: what it may share with others that are read; None: nothing.
    """
    return past_of(store.read(task, name).files, f"release {name} of task {task}", engines)


def past_of(files: Mapping[str, bytes], what: str, engines: Engines | None = None) -> PastRelease:
    """What `PastRelease.files` wrote. `what` names it in the DamagedRelease that is raised if it can't be read."""
    try:
        held_out = {id: (float(s), str(k)) for id, (s, k) in orjson.loads(files[HELD_OUT_FILE]).items()}
        router = Router.load(files[ROUTER_FILE])
        if orjson.loads(files[ROUTER_FILE])["schema"] == SCORE_SCHEMA:
            # Such a release remembers scores; its confidence turns them into ranks.
            held_out = {id: (router.confidence.rank(s, {}, k), k) for id, (s, k) in held_out.items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DamagedRelease(f"{what}: {HELD_OUT_FILE} can't be read: {error}") from error
    try:
        taught = frozenset(str(id) for id in dict(orjson.loads(files.get(TAUGHT_FILE, b"{}"))))
    except (TypeError, ValueError) as error:
        raise DamagedRelease(f"{what}: {TAUGHT_FILE} can't be read: {error}") from error
    student = load_closed_student(files, engines or Engines())
    return PastRelease(student, router, held_out, Ahead.read(files), Refused.read(files), taught)


def redoable(
    read: Callable[[str], P], task: str, dataset: Dataset, progress: Callable[[str], None]
) -> tuple[dict[str, P], Dataset]:
    """The releases the traffic met, and the dataset without the traffic of those that can't be read any more.

    `read` gives a release by its name; it raises UnknownRelease or DamagedRelease.
    """
    past: dict[str, P] = {}
    for name in [name for name in dataset.traffic if name is not None]:
        try:
            past[name] = read(name)
        except (DamagedRelease, UnknownRelease) as error:
            progress(f"{task}: leaving out the traffic of release {name}: {error}")
            dataset = dataset.without_period(name)
    return past, dataset


def propensity_of(dataset: Dataset, past: Mapping[str, Past]) -> NDArray[np.float64]:
    """The pooled propensity of each row; `past` holds every release the dataset's traffic met."""
    periods = []
    for name, traffic in dataset.traffic.items():
        accepted = np.zeros(len(dataset.rows), dtype=np.bool_)
        if name is not None:
            release = past[name]
            accepted[:] = [release.accepts_row(row) for row in dataset.rows]
        periods.append(Period(traffic.exchanges, traffic.audit_rate, accepted))
    return pooled_propensity(periods)
