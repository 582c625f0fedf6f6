"""HTTP clients for the way to the teacher, side by side on this machine.

`python -m loadtest.clients` compares those that are installed; `python -m loadtest.clients --disconnects
20000` shows what the chosen one (`serving.upstream`) leaves behind when that many requests are given up.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import platform
import statistics
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Protocol

import orjson
import uvloop
from rich.console import Console
from rich.table import Table

from loadtest.disconnects import Traces, hang_up, loopback
from serving.upstream import Upstream

_BODY = orjson.dumps(
    {
        "model": "gpt-4o",
        "messages": [
            {"role": "system", "content": "Classify the customer's message into one of 77 intents."},
            {
                "role": "user",
                "content": "I am still waiting on my card, it was ordered two weeks ago " + "." * 120,
            },
        ],
    }
)
_STREAM = b'{"stream":true}'
_CONNECTIONS = 32
_ROUNDS = 3
_GIVEN_UP = 64
_PATIENCE_S = 1.0


class Client(Protocol):
    """What the comparison asks of a client."""

    async def answer(self) -> bytes:
        """POST and read a whole answer."""
        ...

    async def first_piece(self) -> bytes:
        """Open a stream that stalls after one event, read what has come, hang up."""
        ...

    async def wait(self) -> None:
        """POST where no answer ever comes."""
        ...

    async def aclose(self) -> None:
        """Close every connection."""
        ...


class _Ours:
    """`serving.upstream`: aiohttp, and what the gateway needs around it."""

    def __init__(self, base_url: str) -> None:
        self._upstream = Upstream(base_url, timeout_s=60)

    async def answer(self) -> bytes:
        async with await self._upstream.request("POST", "/answer", headers=_HEADERS, body=_BODY) as response:
            return await response.read()

    async def first_piece(self) -> bytes:
        async with await self._upstream.request(
            "POST", "/stalls", headers=_HEADERS, body=_STREAM
        ) as response:
            return await response.read_chunk() or b""

    async def wait(self) -> None:
        async with await self._upstream.request("POST", "/stalls", headers=_HEADERS, body=_BODY):
            pass

    async def aclose(self) -> None:
        await self._upstream.aclose()


_HEADERS = [("content-type", "application/json")]


class _Aiohttp:
    def __init__(self, base_url: str) -> None:
        aiohttp: Any = import_module("aiohttp")
        self._base = base_url
        self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=1000))

    async def answer(self) -> bytes:
        async with self._session.post(f"{self._base}/answer", data=_BODY, headers=_HEADERS) as response:
            return bytes(await response.read())

    async def first_piece(self) -> bytes:
        async with self._session.post(f"{self._base}/stalls", data=_STREAM, headers=_HEADERS) as response:
            return bytes(await response.content.readany())

    async def wait(self) -> None:
        async with self._session.post(f"{self._base}/stalls", data=_BODY, headers=_HEADERS):
            pass

    async def aclose(self) -> None:
        await self._session.close()


class _Pyreqwest:
    def __init__(self, base_url: str) -> None:
        self._base = base_url
        self._client: Any = import_module("pyreqwest.client").ClientBuilder().no_proxy().build()

    async def answer(self) -> bytes:
        request = self._client.post(f"{self._base}/answer").body_bytes(_BODY).headers(_HEADERS).build()
        return bytes(await (await request.send()).bytes())

    async def first_piece(self) -> bytes:
        request = self._client.post(f"{self._base}/stalls").body_bytes(_STREAM).headers(_HEADERS)
        async with request.build_streamed() as response:
            return bytes(await response.body_reader.read_chunk())

    async def wait(self) -> None:
        request = self._client.post(f"{self._base}/stalls").body_bytes(_BODY).headers(_HEADERS)
        await request.build().send()

    async def aclose(self) -> None:
        await self._client.close()


class _Httpx:
    def __init__(self, base_url: str, *, module: str = "httpx") -> None:
        httpx: Any = import_module(module)
        self._base = base_url
        limits = httpx.Limits(max_connections=1000, max_keepalive_connections=1000)
        self._client = httpx.AsyncClient(limits=limits, timeout=60, trust_env=False)

    async def answer(self) -> bytes:
        response = await self._client.post(f"{self._base}/answer", content=_BODY, headers=_HEADERS)
        return bytes(response.content)

    async def first_piece(self) -> bytes:
        url = f"{self._base}/stalls"
        async with self._client.stream("POST", url, content=_STREAM, headers=_HEADERS) as response:
            async for piece in response.aiter_raw():
                return bytes(piece)
        return b""

    async def wait(self) -> None:
        await self._client.post(f"{self._base}/stalls", content=_BODY, headers=_HEADERS)

    async def aclose(self) -> None:
        await self._client.aclose()


@dataclass
class _Row:
    name: str
    make: Callable[[str], Client]
    per_s: list[float] = field(default_factory=list)
    p50_s: list[float] = field(default_factory=list)
    p99_s: list[float] = field(default_factory=list)
    streams: bool = False
    left_open: int = 0


_KNOWN: tuple[tuple[str, str, Callable[[str], Client]], ...] = (
    ("aiohttp", "serving.upstream (aiohttp)", _Ours),
    ("aiohttp", "aiohttp", _Aiohttp),
    ("pyreqwest", "pyreqwest", _Pyreqwest),
    ("httpx2", "httpx2", lambda url: _Httpx(url, module="httpx2")),
    ("httpx", "httpx", _Httpx),
)


async def compare(seconds: float) -> list[_Row]:
    """Measure every installed client, `seconds` at a time, in turns: a busy moment then hits all of them."""
    rows: list[_Row] = []
    for package, name, make in _KNOWN:
        try:
            label = name if name.startswith("serving") else f"{name} {version(package)}"
        except PackageNotFoundError:
            continue
        rows.append(_Row(label, make))
    async with loopback() as base_url:
        for _ in range(_ROUNDS):
            for row in rows:
                client = row.make(base_url)
                await client.answer()
                latencies = sorted(await _hammer(client.answer, 1, seconds))
                row.p50_s.append(latencies[len(latencies) // 2])
                row.p99_s.append(latencies[int(len(latencies) * 0.99)])
                row.per_s.append(len(await _hammer(client.answer, _CONNECTIONS, seconds)) / seconds)
                await client.aclose()
    for row in rows:
        # An upstream each: what one client leaves open must not be counted against the next.
        async with loopback() as base_url:
            client = row.make(base_url)
            row.streams = await _streams(client)
            row.left_open = await _left_open(client, base_url)
            await client.aclose()
    return rows


async def _hammer(call: Callable[[], Awaitable[bytes]], at_once: int, seconds: float) -> list[float]:
    latencies: list[float] = []
    until = time.perf_counter() + seconds

    async def worker() -> None:
        now = time.perf_counter()
        while now < until:
            await call()
            began, now = now, time.perf_counter()
            latencies.append(now - began)

    await asyncio.gather(*(worker() for _ in range(at_once)))
    return latencies


async def _streams(client: Client) -> bool:
    """Say whether the first event of a stream arrives although nothing follows it."""
    task = asyncio.create_task(client.first_piece())
    done, _ = await asyncio.wait([task], timeout=_PATIENCE_S)
    task.cancel()
    return bool(done) and task.result().startswith(b"data: ")


async def _left_open(client: Client, base_url: str) -> int:
    """Count the connections that stay open at the upstream after all requests on them were cancelled."""
    before = await _connections(base_url)
    tasks = [asyncio.create_task(client.wait()) for _ in range(_GIVEN_UP)]
    await asyncio.sleep(_PATIENCE_S)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await asyncio.sleep(_PATIENCE_S)
    return max(0, await _connections(base_url) - before)


async def _connections(base_url: str) -> int:
    asking = Upstream(base_url, timeout_s=10)
    try:
        async with await asking.request("GET", "/connections", headers=[], body=b"") as response:
            return int(orjson.loads(await response.read())["open"])
    finally:
        await asking.aclose()


def _print_comparison(rows: list[_Row], console: Console) -> None:
    table = Table(title="HTTP clients against a trivial upstream (medians of three rounds)")
    for column in (
        "client",
        f"requests/s at {_CONNECTIONS}",
        "ratio",
        "p50 at 1",
        "p99 at 1",
        "first event of a stream",
        f"connections left by {_GIVEN_UP} cancelled requests",
    ):
        table.add_column(column, justify="left" if column == "client" else "right")
    best = statistics.median(rows[0].per_s)
    for row in rows:
        per_s = statistics.median(row.per_s)
        table.add_row(
            row.name,
            f"{per_s:,.0f}",
            f"{per_s / best:.2f}",
            f"{statistics.median(row.p50_s) * 1000:.2f} ms",
            f"{statistics.median(row.p99_s) * 1000:.2f} ms",
            "at once" if row.streams else "held back",
            str(row.left_open),
        )
    console.print(table)


def _print_traces(traces: Traces, console: Console) -> None:
    table = Table(title=f"After {traces.disconnects:,} requests given up ({traces.seconds:.1f} s)")
    table.add_column("left behind")
    table.add_column("", justify="right")
    table.add_row("file descriptors", str(traces.fds))
    table.add_row("tasks", str(traces.tasks))
    table.add_row("threads", str(traces.threads))
    table.add_row("memory, second half", f"{traces.rss_mib:+.1f} MiB")
    table.add_row("connections open at the upstream", str(traces.upstream_open))
    table.add_row("pool still usable", "yes" if traces.usable else "NO")
    table.add_row("requests the upstream had seen", f"{traces.noticed:,}")
    table.add_row("until it knew: p50", f"{traces.noticed_p50_s * 1000:.1f} ms")
    table.add_row("until it knew: p99", f"{traces.noticed_p99_s * 1000:.1f} ms")
    console.print(table)


async def _disconnects(number: int) -> Traces:
    async with loopback() as base_url:
        return await hang_up(base_url, number)


def main() -> None:
    """Run the comparison, or the disconnects."""
    parser = argparse.ArgumentParser(prog="python -m loadtest.clients", description=__doc__)
    parser.add_argument("--seconds", type=float, default=2.0, help="how long each measurement takes")
    parser.add_argument("--disconnects", type=int, help="give up that many requests instead of comparing")
    options = parser.parse_args()
    console = Console(width=140)
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, uvloop"
    console.print(f"{machine} {version('uvloop')}, aiohttp {version('aiohttp')}")
    if options.disconnects is not None:
        _print_traces(uvloop.run(_disconnects(options.disconnects)), console)
    else:
        _print_comparison(uvloop.run(compare(options.seconds)), console)


if __name__ == "__main__":
    main()
