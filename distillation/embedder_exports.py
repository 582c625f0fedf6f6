"""The exports of sentence encoders on disk: each is made once, and goes when its folder holds another model.

    state/embedders/<checksum of the folder>/{model.onnx, tokenizer.json}
    state/embedders/sources.json    the folders, and which export each was read as last
    state/embedders/.lock           held by who exports, which may take minutes
    state/embedders/.reading        held by who reads an export, and by who removes one

Releases hold the files of their own, so that removing an export breaks none. A folder is what the configuration calls
it: behind a link that leads elsewhere now, there is another model.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import orjson

from serving.disk import Disk
from serving.encoder_folder import UnfitEncoder
from serving.engines import MODEL_FILE, TOKENIZER_FILE
from serving.file_lock import locked

_SOURCES = "sources.json"
_UNFINISHED = ".making"
_LEAVING = ".removing"


class EmbedderExports:
    """Those under one state directory, for every process that learns."""

    def __init__(self, state_dir: Path, disk: Disk) -> None:
        self._place = state_dir / "embedders"
        self._disk = disk

    def path(self, checksum: str) -> Path:
        """Where the export of a folder with this checksum lies, if it is there."""
        return self._place / checksum

    def setback_of(self, folder: Path) -> Path:
        """The file that says that exporting a folder failed."""
        named = hashlib.sha256(os.fsencode(folder.absolute())).hexdigest()[:16]
        return self._place / f"{named}.setback.json"

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Be the one who exports. Raises OSError."""
        self._disk.make_directory(self._place)
        with locked(self._place / ".lock"):
            yield

    @contextmanager
    def workplace(self) -> Iterator[Path]:
        """An empty folder to export in, for who is alone; it is gone afterwards. Raises OSError."""
        work = self._place / _UNFINISHED
        shutil.rmtree(work, ignore_errors=True)  # of a process that died
        work.mkdir()
        try:
            yield work
        finally:
            shutil.rmtree(work, ignore_errors=True)

    def put(self, made: Path, folder: Path, checksum: str) -> None:
        """Give what was exported of a folder into the workplace its name, durably. For who is alone. Raises OSError.

        What the folder was before goes, as when it is used.
        """
        for name in (MODEL_FILE, TOKENIZER_FILE):
            fd = os.open(made / name, os.O_RDONLY | os.O_CLOEXEC)
            try:
                self._disk.sync(fd)
            finally:
                os.close(fd)
        self._disk.sync_directory(made)
        with locked(self._place / ".reading"):
            # First: there is never one that no folder is known to be, wherever this is broken off.
            self._note(folder, checksum)
            self._disk.rename(made, self.path(checksum))
            self._disk.sync_directory(self._place)

    def read(self, checksum: str) -> Mapping[str, bytes] | None:
        """The files of an export, all of them as they were made together; None: it isn't there.

        Raises UnfitEncoder for what can't be read, and OSError.
        """
        self._disk.make_directory(self._place)
        with locked(self._place / ".reading"):
            if not self.path(checksum).is_dir():
                return None
            return read_export(self.path(checksum) / MODEL_FILE, self.path(checksum) / TOKENIZER_FILE)

    def used(self, folder: Path, checksum: str) -> None:
        """Note that the folder is this export now; the one that it was before goes, if no other folder is that.

        Nobody is reading it then. Raises OSError.
        """
        if self._sources().get(str(folder.absolute())) != checksum:
            with locked(self._place / ".reading"):
                self._note(folder, checksum)

    def _note(self, folder: Path, checksum: str) -> None:
        name, sources = str(folder.absolute()), self._sources()
        before = sources.get(name)
        sources[name] = checksum
        if before is not None and before not in sources.values():
            self._remove(before)
        # Only now: what is broken off before that is done again.
        temporary = self._place / f".{_SOURCES}"
        self._disk.remove(temporary)
        self._disk.write_file(temporary, orjson.dumps(sources))
        self._disk.rename(temporary, self._place / _SOURCES)
        self._disk.sync_directory(self._place)

    def _remove(self, checksum: str) -> None:
        """It is never there in part: what is removed has another name."""
        leaving = self._place / _LEAVING
        shutil.rmtree(leaving, ignore_errors=True)  # of a process that died
        if self.path(checksum).is_dir():
            self._disk.rename(self.path(checksum), leaving)
        shutil.rmtree(leaving, ignore_errors=True)

    def _sources(self) -> dict[str, str]:
        """Folders and checksums. Where that can't be read nothing is known, and what is there stays."""
        try:
            read = orjson.loads((self._place / _SOURCES).read_bytes())
        except (OSError, orjson.JSONDecodeError):
            return {}
        known = read.items() if isinstance(read, dict) else ()
        return {folder: checksum for folder, checksum in known if _is_checksum(checksum)}


def read_export(model: Path, tokenizer: Path) -> Mapping[str, bytes]:
    """The two files of an export. Raises UnfitEncoder."""
    files = {}
    for name, path in ((MODEL_FILE, model), (TOKENIZER_FILE, tokenizer)):
        try:
            files[name] = path.read_bytes()
        except OSError as error:
            raise UnfitEncoder(
                f"student.embedder: {path} can't be read ({error.strerror}): copy or export it again"
            ) from error
    return files


def _is_checksum(value: object) -> bool:
    """Whether it is one, and so names nothing outside."""
    return isinstance(value, str) and len(value) == 16 and set(value) <= set("0123456789abcdef")
