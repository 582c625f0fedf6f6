"""Having servers forget the adapters that no live release needs any more.

A release that was rolled back to, or the next look, has its adapter loaded again: what is taken away here is memory of
a server, and a copy of what releases hold.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Collection
from pathlib import Path

from serving.adapter_loading import AdapterNotLoaded, unload
from serving.adapter_shelf import AdapterShelf, Loaded
from serving.device_time import DeviceTime
from serving.errors import ConfigError, DamagedRelease, UnknownRelease, UpstreamError
from serving.layout import task_names
from serving.pool import OURS
from serving.releases import ReleaseStore
from serving.student_server import StudentServer
from serving.upstream import Upstream
from serving.vllm_place import read_place

log = logging.getLogger("understudy.adapters")

_PATIENCE_S = 10.0
_UNNEEDED_FOR_S = 60.0


class AdapterTidying:
    """Tidies now and then: what no live release has needed for `after_s` seconds, since a worker may still be at it."""

    def __init__(self, state_dir: Path, *, after_s: float = _UNNEEDED_FOR_S) -> None:
        self._state_dir = state_dir
        self._after_s = after_s
        self._shelf = AdapterShelf(state_dir)
        self._since: dict[str, float] = {}

    async def look(self) -> list[str]:
        """See what is due; gives what went."""
        now = time.monotonic()
        unneeded = await asyncio.to_thread(unneeded_adapters, self._state_dir, self._shelf)
        self._since = {name: self._since.get(name, now) for name in unneeded}
        due = [name for name, since in self._since.items() if now - since >= self._after_s]
        if not due:
            return []
        self._since.update(dict.fromkeys(due, now))  # one whose server is away is tried again after as long
        return await tidy(self._state_dir, self._shelf, due)


def unneeded_adapters(state_dir: Path, shelf: AdapterShelf) -> list[str]:
    """The adapters of the shelf that belong to no live release; none while it can't be told what is live."""
    there = shelf.names()
    if not there:
        return []
    store = ReleaseStore(state_dir)
    needed = set()
    try:
        for task in task_names(state_dir):
            live = store.live(task)
            if live is not None and live.release is not None:
                needed.add(store.card(task, live.release).get("adapter"))
    except (DamagedRelease, UnknownRelease):
        return []
    return [name for name in there if name not in needed]


async def tidy(
    state_dir: Path, shelf: AdapterShelf, names: Collection[str], *, patience_s: float = _PATIENCE_S
) -> list[str]:
    """Unload those of `names` that no live release needs, and take them off the shelf; gives those that went.

    One that a server couldn't be told to unload stays, and so does everything while somebody else is at the shelf. A
    server that is away is waited for once, for `patience_s`: nobody gets at the shelf meanwhile.
    """
    with shelf.tidying() as alone:
        if not alone:
            return []
        unneeded = await asyncio.to_thread(unneeded_adapters, state_dir, shelf)
        unneeded = [name for name in unneeded if name in names]
        away: set[Loaded] = set()
        gone = [
            name
            for name in unneeded
            if await _unloaded(name, shelf.servers(name), state_dir, away, patience_s)
        ]
        for name in gone:
            await asyncio.to_thread(shelf.remove, name)
            log.info("the adapter %s is unloaded: no live release needs it", name)
        return gone


async def _unloaded(
    name: str, servers: Collection[Loaded], state_dir: Path, away: set[Loaded], patience_s: float
) -> bool:
    """Say whether no server has it any more; a server that gives no answer is put among those that are `away`."""
    if not away.isdisjoint(servers):
        return False
    for told in servers:
        try:
            server = _server_of(told, state_dir, patience_s)
        except ConfigError as error:
            log.warning("the adapter %s can't be unloaded: %s", name, error)
            return False
        if server is None:
            continue
        try:
            await unload(name, server)
        except (AdapterNotLoaded, UpstreamError) as error:
            if isinstance(error, UpstreamError):
                away.add(told)
            log.debug("the adapter %s isn't unloaded yet: %s", name, error)
            return False
        finally:
            await server.aclose()
    return True


def _server_of(told: Loaded, state_dir: Path, patience_s: float) -> StudentServer | None:
    """The server that was told; None: it has ended since, and forgot. Raises ConfigError."""
    if told.base_url != OURS:
        return StudentServer.at(
            told.base_url, timeout_s=patience_s, api_key_env=told.api_key_env, device=DeviceTime()
        )
    place = read_place(state_dir)
    if place is None or place.phase != "ready":
        return None
    upstream = Upstream(f"{place.url}/v1", timeout_s=patience_s, who="the student")
    return StudentServer(upstream, DeviceTime(), key=place.key)
