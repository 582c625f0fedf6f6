"""Which task a request belongs to: by header, by rule, else by the fingerprint of its prompt."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from serving.agreement import Comparison, comparison
from serving.chat import system_text
from serving.exchange import Json
from serving.fingerprint import fingerprint
from serving.settings import Match, Settings, TaskSettings

OVERFLOW = "other"
"""Where the requests of every prompt beyond `server.max_tasks` go. Nothing is learned from it."""

DISCOVERED = "auto-"


@dataclass(frozen=True, slots=True)
class _Rule:
    task: str
    match: Match
    system: re.Pattern[str] | None


class Tasks:
    """The tasks there are: configured ones, those found on disk, and those discovered since.

    `on_disk` lists the names of the tasks in the state directory; it is asked again when an unseen prompt
    comes, so that several workers share one bound.
    """

    def __init__(self, settings: Settings, on_disk: Callable[[], Iterable[str]]) -> None:
        self._settings = settings
        self._on_disk = on_disk
        self._limit = settings.server.max_tasks
        self._configured = frozenset(task.name for task in settings.task)
        self._discovered = {name for name in on_disk() if name not in self._configured and name != OVERFLOW}
        self._policies: dict[str, TaskSettings] = {}
        self._comparisons: dict[str, Comparison] = {}
        self._rules = [
            _Rule(task.name, task.match, re.compile(task.match.system) if task.match.system else None)
            for task in settings.task
            if task.match
        ]

    def find(self, request: Json, header: str | None) -> str:
        """Return the task of a request; `header` is its `x-understudy-task`.

        A header that names no known task is passed over: a client can't create one.
        """
        if header is not None and self._is_known(header):
            return header
        for rule in self._rules:
            if _matches(rule, request, header):
                return rule.task
        name = DISCOVERED + fingerprint(request)
        return (
            name if name in self._discovered or name in self._configured or self._take_in(name) else OVERFLOW
        )

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

    def _take_in(self, name: str) -> bool:
        if self._is_full():
            return False
        self._discovered |= set(self._on_disk()) - self._configured - {OVERFLOW}
        if self._is_full() and name not in self._discovered:
            return False
        self._discovered.add(name)
        return True

    def _is_full(self) -> bool:
        return len(self._discovered) + len(self._configured) >= self._limit


def _matches(rule: _Rule, request: Json, header: str | None) -> bool:
    match = rule.match
    if match.header is not None and header != match.header:
        return False
    if match.model is not None and request.get("model") != match.model:
        return False
    if match.metadata:
        metadata = request.get("metadata")
        if not isinstance(metadata, dict):
            return False
        if any(metadata.get(key) != value for key, value in match.metadata.items()):
            return False
    return rule.system is None or rule.system.search(system_text(request)) is not None
