"""Taking in a changed configuration while requests are served.

The parts made from a configuration are one generation. A reload makes a new generation beside the old one and
swaps one reference: a request is served by the generation it began with, and the old one is taken down when
nobody uses it any more. What has a memory (log, live releases, metrics, …) isn't part of a generation.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Generic, TypeVar

from serving.section import Section
from serving.settings import Settings

FIXED = (
    "state_dir",
    "server.host",
    "server.port",
    "server.workers",
    "server.receive_timeout_s",
    "student.onnx",
    "student.adapters_at",
    "log.durability",
    "log.segment_bytes",
    "log.max_waiting_bytes",
    "observe.log_format",
)
"""What a running gateway can't change: it takes a restart."""

_P = TypeVar("_P")


def reloadable(old: Settings, new: Settings) -> tuple[Settings, list[str]]:
    """Return the settings to go on with: the new ones with what is fixed kept from the old.

    The second value names the fixed keys that differ, for the person who changed them.
    """
    kept: list[str] = []
    for key in FIXED:
        section, _, name = key.rpartition(".")
        before = _section(old, section)
        after = _section(new, section)
        value = getattr(before, name)
        if value == getattr(after, name):
            continue
        kept.append(key)
        changed = after.model_copy(update={name: value})
        new = new.model_copy(update={section: changed}) if section else new.model_copy(update={name: value})
    return new, kept


def _section(settings: Settings, name: str) -> Settings | Section:
    if not name:
        return settings
    section: Section = getattr(settings, name)
    return section


class Generation(Generic[_P]):
    """The parts made from one configuration, and how many requests still use them.

    `stack` takes the parts down.
    """

    def __init__(self, parts: _P, stack: AsyncExitStack) -> None:
        self.parts = parts
        self._stack = stack
        self._users = 0
        self._retired = False
        self._unused = asyncio.Event()

    def enter(self) -> _P:
        """Begin to use the parts; `leave` ends it."""
        self._users += 1
        return self.parts

    def leave(self) -> None:
        """Note that one user is done."""
        self._users -= 1
        if self._retired and self._users == 0:
            self._unused.set()

    async def retire(self, finish: Callable[[_P], Awaitable[None]]) -> None:
        """Wait for the last user and then for `finish`, then take the parts down.

        Cancelled, it doesn't wait any longer, but takes them down all the same.
        """
        self._retired = True
        try:
            if self._users:
                await self._unused.wait()
            await finish(self.parts)
        finally:
            await self._stack.aclose()

    async def aclose(self) -> None:
        """Take the parts down."""
        await self._stack.aclose()


class Kept(Generic[_P]):
    """What several generations may use: the last one that lets go of it closes it."""

    def __init__(self, thing: _P, close: Callable[[], Awaitable[None]]) -> None:
        self.thing = thing
        self._close = close
        self._holders = 0

    def hold(self) -> Callable[[], Awaitable[None]]:
        """Begin to use it; what is returned lets go."""
        self._holders += 1
        return self._let_go

    async def _let_go(self) -> None:
        self._holders -= 1
        if self._holders == 0:
            await self._close()
