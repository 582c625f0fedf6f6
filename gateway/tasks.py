"""Which task a request belongs to: by header, by rule, else by the fingerprint of its prompt."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import NamedTuple

from serving.agreement import Comparison, comparison
from serving.exchange import Json
from serving.fingerprint import fingerprint
from serving.rules import Rules
from serving.settings import Settings
from serving.task_settings import TaskSettings

OVERFLOW = "other"
"""Where the requests of every prompt go that is no task: not yet, or beyond `server.max_tasks`. Nothing is
learned from it."""

DISCOVERED = "auto-"

_LOOK_AGAIN_S = 1.0
_MOST_NEWCOMERS = 10_000


class Found(NamedTuple):
    """The task of a request. `newcomer` is what the task would be called that its prompt may become."""

    task: str
    newcomer: str | None = None


class Tasks:
    """The tasks there are: configured ones, those found on disk, and those discovered since.

    A prompt of its own is no task before the teacher has answered it: made-up models and broken requests
    take no place. The fewer of the `server.max_tasks` places are free, the more answers one takes: all places
    divided by the free ones. The first half is had for one answer each; the rest isn't filled by prompts that
    never come again, such as those with one customer's data in each, and the last of 200 takes 200 answers.

    `on_disk` lists the names of the tasks in the state directory. It is asked again, at most once a second,
    when an unseen prompt comes: several workers share what they discover, and one bound. Answers are counted
    in this process, for the prompts seen last.
    """

    def __init__(
        self,
        settings: Settings,
        on_disk: Callable[[], Iterable[str]],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings = settings
        self._on_disk = on_disk
        self._clock = clock
        self._limit = settings.server.max_tasks
        self._configured = frozenset(task.name for task in settings.task)
        self._discovered: set[str] = set()
        self._answers: OrderedDict[str, int] = OrderedDict()
        self._policies: dict[str, TaskSettings] = {}
        self._comparisons: dict[str, Comparison] = {}
        self._rules = Rules(settings)
        self._look()

    def find(self, request: Json, header: str | None) -> Found:
        """Return the task of a request; `header` is its `x-understudy-task`.

        A header that names no known task is passed over: a client can't create one. What matches no task
        goes to `other`, as a newcomer: `confirm` it once the teacher has answered.
        """
        if header is not None and self._is_known(header):
            return Found(header)
        named = self._rules.task_of(request, header)
        if named is not None:
            return Found(named)
        name = DISCOVERED + fingerprint(request)
        if not self._is_known(name) and self._clock() - self._looked_at >= _LOOK_AGAIN_S:
            self._look()
        return Found(name) if self._is_known(name) else Found(OVERFLOW, name)

    def confirm(self, newcomer: str) -> str:
        """Count an answer of the teacher's to a newcomer; return the task its request belongs to now."""
        if self._is_known(newcomer):  # by a request that was under way at the same time
            return newcomer
        answers = self._answers.pop(newcomer, 0) + 1
        free = self._limit - len(self._discovered) - len(self._configured)
        if free > 0 and answers >= self._limit // free:
            self._look()
            if self._is_known(newcomer) or len(self._discovered) + len(self._configured) < self._limit:
                self._discovered.add(newcomer)
                return newcomer
        self._answers[newcomer] = answers
        if len(self._answers) > _MOST_NEWCOMERS:
            self._answers.popitem(last=False)
        return OVERFLOW

    def policy(self, name: str) -> TaskSettings:
        """Return the settings of a task that `find` named."""
        found = self._policies.get(name)
        if found is None:
            found = self._policies[name] = self._settings.for_task(name)
        return found

    def comparison(self, name: str) -> Comparison:
        """Return how two answers of a task are compared."""
        found = self._comparisons.get(name)
        if found is None:
            found = self._comparisons[name] = comparison(self.policy(name).agreement)
        return found

    def names(self) -> list[str]:
        """Return every known task, sorted."""
        return sorted(self._configured | self._discovered)

    def _is_known(self, name: str) -> bool:
        return name in self._configured or name in self._discovered

    def _look(self) -> None:
        self._looked_at = self._clock()
        self._discovered |= set(self._on_disk()) - self._configured - {OVERFLOW}
