"""What is left after thousands of clients hung up in the middle of their request: it must be nothing."""

from __future__ import annotations

import asyncio
import random
import sys
import threading
import time
from array import array
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import orjson

from serving.pricing import PriceList
from serving.teacher import Teacher
from serving.teacher_settings import Price, TeacherSettings
from serving.upstream import Upstream

_AT_ONCE = 64
_CONNECTIONS = 100
_LONGEST_WAIT_S = 0.15


@dataclass(frozen=True, slots=True)
class Traces:
    """What `hang_up` left behind, and how fast the upstream learnt of it.

    `fds`, `tasks` and `threads` are differences between before and after; `rss_mib` is what the second half
    of the disconnects added to the process's memory; `upstream_open` counts the upstream's connections that
    aren't idle ones of the pool; `noticed` is how many requests had reached the upstream when they were
    cancelled, and `noticed_p99_s`, `noticed_max_s` how long it took until it knew; `usable` says that the
    pool still answers as many requests at once as it has connections.
    """

    disconnects: int
    seconds: float
    fds: int
    tasks: int
    threads: int
    rss_mib: float
    upstream_open: int
    noticed: int
    noticed_p50_s: float
    noticed_p99_s: float
    noticed_max_s: float
    usable: bool


@asynccontextmanager
async def loopback() -> AsyncIterator[str]:
    """Run `loadtest.loopback` as a child process and give its base URL."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "loadtest.loopback",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        cwd=Path(__file__).parent.parent,
    )
    stdin, stdout = process.stdin, process.stdout
    if stdin is None or stdout is None:
        raise RuntimeError("the loopback upstream was started without pipes")
    try:
        yield f"http://127.0.0.1:{int(await stdout.readline())}/v1"
    finally:
        stdin.close()
        await process.wait()


async def hang_up(base_url: str, disconnects: int, *, seed: int = 1) -> Traces:
    """Ask `base_url` (a `loadtest.loopback`) that often, half of it for streams, and cancel every request.

    The cancellation comes after a random time of up to 150 ms: before the connection, before the answer, or
    in the middle of it.
    """
    settings = TeacherSettings(base_url=base_url, timeout_s=60, max_retries=0)
    upstream = Upstream(base_url, timeout_s=60, max_connections=_CONNECTIONS)
    teacher = Teacher(settings, upstream, None, PriceList(Price(input=1, output=1)))
    chance = random.Random(seed)
    cancelled = array("d", bytes(8 * disconnects))

    async def one(number: int) -> None:
        task = asyncio.create_task(_ask(teacher, str(number), stream=number % 2 == 0))
        await asyncio.sleep(chance.random() * _LONGEST_WAIT_S)
        task.cancel()
        cancelled[number] = time.monotonic()
        await asyncio.wait([task])
        if not task.cancelled():
            task.result()

    async def many(numbers: range) -> None:
        waiting = iter(numbers)

        async def worker() -> None:
            for number in waiting:
                await one(number)

        await asyncio.gather(*(worker() for _ in range(_AT_ONCE)))

    try:
        await _answered(upstream, _CONNECTIONS)
        before = _fds(), len(asyncio.all_tasks()), threading.active_count()
        began = time.monotonic()
        await many(range(disconnects // 2))
        half_way = _rss_mib()
        await many(range(disconnects // 2, disconnects))
        seconds = time.monotonic() - began
        grown = _rss_mib() - half_way
        await asyncio.sleep(0.3)
        usable = await _answered(upstream, _CONNECTIONS)
        after = _fds(), len(asyncio.all_tasks()), threading.active_count()
    finally:
        await upstream.aclose()
    await asyncio.sleep(0.3)
    asking = Upstream(base_url, timeout_s=10)
    try:
        async with await asking.request(
            "GET", "/connections", headers=[], body=b"", timeout_s=10
        ) as response:
            report = orjson.loads(await response.read())
    finally:
        await asking.aclose()
    hung_up = report["hung_up"]
    delays = sorted(at - cancelled[int(number)] for number, at in hung_up.items()) or [0.0]
    return Traces(
        disconnects=disconnects,
        seconds=seconds,
        fds=after[0] - before[0],
        tasks=after[1] - before[1],
        threads=after[2] - before[2],
        rss_mib=grown,
        upstream_open=report["open"] - 1,
        noticed=len(hung_up),
        noticed_p50_s=delays[len(delays) // 2],
        noticed_p99_s=delays[int(len(delays) * 0.99)],
        noticed_max_s=delays[-1],
        usable=usable,
    )


async def _ask(teacher: Teacher, number: str, *, stream: bool) -> None:
    request = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}
    if not stream:
        await teacher.complete(request, authorization=None, request_id=number)
        return
    async with teacher.stream(request, authorization=None, request_id=number) as chunks:
        async for _ in chunks:
            pass


async def _answered(upstream: Upstream, at_once: int) -> bool:
    async def one() -> int:
        async with await upstream.request(
            "POST", "/answer", headers=[], body=b"{}", timeout_s=10
        ) as response:
            await response.read()
            return response.status

    return set(await asyncio.gather(*(one() for _ in range(at_once)))) == {200}


def _fds() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def _rss_mib() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20
