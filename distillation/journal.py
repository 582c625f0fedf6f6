"""The looks a task has had: `state/tasks/<task>/looks.jsonl`. A look is written down before it is taken.

A process that dies in the middle of a look has spent it all the same: otherwise dying would be a way to look again.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import orjson

from routers.looks import PastLook
from serving.errors import UnderstudyError
from serving.exchange import Json
from serving.layout import task_directory


class LearningElsewhere(UnderstudyError):
    """Another process is learning the same task right now."""


class LookJournal:
    """The looks of one task, oldest first."""

    def __init__(self, state_dir: Path, task: str) -> None:
        self._task = task
        self._path = task_directory(state_dir, task) / "looks.jsonl"

    def past(self) -> list[PastLook]:
        """Every look so far. Lines that can't be read are skipped: a torn one was never begun."""
        looks = self._looks()
        return [looks[serial] for serial in sorted(looks)]

    def _looks(self) -> dict[int, PastLook]:
        looks: dict[int, PastLook] = {}
        for entry in self.entries():
            try:
                serial, number, labels = int(entry["serial"]), int(entry["look"]), int(entry["labels"])
                at = float(entry.get("at", 0.0))
                until = None if entry.get("until") is None else float(entry["until"])
            except (KeyError, TypeError, ValueError):
                continue
            if serial in looks:
                # What came to pass before it ended, a withdrawal say, its labels knew nothing of.
                at, until = looks[serial].at, looks[serial].until
            looks[serial] = PastLook(number, labels, bool(entry.get("release")), at, until)
        return looks

    def entries(self) -> list[Json]:
        """The journal's lines as they are: `begun` ones and those that say how a look ended."""
        try:
            lines = self._path.read_bytes().splitlines()
        except FileNotFoundError:
            return []
        entries = []
        for line in lines:
            try:
                entry = orjson.loads(line)
            except orjson.JSONDecodeError:
                continue
            if isinstance(entry, dict):
                entries.append(entry)
        return entries

    def begin(
        self, look: int, labels: int, *, read_at: float | None = None, until: float | None = None
    ) -> int:
        """Write down that a look is taken; returns its serial number, for `end`.

        `read_at` is when its labels were read from the log, `until` when the request of the newest came, in seconds
        since the epoch; None: just now, and not known.
        """
        serial = max(self._looks(), default=0) + 1
        at = time.time() if read_at is None else read_at
        self._append({"serial": serial, "look": look, "labels": labels, "at": at, "until": until})
        return serial

    def end(self, serial: int, look: int, labels: int, result: Json) -> None:
        """Write down how it ended; `result["release"]` is the release it made, or None."""
        self._append({"serial": serial, "look": look, "labels": labels, "at": time.time(), **result})

    def spent(self, serial: int, look: int, labels: int, cost: Json) -> None:
        """Write down what it cost, before it ends."""
        self._append({"serial": serial, "look": look, "labels": labels, "at": time.time(), "learning": cost})

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Hold the task's learning lock. Raises LearningElsewhere at once if another process has it."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self._path.with_name(".learn.lock"), os.O_RDWR | os.O_CREAT, 0o644)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise LearningElsewhere(
                    f"task {self._task} is being learned by another process; wait for it"
                ) from error
            yield
        finally:
            os.close(descriptor)

    def _append(self, entry: Json) -> None:
        with self._path.open("ab") as file:
            # Behind a torn line the entry would be unreadable: begin on a line of its own.
            file.write(b"\n" + orjson.dumps(entry) + b"\n")
            file.flush()
            os.fsync(file.fileno())
