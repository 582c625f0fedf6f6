"""What a gateway that runs must write nothing about any more: `state/forgotten.json`.

Ids of exchanges that were erased lately, and of nothing else: that there was something to forget is all it tells.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import orjson

from serving.disk import Disk

_FILE = "forgotten.json"

Stamp = tuple[int, int]
"""Changes whenever the file does."""


def forgotten_stamp(state_dir: Path) -> Stamp | None:
    """The stamp of the file, None if there is none."""
    try:
        status = (state_dir / _FILE).stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_ino


def read_forgotten(state_dir: Path) -> dict[str, float]:
    """The ids, and when they were forgotten (seconds since the epoch). Never raises: none, if it can't be read."""
    try:
        found = orjson.loads((state_dir / _FILE).read_bytes())
        return {str(id): float(at) for id, at in found["ids"].items()}
    except (OSError, AttributeError, KeyError, TypeError, ValueError):
        return {}


def write_forgotten(state_dir: Path, ids: Mapping[str, float], disk: Disk) -> None:
    """Put others in their place, durably. Raises OSError."""
    path = state_dir / _FILE
    temporary = path.with_name(f".{_FILE}.writing")
    disk.remove(temporary)
    disk.write_file(temporary, orjson.dumps({"ids": ids}))
    disk.rename(temporary, path)
    disk.sync_directory(state_dir)
