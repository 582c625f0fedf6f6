"""Large files that several releases hold: one on the disk, under several names.

A sentence encoder is 90 MB, and every release of every task that builds on it holds the same. Damage to one is damage
to all, as each release finds out by its checksums when it is read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import orjson

from serving.disk import Disk
from serving.layout import task_directory, task_names

WORTH_SHARING = 1024 * 1024
"""From so many bytes on it is worth looking for another of the kind."""


def write_shared(path: Path, data: bytes, checksum: str, *, state_dir: Path, disk: Disk) -> None:
    """Create `path` with `data`, whose SHA-256 is `checksum`, in it; the directory still has to be synced.

    If a release under the state directory holds the same and the file system allows it, that file gets this name, too:
    it was synced when that release was written. Else it is written and synced. Raises OSError.
    """
    if len(data) >= WORTH_SHARING:
        for there in _named_so(checksum, state_dir):
            try:
                disk.link(there, path)
            except OSError:
                continue  # it has gone, is on another file system, has too many names
            # Only now: before, it could become another file between the look and the link.
            if _is_intact(path, checksum):
                return
            disk.remove(path)
    disk.write_file(path, data)


def _named_so(checksum: str, state_dir: Path) -> Iterator[Path]:
    """The files that the cards of releases say have this checksum, the newest release of a task first."""
    for task in task_names(state_dir):
        for card in sorted((task_directory(state_dir, task) / "releases").glob("r*/card.json"), reverse=True):
            try:
                files = orjson.loads(card.read_bytes())["files"]
                yield from [card.parent / name for name, known in files.items() if known == checksum]
            except (OSError, AttributeError, KeyError, TypeError, ValueError):
                continue  # damaged: nothing to build on


def _is_intact(path: Path, checksum: str) -> bool:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == checksum
    except OSError:
        return False
