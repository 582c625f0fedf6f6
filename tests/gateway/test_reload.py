"""A changed configuration is taken in while requests are served."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from gateway.reload import FIXED, Generation, reloadable
from serving.log_settings import LogSettings
from serving.server_settings import ServerSettings
from serving.settings import Settings
from serving.student_settings import StudentSettings

Start = Callable[..., Any]


def test_what_is_fixed_stays_and_is_named(tmp_path: Path) -> None:
    old = Settings(state_dir=tmp_path)
    new = Settings(
        state_dir=tmp_path / "elsewhere",
        server=ServerSettings(port=1, max_tasks=7),
        log=LogSettings(segment_bytes=5000),
    )
    settings, kept = reloadable(old, new)
    assert kept == ["state_dir", "server.port", "log.segment_bytes"]
    assert settings.state_dir == tmp_path
    assert settings.server.port == old.server.port
    assert settings.server.max_tasks == 7
    assert reloadable(old, old) == (old, [])


def test_where_servers_see_adapters_takes_a_restart(tmp_path: Path) -> None:
    # The shelf that says so lasts as long as the gateway.
    old = Settings(state_dir=tmp_path)
    new = Settings(state_dir=tmp_path, student=StudentSettings(adapters_at=Path("/mnt/adapters")))
    settings, kept = reloadable(old, new)
    assert kept == ["student.adapters_at"]
    assert settings.student.adapters_at is None


def test_every_fixed_key_exists() -> None:
    for key in FIXED:
        section, _, name = key.rpartition(".")
        holder = getattr(Settings(), section) if section else Settings()
        assert name in type(holder).model_fields


def test_what_takes_a_restart_is_documented() -> None:
    text = (Path(__file__).parents[2] / "docs" / "operations.md").read_text(encoding="utf-8")
    (said,) = re.findall(r"Rotate a key[^.]*\.(.*?)take a restart", text, re.S)
    assert re.findall(r"`([a-z_.]+)`", said) == list(FIXED)


@pytest.mark.parametrize("users", [0, 1, 2])
def test_a_generation_is_taken_down_after_its_last_request(users: int) -> None:
    async def play() -> list[str]:
        happened: list[str] = []

        async def note(what: str) -> None:
            happened.append(what)

        stack = AsyncExitStack()
        stack.push_async_callback(note, "down")
        generation = Generation("parts", stack)
        for _ in range(users):
            assert generation.enter() == "parts"
        retiring = asyncio.create_task(generation.retire(note))
        await asyncio.sleep(0)
        for _ in range(users):
            assert happened == []
            generation.leave()
            await asyncio.sleep(0)
        await retiring
        return happened

    assert asyncio.run(play()) == ["parts", "down"]


def test_a_generation_that_may_wait_no_longer_is_taken_down_all_the_same() -> None:
    async def play() -> list[str]:
        happened: list[str] = []

        async def note(what: str) -> None:
            happened.append(what)

        stack = AsyncExitStack()
        stack.push_async_callback(note, "down")
        generation = Generation("parts", stack)
        generation.enter()
        retiring = asyncio.create_task(generation.retire(note))
        await asyncio.sleep(0)
        retiring.cancel()
        with pytest.raises(asyncio.CancelledError):
            await retiring
        return happened

    assert asyncio.run(play()) == ["down"]
