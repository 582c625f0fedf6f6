"""Having a server load an adapter, and forget it again, while it serves.

The API is vLLM's (`/v1/load_lora_adapter`, with VLLM_ALLOW_RUNTIME_LORA_UPDATING=True and --enable-lora:
https://docs.vllm.ai/en/latest/features/lora.html). A server without it may have the adapter all the same, loaded when
it was started, under the same name.
"""

from __future__ import annotations

import asyncio
from typing import Protocol

import orjson

from serving.adapter_shelf import AdapterShelf, Loaded
from serving.errors import UnderstudyError, UpstreamRefused, UpstreamTimeout
from serving.exchange import Json
from serving.upstream import UpstreamResponse

_MODELS = "/models"
_LOAD = "/load_lora_adapter"
_UNLOAD = "/unload_lora_adapter"
_QUICK_S = 10.0
_SHOWN = 300
_NOT_THERE = (404, 405)


class AdapterNotLoaded(UnderstudyError):
    """A server doesn't serve the adapter it was told to load."""


class Asked(Protocol):
    """Where adapters are loaded: the OpenAI-compatible part of a server. See `StudentServer`."""

    @property
    def place(self) -> str:
        """What it is called in messages."""
        ...

    async def get(self, path: str) -> UpstreamResponse:
        """Ask without a body. Raises UpstreamRefused for any status that isn't a good one."""
        ...

    async def post(self, path: str, asked: Json) -> UpstreamResponse:
        """Ask with one. Raises alike."""
        ...


class AdapterLoading:
    """One adapter at one server. It is loaded once, however many ask for it at a time."""

    def __init__(self, name: str, server: Asked, shelf: AdapterShelf, told: Loaded) -> None:
        self._name = name
        self._server = server
        self._shelf = shelf
        self._told = told
        self._under_way: asyncio.Task[None] | None = None

    async def load(self) -> None:
        """See that the server has the adapter. Raises AdapterNotLoaded, and UpstreamError for a server that is away.

        A caller that leaves doesn't take the others' load with it.
        """
        if self._under_way is None or self._under_way.done():
            self._under_way = asyncio.create_task(self._load())
            self._under_way.add_done_callback(_heard)
        await asyncio.shield(self._under_way)

    async def aclose(self) -> None:
        """Give up what is under way."""
        if self._under_way is not None and not self._under_way.done():
            self._under_way.cancel()
            await asyncio.wait([self._under_way])

    async def _load(self) -> None:
        if await is_loaded(self._name, self._server):
            return
        # Noted before: nobody may hear how it ends.
        await asyncio.to_thread(self._shelf.note, self._name, self._told)
        path = self._shelf.path(self._name)
        try:
            await _post(self._server, _LOAD, {"lora_name": self._name, "lora_path": path})
        except UpstreamRefused as error:
            # Another process may have been faster: then the server refuses.
            if not await is_loaded(self._name, self._server):
                said = f"{self._server.place} didn't load the adapter {path}: {_meaning(error)}"
                raise AdapterNotLoaded(said) from None


def _heard(load: asyncio.Task[None]) -> None:
    """Take note of how a load ended that nobody waited for to its end: the next one tells."""
    if not load.cancelled():
        load.exception()


async def is_loaded(name: str, server: Asked) -> bool:
    """Say whether a server lists an adapter among its models. Raises AdapterNotLoaded where it can't be told."""
    try:
        async with asyncio.timeout(_QUICK_S), await server.get(_MODELS) as response:
            body = await response.read()
        return any(model["id"] == name for model in orjson.loads(body)["data"])
    except TimeoutError:
        raise AdapterNotLoaded(f"{server.place} doesn't say which models it has: no answer") from None
    except UpstreamRefused as error:
        said = f"{server.place} doesn't say which models it has: status {error.status}"
        raise AdapterNotLoaded(said) from None
    except (orjson.JSONDecodeError, KeyError, TypeError):
        raise AdapterNotLoaded(
            f"{server.place} doesn't say which models it has: /models isn't OpenAI's"
        ) from None


async def unload(name: str, server: Asked) -> None:
    """See that a server doesn't have an adapter. Raises as `load` does."""
    try:
        async with asyncio.timeout(_QUICK_S):
            await _post(server, _UNLOAD, {"lora_name": name})
    except TimeoutError:
        raise UpstreamTimeout(f"{server.place} didn't unload {name}: no answer") from None
    except UpstreamRefused as error:
        # Not found: it was started anew, or can't unload what it was started with.
        if error.status not in _NOT_THERE:
            raise AdapterNotLoaded(f"{server.place} didn't unload {name}: {_meaning(error)}") from None


async def _post(server: Asked, path: str, body: dict[str, str]) -> None:
    async with await server.post(path, body) as response:
        await response.read()


def _message(body: bytes) -> str:
    """What the server says of an error, in its own words."""
    try:
        said = orjson.loads(body)
        said = said.get("error", said)
        message = str(said["message"] if isinstance(said, dict) else said)
    except (orjson.JSONDecodeError, AttributeError, KeyError):
        message = body.decode("utf-8", "replace")
    return " ".join(message.split())[:_SHOWN]


def _meaning(error: UpstreamRefused) -> str:
    said = _message(error.body)
    if error.status in _NOT_THERE and "No adapter found" not in said:
        return (
            f"it can't while it runs (status {error.status}); start it with --enable-lora and "
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True, or have it load the adapter at its start, under the folder's name "
            "(--lora-modules)"
        )
    if "No adapter found" in said:
        return f"it can't read that folder; see where it sees it from (student.adapters_at). It says: {said}"
    if "max_lora_rank" in said:
        return f"{said} Start it with a larger --max-lora-rank"
    return f"status {error.status}: {said}"
