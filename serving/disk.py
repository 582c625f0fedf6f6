"""The few file operations that durability rests on, as one seam.

`Disk` is the real one. The tests run the same code on a disk that forgets whatever wasn't synced, which is
the only way to see a missing fsync: killing a process never loses what has reached the page cache, only
losing power does.
"""

from __future__ import annotations

import fcntl
import os
import sys
from pathlib import Path


class Disk:
    """File operations, each as durable as its name says. Every method raises OSError and nothing else."""

    def create(self, path: Path) -> int:
        """Create a file that must not exist yet; gives a descriptor open for appending."""
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o640)

    def write(self, fd: int, data: bytes) -> None:
        """Write all of `data`, however many calls the system makes of it."""
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(fd, rest) :]

    def sync(self, fd: int) -> None:
        """Return when everything written to `fd` survives a loss of power."""
        if sys.platform == "darwin":
            fcntl.fcntl(fd, fcntl.F_FULLFSYNC)  # there, fsync stops at the drive's own cache
        else:
            os.fsync(fd)

    def rename(self, source: Path, target: Path) -> None:
        """Rename, replacing `target`. The directory still has to be synced."""
        source.replace(target)

    def link(self, source: Path, target: Path) -> None:
        """Give a file, as it is, a second name that must not exist yet. The directory still has to be synced."""
        target.hardlink_to(source)

    def remove(self, path: Path) -> None:
        """Remove a file, if it is there. The directory still has to be synced."""
        path.unlink(missing_ok=True)

    def sync_directory(self, path: Path) -> None:
        """Return when the names in `path` (created, renamed, removed) survive a loss of power."""
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def make_directory(self, path: Path) -> None:
        """Create `path` and what is missing above it, durably; nothing happens if it exists."""
        if path.is_dir():
            return
        self.make_directory(path.parent)
        path.mkdir(exist_ok=True)
        self.sync_directory(path.parent)

    def write_file(self, path: Path, data: bytes) -> None:
        """Create `path` with `data` in it and sync it; the directory still has to be synced."""
        fd = self.create(path)
        try:
            self.write(fd, data)
            self.sync(fd)
        finally:
            os.close(fd)
