"""What was counted in events that are no longer in the log: `state/tasks/<task>/removed.json`.

How often the audit coin falls depends on how many audits a release has had. Removing old segments, or what a
person asked to have erased, must not make that number smaller.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import orjson

from serving.disk import Disk
from serving.layout import task_directory

_FILE = "removed.json"
_LOCK = "removal.lock"
_UNFINISHED = ".rewriting"


@dataclass(frozen=True, slots=True)
class Removed:
    """`audits` counts audits of accepted answers by release; `removing` are segments that are counted already.

    A segment is first written down here and then removed, so that one whose removal was interrupted isn't counted
    twice.
    """

    audits: Mapping[str, int] = field(default_factory=dict)
    removing: frozenset[str] = frozenset()


def read_removed(state_dir: Path, task: str) -> Removed:
    """What was removed from a task's log. A file that is damaged counts as none: audits are then more frequent."""
    try:
        found = orjson.loads((task_directory(state_dir, task) / _FILE).read_bytes())
        audits = {str(release): int(count) for release, count in found["audits"].items()}
        return Removed(audits, frozenset(map(str, found["removing"])))
    except (OSError, AttributeError, KeyError, TypeError, ValueError):
        return Removed()


def write_removed(
    state_dir: Path, task: str, audits: Mapping[str, int], removing: frozenset[str], disk: Disk
) -> None:
    """Add to what was removed from a task's log, durably. Hold `removing_alone` around it. Raises OSError."""
    path = task_directory(state_dir, task) / _FILE
    counted = Counter(read_removed(state_dir, task).audits)
    counted.update(audits)
    temporary = path.with_name(f".{_FILE}.writing")
    disk.remove(temporary)
    disk.write_file(temporary, orjson.dumps({"audits": dict(counted), "removing": sorted(removing)}))
    disk.rename(temporary, path)
    disk.sync_directory(path.parent)


def unfinished(path: Path) -> Path:
    """The name under which a segment is written anew before it takes the old one's place."""
    return path.with_name(f".{path.name}{_UNFINISHED}")


def clear_unfinished(directory: Path, disk: Disk) -> None:
    """Remove what was left by a process that died while it wrote a segment anew. Hold `removing_alone` around it."""
    with contextlib.suppress(OSError):
        for path in directory.glob(f".*{_UNFINISHED}"):
            disk.remove(path)


@contextmanager
def removing_alone(state_dir: Path, *, wait: bool) -> Iterator[bool]:
    """Hold the lock without which nothing is removed from the log; False if somebody else has it."""
    fd = os.open(state_dir / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(fd)
