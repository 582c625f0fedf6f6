"""Releases on disk: complete or not there at all, checked whenever they are read, and the one that is live.

- `state/tasks/<task>/releases/r0001/card.json`: what the release is, with checksums of its files and itself
- `state/tasks/<task>/releases/r0001/…`: its files
- `state/tasks/<task>/live`: which one answers (serving.live); replaced atomically
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import orjson

from serving.disk import Disk
from serving.errors import DamagedRelease, UnknownRelease, WithdrawnMeanwhile
from serving.exchange import Json
from serving.file_lock import locked
from serving.layout import task_directory, task_names
from serving.live import RELEASE_NAME, Cause, Live, Withdrawal, parse_live
from serving.shared_files import write_shared

CANDIDATE_FILE = "candidate.json"
"""The file of a task that holds a student which is being tested by the labels that come in, beside its releases."""

HELD_OUT_FILE = "held_out.json"
"""The file of a release that remembers, by the ids of its exchanges, what the release was fitted on."""

SKIPPED_FILE = "skipped.json"
"""The same for what it would not have shown its student, by the ids of its exchanges."""

REFUSED_FILE = "refused.json"
"""The same for those whose answers it would have vetoed by the labels of others."""

TAUGHT_FILE = "taught.json"
"""The file of a release that names, by their ids, the exchanges that trained a student which they don't judge."""

_CARD = "card.json"
_FILE = re.compile(r"(?:[A-Za-z0-9_][A-Za-z0-9._-]*/)*[A-Za-z0-9_][A-Za-z0-9._-]*")
_TEMPORARY = ".writing-"
_REPLACED = ".replaced-"
_MAX_PREVIOUS = 20


@dataclass(frozen=True, slots=True)
class Release:
    """One release, read whole and found intact. `files` doesn't contain the card."""

    task: str
    name: str
    card: Json
    files: dict[str, bytes]


class ReleaseStore:
    """All releases under one state directory. Safe to use from several processes at once.

    Every method takes the task's name and raises UnknownTask for what can't be one, and OSError as the disk
    does.
    """

    def __init__(self, state_dir: Path, *, disk: Disk | None = None) -> None:
        self._state_dir = state_dir
        self._disk = disk or Disk()

    def write(self, task: str, files: Mapping[str, bytes], card: Json) -> str:
        """Store a release; gives its name (`r0001`, `r0002`, …). It isn't live by that.

        The card gets `task`, `release`, `files` (name → SHA-256) and `checksum` (its own). File names may
        contain `/`; one that could leave the directory, and `card.json`, raise ValueError.
        """
        for name in files:
            if name == _CARD or not _FILE.fullmatch(name):
                raise ValueError(
                    f"{name!r} can't be a file of a release: use letters, digits, '.', '_', '-' and '/'"
                )
        releases = self._releases(task)
        self._disk.make_directory(releases)
        with locked(releases / ".lock"):
            self._clear_up(releases)
            release = self._next_name(task)
            card = {
                **card,
                "task": task,
                "release": release,
                "files": {name: hashlib.sha256(data).hexdigest() for name, data in files.items()},
            }
            temporary = releases / f"{_TEMPORARY}{release}"
            self._write(temporary, files, card)
            self._disk.rename(temporary, releases / release)
            self._disk.sync_directory(releases)
        return release

    def rewrite(self, task: str, release: str, files: Mapping[str, bytes]) -> None:
        """Replace files of a release; all others, and what its card says of it, stay as they are.

        Whoever reads it meanwhile reads the old or the new one. A process that dies in here leaves one of the
        two. Raises UnknownRelease or DamagedRelease.
        """
        releases = self._releases(task)
        with locked(releases / ".lock"):
            now = self.read(task, release)
            self._clear_up(releases)
            content = {**now.files, **files}
            checksums = {name: hashlib.sha256(data).hexdigest() for name, data in content.items()}
            temporary, old = releases / f"{_TEMPORARY}{release}", releases / f"{_REPLACED}{release}"
            self._write(temporary, content, {**now.card, "files": checksums})
            self._disk.rename(releases / release, old)
            self._disk.rename(temporary, releases / release)
            self._disk.sync_directory(releases)
            shutil.rmtree(old)

    def _write(self, directory: Path, files: Mapping[str, bytes], card: Json) -> None:
        directory.mkdir()
        for name, data in files.items():
            self._disk.make_directory((directory / name).parent)
            write_shared(
                directory / name, data, card["files"][name], state_dir=self._state_dir, disk=self._disk
            )
            self._disk.sync_directory((directory / name).parent)
        card = {**card, "checksum": _checksum(card)}
        self._disk.write_file(directory / _CARD, orjson.dumps(card, option=orjson.OPT_INDENT_2))
        self._disk.sync_directory(directory)

    def _clear_up(self, releases: Path) -> None:
        """Finish or undo what a writer that died has left: whoever writes holds the lock."""
        for old in releases.glob(f"{_REPLACED}*"):
            if (releases / old.name.removeprefix(_REPLACED)).is_dir():
                shutil.rmtree(old)
            else:
                self._disk.rename(old, releases / old.name.removeprefix(_REPLACED))
                self._disk.sync_directory(releases)
        for leftover in releases.glob(f"{_TEMPORARY}*"):
            shutil.rmtree(leftover)

    def read(self, task: str, release: str) -> Release:
        """Read a release and verify every byte of it. Raises UnknownRelease or DamagedRelease."""
        try:
            return self._read(task, release)
        except (DamagedRelease, UnknownRelease):
            return self._read(task, release)  # it may have been rewritten while it was read

    def _read(self, task: str, release: str) -> Release:
        directory = self._directory(task, release)
        card = self._card(task, release)
        files: dict[str, bytes] = {}
        for name, checksum in card["files"].items():
            try:
                data = (directory / name).read_bytes()
            except OSError as error:
                raise self._damaged(task, release, f"{name} can't be read ({error.strerror})") from error
            if hashlib.sha256(data).hexdigest() != checksum:
                raise self._damaged(task, release, f"{name} doesn't match its checksum")
            files[name] = data
        return Release(task, release, card, files)

    def list(self, task: str) -> list[Json]:
        """The cards of the task's releases, oldest first.

        Releases whose card is damaged or missing are left out.
        """
        cards: list[Json] = []
        for release in self.names(task):
            try:
                cards.append(self._card(task, release))
            except (DamagedRelease, UnknownRelease):
                continue
        return cards

    def card(self, task: str, release: str) -> Json:
        """The card of a release, whose files aren't read. Raises UnknownRelease or DamagedRelease."""
        return self._card(task, release)

    def live(self, task: str) -> Live | None:
        """What is live, or None if nothing ever was.

        Reads one small file. Raises DamagedRelease if that is damaged.
        """
        path = self._live(task)
        try:
            data = path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
        live = parse_live(data)
        if live is None:
            raise DamagedRelease(
                f"{path} says {data[:60]!r}, which names no release; write it anew with: "
                f"understudy promote {task} <release>"
            )
        return live

    def set_live(self, task: str, release: str | None, *, fence: float | None = None) -> Live:
        """Make a release live; None withdraws, and the task's requests go to the teacher.

        The release is read first: an unknown or damaged one raises UnknownRelease or DamagedRelease and
        changes nothing. `fence` is `Live.fence` when its labels were read: if the watch has withdrawn a release since,
        they are too old, and WithdrawnMeanwhile is raised, as if it may have: where `live` is damaged. Only without
        `fence`, when a person says so, a damaged one is written anew.
        """
        if release is not None:
            self.read(task, release)
        with self._changing(task) as now:
            if fence is not None and now.fence > fence:
                taken = now.withdrawals[-1].release if now.withdrawals else "what is in a file now damaged"
                raise WithdrawnMeanwhile(
                    f"{release} was learned while {taken} was withdrawn: its labels came before"
                )
            previous = list(now.previous)
            # A withdrawn release isn't a way back: rollback must not return to what was just taken away.
            if release is not None and now.release not in (None, release):
                previous = [now.release or "", *previous]
            since = now.since if release is not None and now.release == release else time.time()
            return self._replace(task, now, release, previous[:_MAX_PREVIOUS], since)

    def withdraw(self, task: str, live: Live, cause: Cause, said: str) -> Live | None:
        """Take away what the watch found broken, and say why; None: it isn't `live` any more, and nothing changes."""
        with self._changing(task) as now:
            if live.release is None or now.generation != live.generation:
                return None
            taken = Withdrawal(live.release, cause, time.time(), said)
            now = dataclasses.replace(now, withdrawals=[*now.withdrawals, taken])
            return self._replace(task, now, None, now.previous, taken.at)

    def rollback(self, task: str) -> Live:
        """Go back to the release that was live before and is still intact; if there is none, withdraw.

        Raises UnknownRelease if no release is live and none was before: there is nothing to go back from. A
        damaged `live` raises DamagedRelease.
        """
        live = self.live(task)
        if live is None or (live.release is None and not live.previous):
            raise self.unknown(
                task, f"no release of task {task} is live, so there is nothing to go back from"
            )
        with self._changing(task) as now:
            for position, release in enumerate(now.previous):
                try:
                    self.read(task, release)
                except (UnknownRelease, DamagedRelease):
                    continue
                return self._replace(task, now, release, now.previous[position + 1 :], time.time())
            return self._replace(task, now, None, [], time.time())

    @contextmanager
    def _changing(self, task: str) -> Iterator[Live]:
        """What is live now, while nobody else can change it."""
        self._disk.make_directory(task_directory(self._state_dir, task))
        with locked(task_directory(self._state_dir, task) / ".live.lock"):
            try:
                now = self.live(task)
            except DamagedRelease:
                # The generation is lost with the file. Seconds since 1970 are more than any count of
                # promotions. What the watch withdrew is lost as well: what was labelled until now may be of before.
                now = Live(None, int(time.time()), [], lost_until=time.time())
            yield now or Live(None, 0, [])

    def _replace(
        self, task: str, now: Live, release: str | None, previous: Sequence[str], since: float
    ) -> Live:
        """Write what comes after `now`."""
        live = Live(release, now.generation + 1, list(previous), since, now.withdrawals, now.lost_until)
        path = self._live(task)
        temporary = path.with_name(".live.writing")
        temporary.unlink(missing_ok=True)
        self._disk.write_file(temporary, live.dump() + b"\n")
        self._disk.rename(temporary, path)
        self._disk.sync_directory(path.parent)
        return live

    def _card(self, task: str, release: str) -> Json:
        try:
            card = orjson.loads((self._directory(task, release) / _CARD).read_bytes())
        except OSError as error:
            raise self._damaged(task, release, f"{_CARD} can't be read ({error.strerror})") from error
        except orjson.JSONDecodeError as error:
            raise self._damaged(task, release, f"{_CARD} is no JSON") from error
        if not isinstance(card, dict) or card.get("checksum") != _checksum(card):
            raise self._damaged(task, release, f"{_CARD} doesn't match its own checksum")
        if (card["task"], card["release"]) != (task, release):
            raise self._damaged(task, release, f"{_CARD} is that of {card['task']}/{card['release']}")
        return card

    def _damaged(self, task: str, release: str, what: str) -> DamagedRelease:
        return DamagedRelease(
            f"release {release} of task {task} is damaged: {what} in {self._releases(task) / release}. "
            f"Put the directory back from a backup, or go back with: understudy rollback {task}"
        )

    def _next_name(self, task: str) -> str:
        taken = self.names(task)
        try:
            live = self.live(task)
        except DamagedRelease:
            live = None
        if (
            live is not None
        ):  # names of releases that were deleted aren't given again while `live` remembers them
            taken += (*live.previous, live.release or "r0000")
        return f"r{max((int(name[1:]) for name in taken), default=0) + 1:04}"

    def names(self, task: str) -> tuple[str, ...]:
        """Every release that has a directory, intact or not, by number."""
        try:
            folders = [p for p in self._releases(task).iterdir() if p.is_dir()]
        except (FileNotFoundError, NotADirectoryError):
            return ()
        names = {folder.name.removeprefix(_REPLACED) for folder in folders}
        return tuple(sorted(filter(RELEASE_NAME.fullmatch, names), key=lambda name: int(name[1:])))

    def _directory(self, task: str, release: str) -> Path:
        directory = self._releases(task) / release
        if not directory.is_dir():
            directory = self._releases(task) / f"{_REPLACED}{release}"  # for a moment, or since a writer died
        if not RELEASE_NAME.fullmatch(release) or not directory.is_dir():
            known = ", ".join(self.names(task)) or "none yet"
            raise self.unknown(task, f"task {task} has no release {release!r}; it has: {known}")
        return directory

    def unknown(self, task: str, said: str) -> UnknownRelease:
        """The error to raise: `said`, unless there is no such task; then that, and which there are."""
        if not task_directory(self._state_dir, task).is_dir():
            known = ", ".join(task_names(self._state_dir)) or "none yet"
            said = f"there is no task {task} under {self._state_dir}; there are: {known}"
        return UnknownRelease(said)

    def _releases(self, task: str) -> Path:
        return task_directory(self._state_dir, task) / "releases"

    def _live(self, task: str) -> Path:
        return task_directory(self._state_dir, task) / "live"


def _checksum(card: Json) -> str:
    content = {name: value for name, value in card.items() if name != "checksum"}
    return hashlib.sha256(orjson.dumps(content, option=orjson.OPT_SORT_KEYS)).hexdigest()
