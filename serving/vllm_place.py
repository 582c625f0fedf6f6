"""Where the vLLM is that `understudy serve --vllm` runs: a file by which workers, `learn` and `doctor` find it.

`state/vllm.json`, which only its owner may read, since it holds the server's key. It counts while the process that
wrote it lives, which holds `flock(state/vllm.lock)`: after a kill -9 somebody else may listen on that port.
"""

from __future__ import annotations

import fcntl
import os
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal, get_args

import orjson

from serving.exchange import Json

SCHEMA = 1
_FILE = "vllm.json"
_LOCK = "vllm.lock"

Phase = Literal["starting", "ready", "waiting"]
"""`waiting`: until it is started again."""


@dataclass(frozen=True, slots=True)
class VllmPlace:
    """A server and how it is: `url` is its root, without /v1; `error` why it isn't there, if it isn't.

    `restarts`: how often it was started again since the gateway's start.
    """

    phase: Phase
    url: str
    key: str
    model: str
    restarts: int = 0
    error: str | None = None


def lock_file(state_dir: Path) -> IO[str] | None:
    """The lock of whoever runs a vLLM for this state directory, taken: closing gives it back. None: another has it."""
    lock = (state_dir / _LOCK).open("a")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        return None
    return lock


def write_place(state_dir: Path, place: VllmPlace) -> None:
    """Say where it is. Only who has the lock may. Raises OSError."""
    said = {"schema": SCHEMA, **{name: getattr(place, name) for name in VllmPlace.__slots__}}
    written = state_dir / f".{_FILE}"
    descriptor = os.open(written, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        os.fchmod(descriptor, 0o600)  # one that was there may have been readable
        file.write(orjson.dumps(said))
    written.replace(state_dir / _FILE)


def remove_place(state_dir: Path) -> None:
    """Say that there is none any more."""
    (state_dir / _FILE).unlink(missing_ok=True)


def read_place(state_dir: Path) -> VllmPlace | None:
    """Where it is; None if nobody runs one, or nothing that can be read says so."""
    try:
        said: Json = orjson.loads((state_dir / _FILE).read_bytes())
        if said["schema"] != SCHEMA or said["phase"] not in get_args(Phase) or not _is_held(state_dir):
            return None
        return VllmPlace(**{name: said[name] for name in VllmPlace.__slots__})
    except (OSError, KeyError, TypeError, ValueError):
        return None


def _is_held(state_dir: Path) -> bool:
    with (state_dir / _LOCK).open() as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
