"""The rules of the configuration: which requests belong to which `[[task]]`."""

from __future__ import annotations

import re
from dataclasses import dataclass

from serving.chat import system_text
from serving.exchange import Json
from serving.settings import Settings
from serving.task_settings import Match


@dataclass(frozen=True, slots=True)
class _Rule:
    task: str
    match: Match
    system: re.Pattern[str] | None


class Rules:
    """The rules in the order of the configuration; the first that matches wins."""

    def __init__(self, settings: Settings) -> None:
        self._rules = [
            _Rule(task.name, task.match, re.compile(task.match.system) if task.match.system else None)
            for task in settings.task
            if task.match
        ]

    def task_of(self, request: Json, header: str | None) -> str | None:
        """Return the task a request belongs to by rule; `header` is its `x-understudy-task`."""
        return next((rule.task for rule in self._rules if _matches(rule, request, header)), None)


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
