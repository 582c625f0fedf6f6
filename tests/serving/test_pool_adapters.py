"""An adapter at every server of a pool, and forgotten there when no live release needs it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from serving.adapter_loading import AdapterNotLoaded
from serving.adapter_shelf import AdapterShelf, Loaded
from serving.adapter_tidying import tidy
from serving.errors import UpstreamTimeout
from serving.guarded_student import StudentUnavailable
from serving.pool import Pool
from serving.pool_adapters import PoolAdapterLoading
from serving.student_settings import VllmSettings
from serving.vllm_place import VllmPlace, lock_file, write_place

Serve = Callable[..., str]
NAME = "understudy-0123456789ab"


class Server:
    """Loads and unloads adapters for whoever has the key."""

    def __init__(self, serve: Serve, *, key: str = "") -> None:
        self.adapters: set[str] = set()
        self.loads = self.unloads = 0
        self.refuses = False
        self.stalls = False
        self._key = key
        self.url = serve(self)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        raw, more = b"", True
        while more:
            message = await receive()
            raw, more = raw + message.get("body", b""), message.get("more_body", False)
        headers = dict(scope["headers"])
        status, said = 200, ""
        if scope["path"].startswith("/v1") and headers.get(b"authorization", b"").decode() != self._key:
            status = 401
        elif scope["path"] == "/v1/models":
            said = json.dumps({"data": [{"id": name} for name in ["base", *self.adapters]]})
        elif scope["path"] == "/v1/load_lora_adapter" and self.refuses:
            status, said = 400, f"not with {self._key.removeprefix('Bearer ')}"
        elif scope["path"] == "/v1/load_lora_adapter" and self.stalls:
            await receive()  # until whoever asks has had enough
            return
        elif scope["path"] == "/v1/load_lora_adapter":
            self.loads += 1
            self.adapters.add(json.loads(raw)["lora_name"])
        elif scope["path"] == "/v1/unload_lora_adapter" and self.stalls:
            self.unloads += 1
            await receive()  # until whoever asks has had enough
            return
        elif scope["path"] == "/v1/unload_lora_adapter":
            self.adapters.remove(json.loads(raw)["lora_name"])
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": said.encode()})


@pytest.fixture
def shelf(tmp_path: Path) -> AdapterShelf:
    (tmp_path / "adapters" / NAME).mkdir(parents=True)
    return AdapterShelf(tmp_path)


def test_each_server_loads_it_once(serve: Serve, tmp_path: Path, shelf: AdapterShelf) -> None:
    servers = [Server(serve), Server(serve)]

    async def play() -> None:
        pool = Pool(tmp_path, VllmSettings(urls=[f"{server.url}/v1" for server in servers]))
        loading = PoolAdapterLoading(NAME, pool, shelf, timeout_s=10.0)
        try:
            await asyncio.gather(loading.load(), loading.load())
            assert [server.loads for server in servers] == [1, 1]
            assert set(shelf.servers(NAME)) == {Loaded(f"{server.url}/v1", None) for server in servers}
            servers[1].adapters.clear()  # it was started anew
            servers[1].refuses = True
            with pytest.raises(AdapterNotLoaded):
                await loading.load()
            servers[1].refuses = False
            await loading.load()
            assert [server.loads for server in servers] == [1, 2]
            assert await tidy(tmp_path, shelf, [NAME]) == [NAME]
            assert [server.adapters for server in servers] == [set(), set()]
        finally:
            await loading.aclose()
            await pool.aclose()

    asyncio.run(play())


def test_the_one_run_here_is_found_again_to_unload(serve: Serve, tmp_path: Path, shelf: AdapterShelf) -> None:
    first, second = Server(serve, key="Bearer k1"), Server(serve, key="Bearer k2")

    async def play() -> None:
        pool = Pool(tmp_path, VllmSettings(model="base", enable_lora=True))
        loading = PoolAdapterLoading(NAME, pool, shelf, timeout_s=10.0)
        try:
            await loading.load()
            assert first.adapters == {NAME}
            # It has ended and was started elsewhere, with another key; there the adapter is loaded, too.
            write_place(tmp_path, VllmPlace("ready", second.url, "k2", "base", 1))
            second.adapters.add(NAME)
            assert await tidy(tmp_path, shelf, [NAME]) == [NAME]
            assert second.adapters == set()
        finally:
            await loading.aclose()
            await pool.aclose()

    lock = lock_file(tmp_path)
    assert lock is not None
    with lock:
        write_place(tmp_path, VllmPlace("ready", first.url, "k1", "base"))
        asyncio.run(play())


def test_one_that_is_away_is_waited_for_once(serve: Serve, tmp_path: Path, shelf: AdapterShelf) -> None:
    away, there = Server(serve), Server(serve)
    away.stalls = True
    names = [f"understudy-{number:012x}" for number in range(3)]
    for name in names:
        (tmp_path / "adapters" / name).mkdir()
        shelf.note(name, Loaded(f"{away.url}/v1", None))
    there.adapters.add(NAME)
    shelf.note(NAME, Loaded(f"{there.url}/v1", None))
    assert asyncio.run(tidy(tmp_path, shelf, [*names, NAME], patience_s=0.3)) == [NAME]
    assert away.unloads == 1
    assert shelf.names() == names


def test_one_that_has_ended_has_forgotten(tmp_path: Path, shelf: AdapterShelf) -> None:
    shelf.note(NAME, Loaded("vllm", None))
    assert asyncio.run(tidy(tmp_path, shelf, [NAME])) == [NAME]


def test_a_server_that_doesnt_come_to_an_end_of_loading_is_given_up(
    serve: Serve, tmp_path: Path, shelf: AdapterShelf
) -> None:
    server = Server(serve)
    server.stalls = True

    async def play() -> None:
        pool = Pool(tmp_path, VllmSettings(urls=[server.url]))
        loading = PoolAdapterLoading(NAME, pool, shelf, timeout_s=0.3)
        try:
            async with asyncio.timeout(20):
                with pytest.raises(UpstreamTimeout, match=r"didn't answer within 0\.3 s"):
                    await loading.load()
        finally:
            await loading.aclose()
            await pool.aclose()

    asyncio.run(play())


def test_a_server_that_repeats_our_key_doesnt_have_it_logged(
    serve: Serve, tmp_path: Path, shelf: AdapterShelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SERVERS_KEY", "sk-servers")
    server = Server(serve, key="Bearer sk-servers")
    server.refuses = True

    async def play() -> None:
        pool = Pool(tmp_path, VllmSettings(urls=[server.url], api_key_env="SERVERS_KEY"))
        loading = PoolAdapterLoading(NAME, pool, shelf, timeout_s=10.0)
        try:
            with pytest.raises(AdapterNotLoaded, match=r"not with …$"):
                await loading.load()
        finally:
            await loading.aclose()
            await pool.aclose()

    asyncio.run(play())


def test_without_a_server_nothing_is_loaded(tmp_path: Path, shelf: AdapterShelf) -> None:
    async def play() -> None:
        pool = Pool(tmp_path, VllmSettings(model="base"))
        try:
            with pytest.raises(StudentUnavailable):
                await PoolAdapterLoading(NAME, pool, shelf, timeout_s=10.0).load()
        finally:
            await pool.aclose()

    asyncio.run(play())
