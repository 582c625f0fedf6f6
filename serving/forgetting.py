"""Forgetting: erasing from the log, for good, what a tenant or an end user has left there.

The segments that hold any of it are written anew without it and put in the place of the old ones, one by one: a
process that dies in between leaves some erased and some not, each of them whole, and the next run does the rest.

It works while gateways run. They read `state/forgotten.json` twice a second: what is to be forgotten of lately, by the
ids of its exchanges. From then on they write nothing about those any more (an audit may still be under way), and seal
the segments they have open, so that these can be written anew too.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import orjson

from serving.disk import Disk
from serving.errors import DamagedRelease, UnknownRelease
from serving.events import EVENT_ID, decode
from serving.exchange import Json
from serving.forgotten import read_forgotten, write_forgotten
from serving.layout import task_directory, task_names, training_directory
from serving.releases import (
    CANDIDATE_FILE,
    HELD_OUT_FILE,
    REFUSED_FILE,
    SKIPPED_FILE,
    TAUGHT_FILE,
    ReleaseStore,
)
from serving.removed import clear_unfinished, read_removed, removing_alone, unfinished, write_removed
from serving.segment_digest import DIGEST_SUFFIX, audited_release
from serving.segments import OPEN_SUFFIX, events_directory, seal_abandoned, segment_lines, segment_paths
from serving.student_answers import erase_answers

NOTICED_WITHIN_S = 1.5
"""A gateway that runs has read what is to be forgotten by then."""

_STRAGGLERS_S = 3600.0
"""An exchange older than this, whose audit isn't owed, gets no more events."""

_REDACTED_REQUEST = b'"redacted":["request"'
_MARK = re.compile(r"\[[^\[\]]+\]")
"""What `log.redact` leaves in the place of something: the name of its kind (serving.redaction)."""

Progress = Callable[[int, int], None]
"""Called with the bytes read so far and the bytes there are to read."""


@dataclass(frozen=True, slots=True)
class Whose:
    """Whose exchanges: of a tenant (the hash that stands in the log), of an end user, or of a tenant's end user.

    An end user is known by the request's `user`, `safety_identifier` or `metadata.user_id`.
    """

    tenant: str | None = None
    user: str | None = None

    def owns(self, event: Json) -> bool:
        """Whether an `answered` event is of theirs."""
        request = event.get("request")
        if not isinstance(request, dict):
            request = {}
        if self.tenant is not None and event.get("tenant") != self.tenant:
            return False
        return self.user is None or self.user in _end_users(request)

    def may_own_redacted(self, line: bytes) -> bool:
        """Whether a line is an exchange that may be of theirs, but that their id was replaced by a mark."""
        if self.user is None or _REDACTED_REQUEST not in line:
            return False
        event = decode(line)
        if event is None or event.get("event") != "answered":
            return False
        if self.tenant is not None and event.get("tenant") != self.tenant:
            return False
        request = event.get("request")
        named = _end_users(request) if isinstance(request, dict) else []
        return any(isinstance(name, str) and _MARK.search(name) for name in named)

    def may_own(self, line: bytes) -> bool:
        """Whether a line, whole or damaged, may be of theirs: cheap, and never wrongly False for a whole one."""
        if self.tenant is not None and f'"{self.tenant}"'.encode() not in line:
            return False
        # Written by orjson, or (a request nested very deeply) by the standard library.
        return self.user is None or orjson.dumps(self.user) in line or json.dumps(self.user).encode() in line


def _end_users(request: Json) -> list[object]:
    metadata = request.get("metadata")
    inner = metadata.get("user_id") if isinstance(metadata, dict) else None
    return [request.get("user"), request.get("safety_identifier"), inner]


@dataclass(slots=True)
class Erased:
    """What was erased of one task's log, or would be.

    `events` are lines, `damaged` those of them that can't be read and may have been theirs. `oldest` and `newest` are
    in seconds since the epoch. `releases` maps every release made since the oldest was there to the number of the
    exchanges that it remembers to be fitted on. `student_answers` are those that learning asked the student for.
    """

    exchanges: int = 0
    events: int = 0
    student_answers: int = 0
    damaged: int = 0
    segments: int = 0
    oldest: float | None = None
    newest: float | None = None
    releases: dict[str, int] = field(default_factory=dict)


@dataclass(slots=True)
class Erasure:
    """What came of it, by task. `left` says what could not be erased, in a line each; empty: everything was.

    `unrecognisable` are the exchanges whose end user's id was replaced by `log.redact` before they were logged: some
    may be those of the user that was named, which nobody can tell.
    """

    tasks: dict[str, Erased] = field(default_factory=dict)
    left: list[str] = field(default_factory=list)
    unrecognisable: int = 0


def forget(
    state_dir: Path,
    whose: Whose,
    *,
    dry_run: bool = False,
    timeout_s: float = 30.0,
    noticed_within_s: float = NOTICED_WITHIN_S,
    progress: Progress = lambda _done, _total: None,
    disk: Disk | None = None,
    now: Callable[[], float] = time.time,
) -> Erasure:
    """Erase what is theirs from the log of every task, durably, and from what releases remember of their training.

    Waits for another that removes something, `noticed_within_s` until gateways know, and at most `timeout_s` until they
    have sealed what they had open; what they hold then stands in `left`. `dry_run` changes nothing. Raises
    ValueError if nobody is named, and OSError as the disk does.
    """
    if whose.tenant is None and whose.user is None:
        raise ValueError("whose exchanges? Name a tenant, a user, or both")
    work = _Forgetting(state_dir, whose, disk or Disk(), progress, now)
    if dry_run:
        work.find()
        work.look_into_releases(change=False)
        work.erase_student_answers(change=False)
        return work.erasure
    with removing_alone(state_dir, wait=True):
        seal_abandoned(state_dir)
        work.clear_up()
        work.find()
        if work.erasure.tasks:
            work.tell_gateways()
            # First: once the log has nothing of it any more, the next run wouldn't know what to look for.
            work.look_into_releases(change=True)
            work.erase_student_answers(change=True)
            work.erase(timeout_s, noticed_within_s)
            # From a log of which not all was erased yet. What is being learned from it makes no release from now on:
            work.erase_student_answers(change=True)
            work.look_into_releases(change=True)  # those that were made meanwhile are all there
    return work.erasure


class _Forgetting:
    """One run. `ids` are the exchanges found so far, by task: id → when it was created."""

    def __init__(
        self, state_dir: Path, whose: Whose, disk: Disk, progress: Progress, now: Callable[[], float]
    ) -> None:
        self.erasure = Erasure()
        self._state_dir = state_dir
        self._whose = whose
        self._disk = disk
        self._progress = progress
        self._now = now
        self._ids: dict[str, dict[str, float]] = {}
        self._stragglers: dict[str, float] = {}
        self._read = 0
        self._to_read = 0

    def clear_up(self) -> None:
        """Remove what a run that died has left half-written."""
        for task in task_names(self._state_dir):
            clear_unfinished(events_directory(self._state_dir, task), self._disk)

    def find(self) -> None:
        """Find their exchanges, in sealed and open segments."""
        paths = {task: segment_paths(self._state_dir, task) for task in task_names(self._state_dir)}
        self._to_read = 2 * sum(_size(path) for found in paths.values() for path in found)
        for task, found in paths.items():
            for path in found:
                for line in self._lines(path):
                    self.erasure.unrecognisable += self._whose.may_own_redacted(line)
                    if self._whose.may_own(line) and self._take(task, line) and decode(line) is None:
                        self.erasure.tasks[task].damaged += 1

    def tell_gateways(self) -> None:
        """Have them write nothing more about what they may still be at, and seal what they have open."""
        known = read_forgotten(self._state_dir)
        at = self._now()
        recent = {id: since for id, since in known.items() if since > at - _STRAGGLERS_S}
        write_forgotten(self._state_dir, {**recent, **dict.fromkeys(self._stragglers, at)}, self._disk)

    def erase(self, timeout_s: float, noticed_within_s: float) -> None:
        """Write every segment anew that holds any of it, once it is sealed."""
        time.sleep(noticed_within_s)
        deadline = time.monotonic() + timeout_s
        done: set[tuple[str, str]] = set()
        told = time.monotonic()
        while True:
            seal_abandoned(self._state_dir)
            waiting = []
            for task in self.erasure.tasks:
                for path in segment_paths(self._state_dir, task):
                    if (task, path.name) not in done:
                        if self._erase_from(task, path):
                            done.add((task, path.name))
                        else:
                            waiting.append(path)
            if not waiting:
                return
            if time.monotonic() > deadline:
                self.erasure.left += [
                    f"{path.name}{OPEN_SUFFIX} of task {path.parents[1].name} is still being written to"
                    for path in waiting
                ]
                return
            if time.monotonic() - told > 2 * NOTICED_WITHIN_S:
                self.tell_gateways()  # a segment that was opened just before it was noticed
                told = time.monotonic()
            time.sleep(0.1)

    def look_into_releases(self, *, change: bool) -> None:
        """Name the releases made since, and take the exchanges out of what they remember of their training."""
        store = ReleaseStore(self._state_dir, disk=self._disk)
        for task, erased in self.erasure.tasks.items():
            ids = self._ids.get(task, {})
            for name in store.names(task):
                try:
                    release = store.read(task, name)
                    remembered = {
                        file: orjson.loads(release.files[file])
                        for file in (HELD_OUT_FILE, SKIPPED_FILE, REFUSED_FILE, TAUGHT_FILE)
                        if file in release.files
                    }
                    fitted = {id for rows in remembered.values() for id in rows if id in ids}
                    kept = {
                        file: orjson.dumps({id: row for id, row in rows.items() if id not in ids})
                        for file, rows in remembered.items()
                    }
                    made = float(release.card.get("created", math.inf))
                except (DamagedRelease, UnknownRelease, AttributeError, TypeError, ValueError) as error:
                    line = f"release {name} of task {task} can't be looked into: {error}"
                    self.erasure.left += [] if line in self.erasure.left else [line]
                    continue
                trained_on = len(fitted)
                if trained_on or (erased.oldest is not None and made >= erased.oldest):
                    erased.releases[name] = max(trained_on, erased.releases.get(name, 0))
                if change and trained_on:
                    store.rewrite(task, name, kept)
            if change:
                # Learning fixes another, by what is left.
                self._disk.remove(task_directory(self._state_dir, task) / CANDIDATE_FILE)

    def erase_student_answers(self, *, change: bool) -> None:
        """Erase what a student answered to them when learning asked it (serving.student_answers)."""
        for task, erased in self.erasure.tasks.items():
            ids = set(self._ids.get(task, ()))
            erased.student_answers += erase_answers(self._state_dir, task, ids, self._disk, change=change)
            if change:
                # Copies of texts: fine-tuning works on them, which fails for that and says so, or was killed.
                shutil.rmtree(training_directory(self._state_dir, task), ignore_errors=True)

    def _take(self, task: str, line: bytes) -> bool:
        """Note an exchange of theirs, or a damaged line that may be; False if the line is neither."""
        event = decode(line)
        if event is None:
            self.erasure.tasks.setdefault(task, Erased())
            return True
        id, created = event.get("id"), event.get("created")
        if event.get("event") != "answered" or not isinstance(id, str) or not self._whose.owns(event):
            return False
        at = float(created) if isinstance(created, int | float) else 0.0
        erased = self.erasure.tasks.setdefault(task, Erased())
        if id not in self._ids.setdefault(task, {}):
            erased.exchanges += 1
            erased.oldest = at if erased.oldest is None else min(erased.oldest, at)
            erased.newest = at if erased.newest is None else max(erased.newest, at)
        self._ids[task][id] = at
        if event.get("audit") == "pending" or at > self._now() - _STRAGGLERS_S:
            self._stragglers[id] = at
        return True

    def _erase_from(self, task: str, path: Path) -> bool:
        """Write one segment anew without what is theirs; False if it is still open and holds any of it."""
        try:
            if not any(self._is_theirs(task, line) for line in self._lines(path)):
                return True
            if not path.exists():
                return False  # open, or gone by now: the next look tells
            self._rewrite(task, path)
        except FileNotFoundError:
            return True
        self.erasure.tasks[task].segments += 1
        return True

    def _rewrite(self, task: str, path: Path) -> None:
        status = path.stat()
        temporary = unfinished(path)
        audits: Counter[str] = Counter()
        left = 0
        self._disk.remove(temporary)
        fd = self._disk.create(temporary)
        try:
            for line in segment_lines(path):
                if self._is_theirs(task, line):
                    self.erasure.tasks[task].events += 1
                    release = audited_release(decode(line) or {})
                    audits.update([release] if release is not None else [])
                else:
                    self._disk.write(fd, line)
                    left += len(line)
            self._disk.sync(fd)
        finally:
            os.close(fd)
        os.utime(temporary, ns=(status.st_atime_ns, status.st_mtime_ns))  # it isn't younger for that
        self._disk.remove(path.with_name(path.name + DIGEST_SUFFIX))
        if left:
            self._disk.rename(temporary, path)
        else:
            self._disk.remove(path)
            self._disk.remove(temporary)
        self._disk.sync_directory(path.parent)
        # Killed before this, the coin falls a little more often than it would have to: the safe side.
        if audits:
            write_removed(
                self._state_dir, task, audits, read_removed(self._state_dir, task).removing, self._disk
            )

    def _is_theirs(self, task: str, line: bytes) -> bool:
        """Whether a line has to go: an event of one of their exchanges, or what may be left of one."""
        ids = self._ids.get(task, {})
        event_id = EVENT_ID.match(line)
        if event_id is not None and event_id[1].decode("utf-8", "replace") in ids:
            return True
        if self._whose.may_own(line):
            return self._take(task, line)
        if event_id is not None:
            return False
        event = decode(line)
        return event is not None and event.get("id") in ids

    def _lines(self, path: Path) -> Iterator[bytes]:
        """The lines of a segment, counted as progress; none of one that is gone."""
        with contextlib.suppress(FileNotFoundError):
            for line in segment_lines(path):
                self._read += len(line)
                yield line
        self._progress(min(self._read, self._to_read), self._to_read)


def _size(path: Path) -> int:
    for name in (path, path.with_name(path.name + OPEN_SUFFIX)):
        with contextlib.suppress(OSError):
            return name.stat().st_size
    return 0
