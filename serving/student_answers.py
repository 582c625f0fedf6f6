"""Answers a student gave to logged requests after the fact, so that nobody has to ask it twice.

    state/tasks/<task>/student/<student>.jsonl      one checksummed line an answer, as in the log (serving.events)

`<student>` stands for the model and all settings its answers depend on. The files hold what requests were answered, so
retention and forgetting reach into them. A torn or damaged line is an answer that has to be asked for again.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from pathlib import Path

from serving.disk import Disk
from serving.errors import UnderstudyError
from serving.events import decode, encode, plain_student, read_student
from serving.exchange import SCHEMA, Json, StudentAnswer
from serving.file_lock import locked
from serving.layout import task_directory

_DIRECTORY = "student"
_LOCK = ".lock"
_ERASED = ".erased"
_UNFINISHED = ".rewriting"
_STUDENT = re.compile(r"[0-9a-f]{16}")

Stamp = tuple[int, int]


class ErasedMeanwhile(UnderstudyError):
    """Something of the task was erased from the log while its student was asked about it."""


class ErasureStamp:
    """Notices what `forget` erases of a task from now on. Make it before the log is read."""

    def __init__(self, state_dir: Path, task: str, *, disk: Disk | None = None) -> None:
        self._task = task
        self._directory = _directory_of(state_dir, task)
        (disk or Disk()).make_directory(self._directory)
        with locked(self._directory / _LOCK):
            self._stamp = _stamp(self._directory)

    def check(self) -> None:
        """Raise ErasedMeanwhile if anything was: what was read since may be that."""
        with self.held():
            pass

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep out what erases, to write down what was learned: it finds that then. Raises ErasedMeanwhile."""
        with locked(self._directory / _LOCK):
            if _stamp(self._directory) != self._stamp:
                raise ErasedMeanwhile(
                    f"something was erased from the log of task {self._task} while it was learned; learn again"
                )
            yield


class StudentAnswers:
    """The answers of one student of one task. One process writes at a time: whoever learns the task.

    Make it before the log is read: from then on nothing is written any more once `forget` has erased something, since
    that may be what the answer is to. `student` is 16 hex digits.
    """

    def __init__(self, state_dir: Path, task: str, student: str, *, disk: Disk | None = None) -> None:
        if not _STUDENT.fullmatch(student):
            raise ValueError(f"a student is named by 16 hex digits, not {student!r}")
        self.student = student
        self._disk = disk or Disk()
        self._directory = _directory_of(state_dir, task)
        self._path = self._directory / f"{student}.jsonl"
        self._task = task
        self._disk.make_directory(self._directory)
        with locked(self._directory / _LOCK):
            self._stamp = _stamp(self._directory)
            self._end_the_last_line()

    def read(self) -> dict[str, StudentAnswer]:
        """The answers by the ids of their exchanges; of two to one exchange the later one."""
        answers: dict[str, StudentAnswer] = {}
        for line in _lines(self._path):
            event = decode(line)
            if event is None or event.get("schema") != SCHEMA:
                continue
            with contextlib.suppress(KeyError, TypeError, ValueError):
                answers[str(event["id"])] = read_student(event["student"])
        return answers

    def keep_only(self, ids: Container[str]) -> None:
        """Remove the answers to other exchanges: they are no longer in the log. Raises OSError."""
        with locked(self._directory / _LOCK):
            _rewrite(self._path, lambda event: event.get("id") in ids, self._disk)

    def append(self, id: str, created: float, answer: StudentAnswer) -> None:
        """Keep the answer to exchange `id`, which was `created` then (seconds since the epoch).

        Not synced: what a loss of power takes is asked for again. Raises ErasedMeanwhile, and OSError as the disk does.
        """
        event: Json = {
            "event": "student",
            "schema": SCHEMA,
            "id": id,
            "created": created,
            "student": plain_student(answer),
        }
        with locked(self._directory / _LOCK):
            if _stamp(self._directory) != self._stamp:
                raise ErasedMeanwhile(
                    f"something was erased from the log of task {self._task} while its student was asked about it; "
                    "learn again"
                )
            fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o640)
            try:
                self._disk.write(fd, encode(event))
            finally:
                os.close(fd)

    def _end_the_last_line(self) -> None:
        """What a process that was killed has left of a line mustn't spoil the next one."""
        with contextlib.suppress(FileNotFoundError), self._path.open("rb+") as file:
            if file.seek(0, os.SEEK_END) == 0:
                return
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")


def erase_answers(state_dir: Path, task: str, ids: set[str], disk: Disk, *, change: bool = True) -> int:
    """Erase, durably, the answers to these exchanges and whatever can't be read; how many answers were to them.

    Also when there is none: a process that learns may be about to write one, and mustn't any more. `change` False: only
    count. Raises OSError.
    """
    directory = _directory_of(state_dir, task)
    if not directory.is_dir():
        return 0
    with locked(directory / _LOCK):
        found = 0
        for path in directory.glob("*.jsonl"):
            found += sum(
                1 for line in _lines(path) if (event := decode(line)) is not None and event.get("id") in ids
            )
            if change:
                _rewrite(path, lambda event: event.get("id") not in ids, disk)
        if change:
            disk.remove(directory / f"{_ERASED}{_UNFINISHED}")
            disk.write_file(directory / f"{_ERASED}{_UNFINISHED}", b"")
            disk.rename(directory / f"{_ERASED}{_UNFINISHED}", directory / _ERASED)
            disk.sync_directory(directory)
    return found


def remove_old_answers(state_dir: Path, task: str, before: float, disk: Disk) -> None:
    """Remove the answers to exchanges older than `before` (seconds since the epoch). Raises OSError."""
    directory = _directory_of(state_dir, task)
    if not directory.is_dir():
        return

    def is_young(event: Json) -> bool:
        created = event.get("created")
        return isinstance(created, int | float) and created >= before

    with locked(directory / _LOCK):
        for path in directory.glob("*.jsonl"):
            _rewrite(path, is_young, disk)


def _rewrite(path: Path, stays: Callable[[Json], bool], disk: Disk) -> None:
    """Write a file anew with the events that stay, if that isn't all of it."""
    lines = list(_lines(path))
    kept = [line for line in lines if (event := decode(line)) is not None and stays(event)]
    if len(kept) == len(lines):
        return
    if kept:
        temporary = path.with_name(f".{path.name}{_UNFINISHED}")
        disk.remove(temporary)  # of a process that died
        disk.write_file(temporary, b"".join(kept))
        disk.rename(temporary, path)
    else:
        disk.remove(path)
    disk.sync_directory(path.parent)


def _directory_of(state_dir: Path, task: str) -> Path:
    return task_directory(state_dir, task) / _DIRECTORY


def _stamp(directory: Path) -> Stamp | None:
    try:
        status = (directory / _ERASED).stat()
    except FileNotFoundError:
        return None
    return status.st_mtime_ns, status.st_ino


def _lines(path: Path) -> Iterator[bytes]:
    with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
        yield from file
