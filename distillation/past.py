"""The releases a task has been through, with decisions that can be redone on any labelled exchange."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import orjson

from distillation.dataset import Row
from routers.router import Router
from serving.errors import DamagedRelease
from serving.linear import LinearStudent
from serving.releases import HELD_OUT_FILE, ReleaseStore
from serving.sight import seen_text, unsupported

ROUTER_FILE = "router.json"


@dataclass(frozen=True, slots=True)
class PastRelease:
    """A release's student, its router, and how it scored the rows it was fitted on.

    `held_out` maps the ids of those rows to the score and answer key that cross-fitting gave them: the released
    student itself has seen them and would be too sure.
    """

    student: LinearStudent
    router: Router
    held_out: Mapping[str, tuple[float, str]]
    _scored: dict[str, tuple[float, str]] = field(default_factory=dict, repr=False, compare=False)

    def accepts(self, id: str, text: str) -> bool:
        """Whether the release would have answered, had it not been fitted on this exchange."""
        scored = self.held_out.get(id)
        return self.router.decide(*(self.score(text) if scored is None else scored)).accepted

    def accepts_row(self, row: Row) -> bool:
        """Whether the release would have answered a row's request, by what this release's own student sees of it."""
        sees = self.student.sees
        if row.request is None:
            return self.accepts(row.id, row.text)
        return unsupported(row.request, sees) is None and self.accepts(row.id, seen_text(row.request, sees))

    def score(self, text: str) -> tuple[float, str]:
        """The student's score and answer key for a text. Remembered: every look scores the whole log again."""
        known = self._scored.get(text)
        if known is None:
            prediction = self.student.predict(text)
            known = self._scored[text] = prediction.score, self.student.answers[prediction.index].key
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
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DamagedRelease(
            f"release {name} of task {task}: {HELD_OUT_FILE} can't be read: {error}"
        ) from error
    return PastRelease(LinearStudent.load(release.files), router, held_out)
