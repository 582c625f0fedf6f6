"""What took long and failed isn't tried again at once: a fine-tuning may take hours before the memory runs out.

    state/tasks/<task>/setback.json         a fine-tuning
    state/embedders/<folder>.setback.json   exporting the sentence encoder in a folder

It remembers when, on how many labels, and with which configuration. It is tried again after an hour, when the labels
have grown by a quarter, when the configuration, or what is to be exported, has changed, and whenever a person says so,
whichever comes first.
"""

from __future__ import annotations

import hashlib
import time
from contextlib import suppress
from pathlib import Path

import orjson

from serving.layout import task_directory
from serving.settings import Settings
from serving.task_settings import TaskSettings

AGAIN_AFTER_S = 3600.0
GROWN = 1.25


class Setback:
    """Whether the last try failed, in the file `path`; `asked` is all it depends on, but for the labels."""

    def __init__(self, path: Path, *asked: str) -> None:
        self._path = path
        self._asked = hashlib.sha256("\n".join(asked).encode()).hexdigest()[:16]

    @classmethod
    def of_fine_tuning(cls, settings: Settings, policy: TaskSettings) -> Setback:
        """That of one task. Only who holds the task's learning lock may use it (`LookJournal.alone`)."""
        path = task_directory(settings.state_dir, policy.name) / "setback.json"
        asked = (policy.student, settings.learning, settings.student.onnx)
        return cls(path, *(part.model_dump_json() for part in asked))

    @classmethod
    def of_export(cls, settings: Settings, path: Path, checksum: str) -> Setback:
        """That of exporting a folder with this checksum. Only who is alone with the exports may use it."""
        return cls(path, checksum, settings.learning.model_dump_json())

    def failed(self, labels: int | None = None) -> None:
        """Remember that it has failed just now; a disk that is full mustn't hide why.

        `labels` is how many there were, where it depends on them.
        """
        said = {"at": time.time(), "labels": labels, "asked": self._asked}
        with suppress(OSError):
            self._path.write_bytes(orjson.dumps(said))

    def over(self) -> None:
        """Forget it: it has worked."""
        with suppress(OSError):
            self._path.unlink(missing_ok=True)

    def waits_s(self, labels: int | None = None, *, now: float) -> float:
        """How long it should wait yet with so many labels, in seconds; 0 too where what is remembered can't be read."""
        try:
            said = orjson.loads(self._path.read_bytes())
            at, asked = float(said["at"]), str(said["asked"])
            grown = labels is not None and labels >= GROWN * int(said["labels"])
        except (OSError, KeyError, TypeError, ValueError):
            return 0.0
        if asked != self._asked or grown or at > now:  # the clock was set back, or anything else
            return 0.0
        return max(0.0, at + AGAIN_AFTER_S - now)
