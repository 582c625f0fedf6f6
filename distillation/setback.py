"""A fine-tuning that failed isn't tried again at once: it may have taken hours before the memory ran out.

`state/tasks/<task>/setback.json` remembers when, on how many labels, and with which configuration. It is tried again
after an hour, when the labels have grown by a quarter, when the configuration has changed, and whenever a person says
so, whichever comes first.
"""

from __future__ import annotations

import hashlib
import time
from contextlib import suppress

import orjson

from serving.layout import task_directory
from serving.settings import Settings
from serving.task_settings import TaskSettings

AGAIN_AFTER_S = 3600.0
GROWN = 1.25


class Setback:
    """That of one task. Only who holds the task's learning lock may use it (`LookJournal.alone`)."""

    def __init__(self, settings: Settings, policy: TaskSettings) -> None:
        self._path = task_directory(settings.state_dir, policy.name) / "setback.json"
        asked = [
            part.model_dump_json() for part in (policy.student, settings.learning, settings.student.onnx)
        ]
        self._asked = hashlib.sha256("\n".join(asked).encode()).hexdigest()[:16]

    def failed(self, labels: int) -> None:
        """Remember that it has failed just now; a disk that is full mustn't hide why."""
        said = {"at": time.time(), "labels": labels, "asked": self._asked}
        with suppress(OSError):
            self._path.write_bytes(orjson.dumps(said))

    def over(self) -> None:
        """Forget it: it has worked."""
        with suppress(OSError):
            self._path.unlink(missing_ok=True)

    def waits_s(self, labels: int, *, now: float) -> float:
        """How long it should wait yet with so many labels, in seconds; 0 too where what is remembered can't be read."""
        try:
            said = orjson.loads(self._path.read_bytes())
            at, before, asked = float(said["at"]), int(said["labels"]), str(said["asked"])
        except (OSError, KeyError, TypeError, ValueError):
            return 0.0
        if (
            asked != self._asked or labels >= GROWN * before or at > now
        ):  # the clock was set back, or anything else
            return 0.0
        return max(0.0, at + AGAIN_AFTER_S - now)
