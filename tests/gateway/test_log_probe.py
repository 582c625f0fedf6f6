"""How often `/readyz` looks at the disk."""

from __future__ import annotations

import asyncio
import shutil
import time
from pathlib import Path

from gateway.log_probe import LogProbe


def test_many_who_ask_get_one_look(tmp_path: Path) -> None:
    (tmp_path / "tasks").mkdir()

    async def run() -> None:
        probe = LogProbe(tmp_path)
        before = time.monotonic()
        assert set(await asyncio.gather(*(probe.problem() for _ in range(100)))) == {None}
        shutil.rmtree(tmp_path / "tasks")
        known = await probe.problem()
        if time.monotonic() - before < 1.0:
            assert known is None, "what is known from within the last second"
        async with asyncio.timeout(10):
            while (found := await probe.problem()) is None:  # noqa: ASYNC110 - of a disk nobody tells
                await asyncio.sleep(0.05)
        assert found == "the state directory isn't writable: No such file or directory"

    asyncio.run(run())
