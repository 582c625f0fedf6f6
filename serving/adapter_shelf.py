"""Where the servers of language models find the adapters: one folder for each, which never changes.

    state/adapters/understudy-<12 hex>/          adapter_config.json, adapter_model.safetensors
    state/adapters/understudy-<12 hex>.servers   a JSON line for each server that was told to load it

A server keeps the path and reads it again when it had to make room meanwhile. So it is given neither the folder that
was configured, where the next training may write something else, nor that of a release, of which learning has none yet.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import orjson

from serving.adapter import NAME, Adapter
from serving.disk import Disk

_SERVERS = ".servers"
_USED = ".used.lock"
_WRITING = ".writing.lock"
_TEMPORARY = ".writing-"


@dataclass(frozen=True, slots=True)
class Loaded:
    """A server that was told to load an adapter; `api_key_env` names the environment variable with its key."""

    base_url: str
    api_key_env: str | None


class AdapterShelf:
    """The adapters of one state directory. Safe to use from several processes at once.

    `seen_at` is where the servers see `state_dir/adapters`, if that isn't where it is seen from here. Every method
    raises OSError as the disk does, and ValueError for a name that no adapter has.
    """

    def __init__(self, state_dir: Path, *, seen_at: Path | None = None, disk: Disk | None = None) -> None:
        self._folder = state_dir / "adapters"
        self._seen_at = seen_at
        self._disk = disk or Disk()

    def put(self, adapter: Adapter) -> None:
        """See that an adapter lies there, whole."""
        with self.in_use():
            one_writes = self._locked(_WRITING, fcntl.LOCK_EX)
            try:
                if not self._holds(adapter):
                    self._write(adapter)
            finally:
                os.close(one_writes)

    def _write(self, adapter: Adapter) -> None:
        folder = self._of(adapter.name)
        temporary = self._folder / f"{_TEMPORARY}{adapter.name}"
        shutil.rmtree(temporary, ignore_errors=True)  # of a writer that died
        temporary.mkdir()
        for name, data in adapter.content().items():
            self._disk.write_file(temporary / name, data)
        self._disk.sync_directory(temporary)
        shutil.rmtree(folder, ignore_errors=True)  # damaged, if it is there at all
        self._disk.rename(temporary, folder)
        self._disk.sync_directory(self._folder)

    def _holds(self, adapter: Adapter) -> bool:
        folder = self._of(adapter.name)
        return all(_is(folder / name, data) for name, data in adapter.content().items())

    def path(self, name: str) -> str:
        """Where a server finds an adapter."""
        folder = self._of(name)
        return str(folder.resolve() if self._seen_at is None else self._seen_at / name)

    def names(self) -> list[str]:
        """The adapters that lie there."""
        try:
            return sorted(found.name for found in self._folder.iterdir() if NAME.fullmatch(found.name))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def note(self, name: str, server: Loaded) -> None:
        """Remember that a server was told to load an adapter."""
        if server in self.servers(name):
            return
        self._disk.make_directory(self._folder)
        line = orjson.dumps(server) + b"\n"
        noted = self._folder / f"{self._of(name).name}{_SERVERS}"
        # Not for everybody to read: a base URL may hold credentials.
        fd = os.open(noted, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o640)
        try:
            self._disk.write(fd, line)
        finally:
            os.close(fd)

    def servers(self, name: str) -> list[Loaded]:
        """The servers that were told to load an adapter. A line that can't be read is none."""
        try:
            lines = (self._folder / f"{self._of(name).name}{_SERVERS}").read_bytes().splitlines()
        except FileNotFoundError:
            return []
        found: dict[Loaded, None] = {}
        for line in lines:
            with contextlib.suppress(orjson.JSONDecodeError, KeyError, TypeError):
                said = orjson.loads(line)
                found[Loaded(str(said["base_url"]), said["api_key_env"])] = None
        return list(found)

    def remove(self, name: str) -> None:
        """Take an adapter away. No server may have it any more."""
        shutil.rmtree(self._of(name), ignore_errors=True)
        self._disk.remove(self._folder / f"{name}{_SERVERS}")

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Keep every adapter from being taken away; waits while one is."""
        fd = self._locked(_USED, fcntl.LOCK_SH)
        try:
            yield
        finally:
            os.close(fd)

    @contextmanager
    def tidying(self) -> Iterator[bool]:
        """Keep adapters from being put there or used, if nobody is at that just now: then True."""
        try:
            fd = self._locked(_USED, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        try:
            yield True
        finally:
            os.close(fd)

    def _locked(self, name: str, how: int) -> int:
        self._disk.make_directory(self._folder)
        fd = os.open(self._folder / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
        try:
            fcntl.flock(fd, how)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def _of(self, name: str) -> Path:
        if not NAME.fullmatch(name):
            raise ValueError(f"no adapter is named {name!r}")
        return self._folder / name


def _is(path: Path, data: bytes) -> bool:
    try:
        return path.stat().st_size == len(data) and path.read_bytes() == data
    except OSError:
        return False
