"""Whether the log can be written, for those who ask every moment: load balancers, and anybody without a key."""

from __future__ import annotations

import asyncio
import tempfile
import time
from pathlib import Path

_LOOK_EVERY_S = 1.0
_PATIENCE_S = 1.0


class LogProbe:
    """Looks once a second at most, one look at a time: a disk that hangs costs one thread, however many ask.

    A look is one file without a name, written beside the log.
    """

    def __init__(self, state_dir: Path) -> None:
        self._folder = state_dir / "tasks"
        self._look: asyncio.Task[str | None] | None = None
        self._began = 0.0

    async def problem(self) -> str | None:
        """Say why the log can't be written, as of the last second; None when it can. Waits a second at most."""
        now = time.monotonic()
        if self._look is None or (self._look.done() and now - self._began >= _LOOK_EVERY_S):
            self._began = now
            self._look = asyncio.create_task(asyncio.to_thread(_problem_in, self._folder))
        look, began = self._look, self._began
        await asyncio.wait([look], timeout=max(0.0, began + _PATIENCE_S - now))
        if not look.done():
            return f"the disk of the state directory hasn't answered for {time.monotonic() - began:.0f} s"
        return look.result()


def _problem_in(folder: Path) -> str | None:
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"ready")
    except OSError as error:
        return f"the state directory isn't writable: {error.strerror}"
    return None
