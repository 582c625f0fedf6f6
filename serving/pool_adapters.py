"""A LoRA adapter at every server of a pool."""

from __future__ import annotations

import asyncio

from serving.adapter_loading import AdapterLoading
from serving.adapter_shelf import AdapterShelf, Loaded
from serving.exchange import Json
from serving.pool import OURS, Pool
from serving.pool_member import Member
from serving.student_server import StudentServer
from serving.upstream import UpstreamResponse

_BELOW = "/v1"


class PoolAdapterLoading:
    """One adapter at each server of the pool that is there. `timeout_s` bounds a load. See `AdapterLoading`."""

    def __init__(self, name: str, pool: Pool, shelf: AdapterShelf, *, timeout_s: float) -> None:
        self._name = name
        self._pool = pool
        self._shelf = shelf
        self._timeout_s = timeout_s
        self._loadings: dict[Member, AdapterLoading] = {}

    async def load(self) -> None:
        """See that each has it. Raises as `AdapterLoading.load` does, and StudentUnavailable if none is there."""
        members = await self._pool.members()
        self._loadings = {member: self._loadings.get(member) or self._at(member) for member in members}
        await asyncio.gather(*(loading.load() for loading in self._loadings.values()))

    async def aclose(self) -> None:
        """Give up what is under way."""
        for loading in self._loadings.values():
            await loading.aclose()

    def _at(self, member: Member) -> AdapterLoading:
        # Where ours is, and with which key, is another thing after each start: it is looked up when it is to unload.
        told = (
            Loaded(OURS, None)
            if member.address.name == OURS
            else Loaded(member.address.url + _BELOW, self._pool.api_key_env)
        )
        return AdapterLoading(self._name, _OpenAi(member.server, self._timeout_s), self._shelf, told)


class _OpenAi:
    """The OpenAI-compatible part of a server that is known by its root."""

    def __init__(self, server: StudentServer, timeout_s: float) -> None:
        self._server = server
        self._timeout_s = timeout_s

    @property
    def place(self) -> str:
        return self._server.place

    async def get(self, path: str) -> UpstreamResponse:
        return await self._server.get(_BELOW + path, silence_s=self._timeout_s)

    async def post(self, path: str, asked: Json) -> UpstreamResponse:
        return await self._server.post(_BELOW + path, asked, silence_s=self._timeout_s)
