"""Who is who among the processes of a running gateway. Reads /proc, so it works on Linux only."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_PROC = Path("/proc")
_STATE, _PARENT, _SESSION, _USER, _SYSTEM, _RESIDENT = 0, 1, 3, 11, 12, 21


@dataclass(frozen=True, slots=True)
class Processes:
    """The workers of one gateway, by process id; `keeper` is the one of them that holds the keeper's lock."""

    workers: tuple[int, ...]
    keeper: int | None


def find_processes(supervisor: int, state_dir: Path) -> Processes:
    """Return who runs now. `supervisor` is the process that was started as `understudy serve`."""
    workers = tuple(pid for pid in _children(supervisor) if not _is_bookkeeping(pid))
    holder = _lock_holder(state_dir / "keeper.lock")
    return Processes(workers, holder if holder in workers else None)


def is_running(pid: int) -> bool:
    """Say whether a process is there and hasn't ended."""
    status = _status(pid)
    return status is not None and status[_STATE] != "Z"


def cpu_seconds(pid: int) -> float:
    """Return the CPU time a process has used, all of its threads. Raises ProcessLookupError if it isn't there."""
    status = _status(pid)
    if status is None:
        raise ProcessLookupError(f"there is no process {pid}")
    return (int(status[_USER]) + int(status[_SYSTEM])) / os.sysconf("SC_CLK_TCK")


def resident_bytes(pid: int) -> int:
    """Return the memory a process holds. Raises ProcessLookupError if it isn't there."""
    status = _status(pid)
    if status is None:
        raise ProcessLookupError(f"there is no process {pid}")
    return int(status[_RESIDENT]) * os.sysconf("SC_PAGE_SIZE")


def session_bytes(session: int) -> int:
    """Return the memory that all processes of a session hold together; what they share counts for each."""
    found = 0
    for entry in _PROC.iterdir():
        status = _status(int(entry.name)) if entry.name.isdecimal() else None
        if status is not None and int(status[_SESSION]) == session:
            found += int(status[_RESIDENT]) * os.sysconf("SC_PAGE_SIZE")
    return found


@contextlib.contextmanager
def pinned(core: int) -> Iterator[None]:
    """Have what is started meanwhile run on one core, with all of its threads."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _children(parent: int) -> list[int]:
    found = []
    for entry in _PROC.iterdir():
        if entry.name.isdecimal():
            status = _status(int(entry.name))
            if status is not None and status[_STATE] != "Z" and int(status[_PARENT]) == parent:
                found.append(int(entry.name))
    return sorted(found)


def _status(pid: int) -> list[str] | None:
    """The fields of /proc/<pid>/stat behind the name, which may hold anything."""
    try:
        text = (_PROC / str(pid) / "stat").read_text(encoding="latin-1")
    except OSError:
        return None
    return text.rpartition(")")[2].split()


def _is_bookkeeping(pid: int) -> bool:
    """Python's multiprocessing has a process of its own that tracks resources, and learning is a child too."""
    try:
        command = (_PROC / str(pid) / "cmdline").read_bytes()
    except OSError:
        return True
    return b"resource_tracker" in command or command == b""


def _lock_holder(path: Path) -> int | None:
    """The process that holds a flock on `path`."""
    try:
        status = path.stat()
        lines = (_PROC / "locks").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    wanted = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    for line in lines:
        fields = line.split()
        if "FLOCK" in fields and wanted in fields:
            return int(fields[fields.index(wanted) - 1])
    return None
