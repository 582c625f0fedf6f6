"""The faults: what is broken, how it is broken, and how it is mended again."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass

from loadtest.chaos import link
from loadtest.chaos.stage import Stage
from loadtest.chaos.traffic import Traffic

Breaking = Callable[[Stage, Traffic], AbstractAsyncContextManager[None]]


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault. Things are broken while the context of `breaking` lasts, for `seconds`.

    `awaited`: the route that must answer again before the fault counts as over (`cache`: hits are back). `rate`:
    requests per second, unless the campaign's own.
    """

    name: str
    breaking: Breaking
    seconds: float = 4.0
    awaited: str = ""
    rate: float | None = None


def _link(which: str, fault: link.Fault, **how: float) -> Breaking:
    @contextlib.asynccontextmanager
    async def breaking(stage: Stage, _: Traffic) -> AsyncIterator[None]:
        bad = stage.to_redis if which == "redis" else stage.to_teacher
        for name, value in how.items():
            setattr(bad, name, value)
        bad.fault = fault
        yield
        bad.fault = None

    return breaking


def _teacher(rule: str) -> Breaking:
    @contextlib.asynccontextmanager
    async def breaking(stage: Stage, _: Traffic) -> AsyncIterator[None]:
        await asyncio.to_thread(stage.teacher_fails, rule)
        yield
        await asyncio.to_thread(stage.teacher_fails)

    return breaking


@contextlib.asynccontextmanager
async def redis_dead(stage: Stage, _: Traffic) -> AsyncIterator[None]:
    """Kill Redis; it comes back empty."""
    await asyncio.to_thread(stage.redis.kill)
    yield
    await asyncio.to_thread(stage.redis.start)


@contextlib.asynccontextmanager
async def redis_flapping(stage: Stage, _: Traffic) -> AsyncIterator[None]:
    """Reset every connection to Redis, let new ones through, and so on."""

    async def flap() -> None:
        while True:
            stage.to_redis.fault = "refused"
            await stage.to_redis.break_connections()
            await asyncio.sleep(0.25)
            stage.to_redis.fault = None
            await asyncio.sleep(0.25)

    async with _meanwhile(flap()):
        yield
    stage.to_redis.fault = None


@contextlib.asynccontextmanager
async def redis_full(stage: Stage, _: Traffic) -> AsyncIterator[None]:
    """Let Redis refuse to store anything, for want of memory."""
    await asyncio.to_thread(stage.redis.command, "CONFIG", "SET", "maxmemory-policy", "noeviction")
    await asyncio.to_thread(stage.redis.command, "CONFIG", "SET", "maxmemory", "1")
    yield
    await asyncio.to_thread(stage.redis.command, "CONFIG", "SET", "maxmemory", "0")


@contextlib.asynccontextmanager
async def disk_full(stage: Stage, _: Traffic) -> AsyncIterator[None]:
    """Let no file of the gateway's grow any more."""
    stage.limit_files(1)
    yield
    stage.limit_files(None)


@contextlib.asynccontextmanager
async def killed_workers(stage: Stage, _: Traffic) -> AsyncIterator[None]:
    """Kill a worker, whichever, again and again."""
    chosen = random.Random(1)

    async def kill() -> None:
        while True:
            workers = stage.processes().workers
            if len(workers) > 1:
                _kill(chosen.choice(workers))
            await asyncio.sleep(2.0)

    async with _meanwhile(kill()):
        yield


@contextlib.asynccontextmanager
async def killed_keeper(stage: Stage, _: Traffic) -> AsyncIterator[None]:
    """Kill the worker that is the keeper, and then the one that took its place."""

    async def kill() -> None:
        while True:
            keeper = stage.processes().keeper
            if keeper is not None:
                _kill(keeper)
            await asyncio.sleep(2.0)

    async with _meanwhile(kill()):
        yield


@contextlib.asynccontextmanager
async def reloads(stage: Stage, _: Traffic) -> AsyncIterator[None]:
    """Have the configuration read again, twice a second."""

    async def reload() -> None:
        while True:
            stage.signal_gateway(signal.SIGHUP)
            await asyncio.sleep(0.5)

    async with _meanwhile(reload()):
        yield


@contextlib.asynccontextmanager
async def hung_up(stage: Stage, traffic: Traffic) -> AsyncIterator[None]:
    """Add clients that go away, half of them within a few milliseconds."""
    chosen = random.Random(2)

    async def hang_up() -> None:
        while True:
            task = traffic.send()
            asyncio.get_running_loop().call_later(chosen.uniform(0.0, 0.02), task.cancel)
            await asyncio.sleep(0.01)

    async with _meanwhile(hang_up()):
        yield


@contextlib.asynccontextmanager
async def slow_loris(stage: Stage, _: Traffic) -> AsyncIterator[None]:
    """Add 200 connections that send their request a byte at a time."""
    port = int(stage.base_url.removesuffix("/v1").rpartition(":")[2])

    async def drip() -> None:
        head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100000\r\n"
        with contextlib.suppress(OSError):
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                for position in range(len(head)):
                    writer.write(head[position : position + 1])
                    await writer.drain()
                    await asyncio.sleep(0.3)
            finally:
                writer.transport.abort()

    async def all_of_them() -> None:
        await asyncio.gather(*(drip() for _ in range(200)))

    async with _meanwhile(all_of_them()):
        yield


@contextlib.asynccontextmanager
async def nothing(_: Stage, __: Traffic) -> AsyncIterator[None]:
    """Break nothing: what the machine's own noise is like."""
    yield


FAULTS = (
    Fault("none, for comparison", nothing),
    Fault("Redis slow (0.2 s)", _link("redis", "slow"), awaited="cache"),
    Fault("Redis killed, back empty", redis_dead, awaited="cache"),
    Fault("Redis full", redis_full, awaited="cache"),
    Fault("Redis flapping", redis_flapping, awaited="cache"),
    Fault("Redis silent", _link("redis", "silent"), awaited="cache"),
    Fault("Redis answers garbage", _link("redis", "garbage"), awaited="cache"),
    Fault("teacher gone (connections reset)", _link("teacher", "refused"), awaited="teacher"),
    Fault("teacher silent (half-open connections)", _link("teacher", "silent"), awaited="teacher"),
    Fault("teacher slow (+0.5 s)", _link("teacher", "slow", delay_s=0.5), awaited="teacher"),
    Fault(
        "teacher: 429 beyond 10 requests/s",
        _teacher('{"beyond_per_s": 10, "status": 429, "retry_after": "1"}'),
    ),
    Fault("teacher: half of the answers are 500", _teacher('{"share": 0.5, "status": 500}')),
    Fault("teacher: streams fall silent", _teacher('{"hang_after": 2}'), awaited="teacher"),
    Fault("teacher: half of the answers truncated", _teacher('{"share": 0.5, "send": "truncated"}')),
    Fault("teacher: resets in mid-answer", _teacher('{"share": 0.5, "reset_after": 1}')),
    Fault("teacher: bytes that aren't HTTP", _teacher('{"send": "noise"}'), awaited="teacher"),
    Fault("teacher's answers cut off", _link("teacher", "cut"), awaited="teacher"),
    Fault("teacher's answers garbled", _link("teacher", "garbage"), awaited="teacher"),
    Fault("4 times the load a slow teacher can take", _teacher('{"stall": 1}'), rate=240.0),
    Fault("disk full", disk_full),
    Fault("a worker killed, every other second", killed_workers, seconds=6.0),
    Fault("the keeper killed, every other second", killed_keeper, seconds=6.0),
    Fault("configuration reloaded, twice a second", reloads),
    Fault("clients that hang up, 100 a second", hung_up),
    Fault("200 slow-loris connections", slow_loris),
)


@contextlib.asynccontextmanager
async def _meanwhile(work: Coroutine[None, None, None]) -> AsyncIterator[None]:
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
