"""Retention: sealed segments whose newest event is old enough are removed."""

from __future__ import annotations

import contextlib
import shutil
from collections import Counter
from pathlib import Path

from serving.disk import Disk
from serving.layout import task_names, training_directory
from serving.removed import clear_unfinished, read_removed, removing_alone, write_removed
from serving.segment_digest import DIGEST_SUFFIX, digest_of
from serving.segments import OPEN_SUFFIX, events_directory, segment_paths
from serving.student_answers import remove_old_answers

_DAY_S = 86_400.0


def oldest_open_s(retention_days: float | None) -> float:
    """How long a segment may stay open, in seconds, so that little of it outlives the retention by much.

    A day, or a tenth of a retention shorter than ten. Also without one (None): it may be configured any time.
    """
    return _DAY_S if retention_days is None else min(_DAY_S, retention_days * _DAY_S / 10)


def remove_expired(state_dir: Path, retention_days: float, *, now: float, disk: Disk | None = None) -> int:
    """Remove what is older; gives how many segments. `now`: seconds since the epoch.

    What a segment says about audits is written down before (serving.removed). Killed at any moment, it goes on from
    there the next time. What can't be removed (a read-only disk) is left for then. Does nothing while somebody else
    removes something.
    """
    disk = disk or Disk()
    with removing_alone(state_dir, wait=False) as alone:
        if not alone:
            return 0
        before = now - retention_days * _DAY_S
        gone = 0
        for task in task_names(state_dir):
            gone += _remove_expired(state_dir, task, before, disk)
            with contextlib.suppress(OSError):
                # By then the segment with the exchange is gone: before, the student would be asked once more.
                remove_old_answers(state_dir, task, before - oldest_open_s(retention_days), disk)
            with contextlib.suppress(OSError):
                # Of a process that was killed: it holds texts of the log.
                training = training_directory(state_dir, task)
                if training.stat().st_mtime < before:
                    shutil.rmtree(training)
        return gone


def _remove_expired(state_dir: Path, task: str, before: float, disk: Disk) -> int:
    clear_unfinished(events_directory(state_dir, task), disk)
    removed = read_removed(state_dir, task)
    audits: Counter[str] = Counter()
    expired: list[Path] = []
    for path in segment_paths(state_dir, task):
        with contextlib.suppress(OSError):
            if path.with_name(path.name + OPEN_SUFFIX).exists():
                continue
            digest = digest_of(path)
            # One without a readable event is as old as its file.
            if (digest.newest or path.stat().st_mtime) < before:
                expired.append(path)
                if path.name not in removed.removing:
                    audits += digest.audits
    if not expired and not removed.removing:
        return 0
    gone = 0
    with contextlib.suppress(OSError):
        if expired:
            write_removed(state_dir, task, audits, frozenset(path.name for path in expired), disk)
            for path in expired:
                disk.remove(path.with_name(path.name + DIGEST_SUFFIX))
                disk.remove(path)
                gone += 1
            disk.sync_directory(expired[0].parent)
        # They are gone for good: in a container the next process may give their names to new segments.
        write_removed(state_dir, task, {}, frozenset(), disk)
    return gone
