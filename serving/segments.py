"""Segments: the files of the event log, and who may touch them.

    state/tasks/<task>/events/<boot>-<pid>-<n>.jsonl.open    one writer appends, holding an exclusive flock
    state/tasks/<task>/events/<boot>-<pid>-<n>.jsonl         sealed by rename: never appended to again

The lock is what tells a living writer from one that was killed: the system drops it with the process. (A
process id tells less: in a container the next process often has the number of the one that died.)
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import socket
import time
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

from serving.disk import Disk
from serving.layout import task_directory, task_names

OPEN_SUFFIX = ".open"
_OPEN_NAME = re.compile(r"([0-9a-f]{8})-([0-9]+)-([0-9]+)\.jsonl\.open")
_NUMBERS = re.compile(r"\d+")
_COPY_BYTES = 1 << 16


def boot_token() -> str:
    """Eight hex digits that change with every boot; where the system doesn't tell, digits of its name."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")[:8]
    except OSError:
        return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


def events_directory(state_dir: Path, task: str) -> Path:
    """Where the segments of a task lie. Raises UnknownTask for what can't be a task's name."""
    return task_directory(state_dir, task) / "events"


def segment_paths(state_dir: Path, task: str) -> list[Path]:
    """The segments of a task by their sealed names, in the order they were opened.

    They may still be open, or gone. Raises UnknownTask for what can't be a task's name.
    """
    directory = events_directory(state_dir, task)
    names: set[str] = set()
    # A file that is renamed while a directory is listed may be missed under both names. It is renamed
    # once in its life, so it can't be missed twice.
    for _ in range(2):
        try:
            names.update(path.name.removesuffix(OPEN_SUFFIX) for path in directory.iterdir())
        except (FileNotFoundError, NotADirectoryError):
            continue
    return [directory / name for name in sorted(names, key=_order) if name.endswith(".jsonl")]


def segment_lines(path: Path) -> Iterator[bytes]:
    """The lines of a segment under whichever name it has: it may be sealed between the two looks.

    Raises FileNotFoundError if it is gone.
    """
    for name in (path, path.with_name(path.name + OPEN_SUFFIX), path):
        try:
            with name.open("rb") as file:
                yield from file
            return
        except FileNotFoundError:
            continue
    raise FileNotFoundError(path)


def _order(name: str) -> tuple[list[int], str]:
    return [int(number) for number in _NUMBERS.findall(name)[-2:]], name


@dataclass(slots=True)
class _Segment:
    path: Path
    fd: int
    size: int = 0
    opened_s: float = field(default_factory=time.monotonic)


class SegmentWriter:
    """Appends to one open segment per task. It blocks: call it from one thread of its own.

    At most `max_open` segments are open; opening another seals the one used least recently. A segment is
    sealed when it has reached `segment_bytes`.
    """

    def __init__(
        self, state_dir: Path, *, segment_bytes: int, durable: bool, disk: Disk, max_open: int = 64
    ) -> None:
        self._state_dir = state_dir
        self._segment_bytes = segment_bytes
        self._durable = durable
        self._disk = disk
        self._max_open = max_open
        self._boot = boot_token()
        self._numbers = count(1)
        self._open: OrderedDict[str, _Segment] = OrderedDict()
        self._reachable: set[Path] = set()

    def append(self, task: str, data: bytes) -> None:
        """Write whole lines with one write, and one fsync if durable.

        Raises OSError: then none of them is in the log. After an error the segment is given up and the next
        call opens another: nothing is ever written after a torn line, and nothing to a file whose fsync
        failed (what it holds is unknown from then on).
        """
        segment = self._open.get(task)
        if segment is None:
            segment = self._open[task] = self._create(events_directory(self._state_dir, task))
            while len(self._open) > self._max_open:
                self._seal(next(iter(self._open)))
        self._open.move_to_end(task)
        try:
            self._disk.write(segment.fd, data)
            if self._durable:
                self._disk.sync(segment.fd)
        except OSError:
            del self._open[task]
            self._give_up(segment)
            raise
        segment.size += len(data)
        if segment.size >= self._segment_bytes:
            self._seal(task)

    def seal_older_than(self, seconds: float) -> None:
        """Seal what has been open for longer; never raises."""
        before = time.monotonic() - seconds
        for task in [task for task, segment in self._open.items() if segment.opened_s < before]:
            self._seal(task)

    def close(self) -> None:
        """Seal all open segments.

        Never raises: what can't be sealed stays as it is and is read all the same.
        """
        for task in list(self._open):
            self._seal(task)

    def _create(self, directory: Path) -> _Segment:
        self._disk.make_directory(directory)
        for number in self._numbers:
            path = directory / f"{self._boot}-{os.getpid()}-{number}.jsonl{OPEN_SUFFIX}"
            try:
                fd = self._disk.create(path)
            except FileExistsError:
                continue  # left by an earlier process with our number
            try:
                if _lock(fd) is not False and _is_at(fd, path):
                    if not _sealed(path).exists():
                        self._disk.sync_directory(directory)
                        self._make_reachable(directory)
                        return _Segment(path, fd)
                    path.unlink()  # an earlier process with our number sealed a segment of this name
                # else: someone who seals abandoned segments was faster than our lock
                os.close(fd)
            except OSError:
                os.close(fd)
                raise
        raise AssertionError("unreachable: numbers don't end")

    def _make_reachable(self, directory: Path) -> None:
        """Sync the folders above, once.

        One that exists may have been made by a process that died before it had synced it, and a segment in a
        folder that is gone after a loss of power is gone too.
        """
        if directory in self._reachable:
            return
        folder = directory
        while folder != self._state_dir and folder != folder.parent:
            folder = folder.parent
            self._disk.sync_directory(folder)
        self._reachable.add(directory)

    def _seal(self, task: str) -> None:
        segment = self._open.pop(task)
        # What was acknowledged is on disk already. A segment that can't be sealed now is sealed as an
        # abandoned one.
        with contextlib.suppress(OSError):
            if not self._durable:
                self._disk.sync(segment.fd)
            _rename_sealed(segment.path, self._disk)
        os.close(segment.fd)

    def _give_up(self, segment: _Segment) -> None:
        with contextlib.suppress(OSError):
            os.ftruncate(segment.fd, segment.size)
            if segment.size:
                self._disk.sync(segment.fd)
                _rename_sealed(segment.path, self._disk)
            else:
                segment.path.unlink()
        with contextlib.suppress(OSError):
            os.close(segment.fd)


def seal_abandoned(state_dir: Path, *, disk: Disk | None = None) -> int:
    """Seal the open segments whose writer is gone, without their torn tails; gives how many.

    Safe at any time, by several processes at once. What can't be sealed (a read-only disk) is left for the
    next time.
    """
    disk = disk or Disk()
    sealed = 0
    for task in task_names(state_dir):
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            for path in sorted(events_directory(state_dir, task).iterdir()):
                if _OPEN_NAME.fullmatch(path.name):
                    with contextlib.suppress(OSError):
                        sealed += _seal_if_abandoned(path, disk)
    return sealed


def _seal_if_abandoned(path: Path, disk: Disk) -> bool:
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        locked = _lock(fd)
        if locked is None:
            locked = not _writer_lives(path)
        if not locked or not _is_at(fd, path):
            return False
        end = _end_of_last_line(fd)
        if end == 0:
            path.unlink()
            return True
        if _sealed(path).exists():
            return False
        if end < os.fstat(fd).st_size:
            os.ftruncate(fd, end)
        disk.sync(fd)
        _rename_sealed(path, disk)
        return True
    finally:
        os.close(fd)


def _lock(fd: int) -> bool | None:
    """Whether we hold the lock now, without waiting; None where the file system has no locks."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _writer_lives(path: Path) -> bool:
    """By the name alone, for file systems without locks. In doubt it lives."""
    match = _OPEN_NAME.fullmatch(path.name)
    if match is None or match[1] != boot_token():
        return False
    try:
        os.kill(int(match[2]), 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True
    return True


def _is_at(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), path.stat())
    except FileNotFoundError:
        return False


def _sealed(path: Path) -> Path:
    return path.with_name(path.name.removesuffix(OPEN_SUFFIX))


def _rename_sealed(path: Path, disk: Disk) -> None:
    disk.rename(path, _sealed(path))
    disk.sync_directory(path.parent)


def _end_of_last_line(fd: int) -> int:
    """The offset behind the last newline, read from the end."""
    end = os.fstat(fd).st_size
    while end > 0:
        start = max(0, end - _COPY_BYTES)
        newline = os.pread(fd, end - start, start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        end = start
    return 0
