"""The audits of a task's log: how many there were, which are owed, how they ended. Reads only what is new."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from serving.audit_trail import Trail, put_together
from serving.events import decode, fold
from serving.exchange import Exchange
from serving.removed import Removed, read_removed
from serving.segment_digest import Digest, digest_of
from serving.segments import OPEN_SUFFIX, segment_paths


@dataclass(slots=True)
class _Known:
    """What was last seen of a segment."""

    stamp: tuple[int, int, int]
    digest: Digest


class AuditIndex:
    """Knows the segments it has seen. For one thread at a time; raises what `segment_paths` does.

    `trails`: whether to remember what `trail` tells, which takes memory.
    """

    def __init__(self, state_dir: Path, *, trails: bool = False) -> None:
        self._state_dir = state_dir
        self._trails = trails
        self._known: dict[str, dict[str, _Known]] = {}

    def accepted(self, task: str, release: str) -> int:
        """Count the audits of what a release answered, those in segments that were removed included."""
        removed = read_removed(self._state_dir, task)
        found = self._look(task, removed)
        counted = sum((known.digest.audits for known in found.values()), Counter(removed.audits))
        return counted[release]

    def owed(self, task: str) -> list[Exchange]:
        """Return the exchanges whose audit has not come to an end."""
        found = self._look(task, read_removed(self._state_dir, task))
        settled: set[str] = set().union(*(known.digest.settled for known in found.values()))
        owed = []
        for path in segment_paths(self._state_dir, task):
            known = found.get(path.name)
            wanted = {id: at for id, at in known.digest.owed.items() if id not in settled} if known else {}
            if wanted:
                owed += _read(path, wanted)
        return owed

    def trail(self, task: str, after: float) -> Trail:
        """What the log tells the watch of the time after `after`, in seconds since the epoch.

        Segments whose last event came before are forgotten: `after` must not go back. Raises ValueError for an index
        that keeps no trails.
        """
        if not self._trails:
            raise ValueError("this index keeps no trails")
        found = self._look(task, read_removed(self._state_dir, task))
        for known in found.values():
            if known.digest.newest < after:
                known.digest.trail = Trail()
        return put_together(known.digest.trail for known in found.values())

    def _look(self, task: str, removed: Removed) -> dict[str, _Known]:
        before = self._known.get(task, {})
        found: dict[str, _Known] = {}
        for path in segment_paths(self._state_dir, task):
            if path.name in removed.removing:
                continue  # it is counted there, and about to go
            known = self._read(path, before.get(path.name))
            if known is not None:
                found[path.name] = known
        self._known[task] = found
        return found

    def _read(self, path: Path, known: _Known | None) -> _Known | None:
        """What a segment says; None if it is gone or can't be read."""
        for name in (path, path.with_name(path.name + OPEN_SUFFIX), path):
            try:
                status = name.stat()
                stamp = (status.st_ino, status.st_size, status.st_mtime_ns)
                if known is not None and known.stamp == stamp:
                    return known
                if known is not None and (known.stamp[0], name.suffix) == (stamp[0], OPEN_SUFFIX):
                    known.digest.read_on(name)  # an open segment only grows
                    return self._known_of(stamp, known.digest)
                if name == path:
                    return self._known_of(stamp, digest_of(name))
                digest = Digest()
                digest.read_on(name)
                return self._known_of(stamp, digest)
            except FileNotFoundError:
                continue
            except OSError:
                return None
        return None

    def _known_of(self, stamp: tuple[int, int, int], digest: Digest) -> _Known:
        if not self._trails:
            digest.trail = Trail()
        return _Known(stamp, digest)


def _read(path: Path, wanted: dict[str, tuple[int, int]]) -> list[Exchange]:
    """Read single lines of a segment."""
    for name in (path, path.with_name(path.name + OPEN_SUFFIX), path):
        try:
            with name.open("rb") as file:
                events = []
                for offset, length in sorted(wanted.values()):
                    file.seek(offset)
                    events.append(decode(file.read(length)))
            # Only if it is still the line it was.
            exchanges = fold(event for event in events if event is not None and event.get("id") in wanted)
            return [exchange for exchange in exchanges.values() if exchange.audit_owed]
        except FileNotFoundError:
            continue
        except OSError:
            return []
    return []
