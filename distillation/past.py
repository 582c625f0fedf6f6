"""The releases a task has been through, with decisions that can be redone on any labelled exchange."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import orjson

from distillation.dataset import Row
from routers.router import SCORE_SCHEMA, Router
from serving.errors import DamagedRelease
from serving.linear import LinearStudent
from serving.releases import HELD_OUT_FILE, ReleaseStore
from serving.sight import seen_text, unsupported

ROUTER_FILE = "router.json"


class Past(Protocol):
    """What a look needs of a release: its decisions can be redone, and it can be written down."""

    @property
    def router(self) -> Router:
        """The release's router."""
        ...

    def accepts_row(self, row: Row) -> bool:
        """Whether the release would have answered a row's request, had it not been fitted on it."""
        ...

    def files(self) -> dict[str, bytes]:
        """The whole as files of a release."""
        ...


@dataclass(frozen=True, slots=True)
class PastRelease:
    """A release whose student is `linear`: the student, its router, and how it ranked the rows it was fitted on.

    `held_out` maps the ids of those rows to the rank and answer key that cross-fitting gave them: the released
    student and confidence have seen them and would be too sure.
    """

    student: LinearStudent
    router: Router
    held_out: Mapping[str, tuple[float, str]]
    _made: dict[str, tuple[float, Mapping[str, float], str]] = field(
        default_factory=dict, repr=False, compare=False
    )

    def accepts(self, id: str, text: str) -> bool:
        """Whether the release would have answered, had it not been fitted on this exchange."""
        ranked = self.held_out.get(id)
        decision = self.router.decide(*self.predict(text)) if ranked is None else self.router.judge(*ranked)
        return decision.accepted

    def accepts_row(self, row: Row) -> bool:
        """Whether the release would have answered a row's request, by what this release's own student sees of it."""
        sees = self.student.sees
        if row.request is None:
            return self.accepts(row.id, row.text)
        return unsupported(row.request, sees) is None and self.accepts(row.id, seen_text(row.request, sees))

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
        }


def read_past(store: ReleaseStore, task: str, name: str) -> PastRelease:
    """A release of the store. Raises UnknownRelease or DamagedRelease."""
    release = store.read(task, name)
    try:
        held_out = {
            id: (float(s), str(k)) for id, (s, k) in orjson.loads(release.files[HELD_OUT_FILE]).items()
        }
        router = Router.load(release.files[ROUTER_FILE])
        if orjson.loads(release.files[ROUTER_FILE])["schema"] == SCORE_SCHEMA:
            # Such a release remembers scores; its confidence turns them into ranks.
            held_out = {id: (router.confidence.rank(s, {}, k), k) for id, (s, k) in held_out.items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DamagedRelease(
            f"release {name} of task {task}: {HELD_OUT_FILE} can't be read: {error}"
        ) from error
    return PastRelease(LinearStudent.load(release.files), router, held_out)
