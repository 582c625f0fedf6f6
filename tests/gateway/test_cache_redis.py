"""Redis behind the cache: shared while it is there, and never waited for while it isn't."""

from __future__ import annotations

import asyncio
import itertools
import logging
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import pytest

from gateway.cache import Cache, Lookup
from gateway.cache_entry import CachedAnswer, encode
from gateway.leases import Names
from gateway.metrics import Metrics
from serving.cache_settings import CacheSettings

WAIT_S = 0.05
"""What a request waits for Redis at most, with the patience a gateway has."""
HASTY = 0.03


def an_answer(text: str = "x", age_s: float = 0.0) -> CachedAnswer:
    completion = {"id": "1", "choices": [{"index": 0, "message": {"content": text}}]}
    return CachedAnswer(completion, "teacher", None, None, None, True, None, None, time.time() - age_s)


@asynccontextmanager
async def opened(
    url: str, metrics: Metrics | None = None, patience_s: float = 5.0, **settings: Any
) -> AsyncIterator[Cache]:
    """A cache; where its haste isn't what is tested, one that a busy machine doesn't confuse."""
    cache = Cache(CacheSettings(url=url, **settings), metrics or Metrics(), scope="s", patience_s=patience_s)
    try:
        yield cache
    finally:
        await cache.aclose()


async def becomes(holds: Callable[[], Awaitable[bool]]) -> None:
    deadline = time.monotonic() + 20
    while not await holds():
        assert time.monotonic() < deadline, "it didn't happen within 20 s"
        await asyncio.sleep(0.01)


async def present(cache: Cache) -> None:
    """Wait until Redis can be asked."""
    await becomes(lambda: outcome_is(cache, "not there", "miss"))


async def outcome_is(cache: Cache, key: str, outcome: str) -> bool:
    return (await cache.get(key)).outcome == outcome


async def shared(cache: Cache, key: str, answer: CachedAnswer) -> None:
    """Wait until another process finds an answer."""

    async def found() -> bool:
        return (await cache.get(key)).answer == answer

    await becomes(found)


def counted(metrics: Metrics, name: str, **labels: str) -> float:
    wanted = "".join(f'{key}="{value}"' for key, value in labels.items())
    for line in metrics.exposition().decode().splitlines():
        if line.startswith(name) and wanted in line:
            return float(line.split()[-1])
    return 0.0


async def longest_wait_s(cache: Cache, gets: int, meanwhile: Callable[[int], None]) -> float:
    """The longest of many gets of other keys, in excess of what this process itself was late by."""
    lag_s = 0.0

    async def tick() -> None:
        nonlocal lag_s
        while True:
            began = time.monotonic()
            await asyncio.sleep(0.001)
            lag_s = max(lag_s, time.monotonic() - began - 0.001)

    ticking = asyncio.create_task(tick())
    longest_s = 0.0
    for number in range(gets):
        meanwhile(number)
        lag_s = 0.0
        began = time.monotonic()
        found = await cache.get(f"key {number}")
        took_s = time.monotonic() - began
        assert found.answer is None
        # A get that is over before the clock ticked once needs no allowance.
        longest_s = max(longest_s, took_s if took_s < 0.002 else took_s - lag_s)
        if number % 20 == 0:
            await asyncio.sleep(0.001)
    ticking.cancel()
    return longest_s


def run(main: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(main, 100))


# While it is there


def test_what_one_process_puts_another_finds(redis: Any) -> None:
    async def main() -> None:
        server = redis()
        async with opened(server.url, ttl_s=100) as one, opened(server.url, ttl_s=100) as other:
            await present(one)
            await present(other)
            answer = an_answer()
            one.put("a", answer)
            await shared(other, "a", answer)
            (name,) = server.command("KEYS", "*")
            assert 90_000 - 20_000 <= server.command("PTTL", name) <= 110_000
            server.kill()
            # It is in the other's first level now.
            assert await other.get("a") == Lookup(answer, "hit")

    run(main())


def test_what_comes_from_redis_is_kept_for_the_rest_of_its_time_only(redis: Any) -> None:
    async def main() -> None:
        server = redis()
        async with opened(server.url, ttl_s=3600) as cache:
            await present(cache)
            for age_s, stays in ((3000.0, True), (4000.0, False)):
                answer = an_answer(age_s=age_s)
                server.command("SET", Names.of(f"{age_s}", "s").entry, encode(answer, f"{age_s}"))
                assert (await cache.get(f"{age_s}", max_age_s=age_s - 1)).outcome == "miss"
                assert (await cache.get(f"{age_s}")).answer == answer
                server.command("FLUSHALL")
                assert ((await cache.get(f"{age_s}")).answer is not None) == stays

    run(main())


def test_scopes_share_nothing(redis: Any) -> None:
    async def main() -> None:
        server = redis()
        async with opened(server.url) as cache:
            await present(cache)
            server.command("SET", Names.of("a", "another").entry, encode(an_answer(), "a"))
            assert (await cache.get("a")).outcome == "miss"

    run(main())


def test_many_requests_share_few_connections_and_commands(redis: Any) -> None:
    async def main() -> None:
        server = redis()
        async with opened(server.url, max_bytes=0) as cache:
            await present(cache)
            before = int(server.command("INFO", "commandstats")["cmdstat_mget"]["calls"])
            connections = server.command("INFO", "clients")["connected_clients"]
            for number in range(300):
                cache.put(f"{number}", an_answer(f"{number}"))
            await becomes(lambda: outcome_is(cache, "299", "hit"))
            found = await asyncio.gather(*(cache.get(f"{number}") for number in range(300)))
            texts = [
                item.answer.completion["choices"][0]["message"]["content"] for item in found if item.answer
            ]
            assert texts == [f"{number}" for number in range(300)]
            assert server.command("INFO", "clients")["connected_clients"] <= connections + 2
            asked = int(server.command("INFO", "commandstats")["cmdstat_mget"]["calls"]) - before
            assert asked < 150

    run(main())


def test_a_request_that_ends_early_disturbs_no_other(redis: Any) -> None:
    async def main() -> None:
        server = redis()
        async with opened(server.url, max_bytes=0) as cache:
            await present(cache)
            for number in range(20):
                cache.put(f"{number}", an_answer(f"{number}"))
            await becomes(lambda: outcome_is(cache, "19", "hit"))
            for number in range(20):
                asking = [asyncio.create_task(cache.get(f"{other}")) for other in range(20)]
                for _ in range(number % 5):
                    await asyncio.sleep(0)
                for task in asking[::2]:
                    task.cancel()
                done = await asyncio.gather(*asking, return_exceptions=True)
                for other, found in enumerate(done[1::2]):
                    assert isinstance(found, Lookup)
                    assert found.answer is None or found.answer.completion["choices"][0]["message"][
                        "content"
                    ] == str(2 * other + 1)
            assert (await cache.get("0")).outcome == "hit"

    run(main())


# While it isn't


def test_nothing_wrong_is_served_from_damaged_entries(redis: Any) -> None:
    async def main() -> None:
        server = redis()
        async with opened(server.url, max_bytes=0) as cache:
            await present(cache)
            whole = encode(an_answer(), "a")
            name = Names.of("a", "s").entry
            for damaged in (b"", b"garbage", whole[:-1], whole + b"}", encode(an_answer(), "b")):
                server.command("SET", name, damaged)
                assert await cache.get("a") == Lookup(None, "error")
            server.command("DEL", name)
            server.command("LPUSH", name, "another type")
            assert (await cache.get("a")).outcome == "miss"
            cache.put("a", an_answer())
            await becomes(lambda: outcome_is(cache, "a", "hit"))

    run(main())


def test_a_redis_that_dies_costs_next_to_nothing_and_comes_back(
    redis: Any, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        server = redis(password="secret")
        metrics = Metrics()
        async with opened(server.url, metrics, max_bytes=0, patience_s=HASTY) as cache:
            await present(cache)
            waited = await longest_wait_s(cache, 600, lambda number: server.kill() if number == 300 else None)
            assert waited < WAIT_S
            assert (await cache.get("a")).outcome == "error"
            cache.put("a", an_answer())
            assert counted(metrics, "understudy_cache_puts_total", outcome="dropped") == 1
            server.start()
            await present(cache)
            cache.put("a", an_answer())
            await becomes(lambda: outcome_is(cache, "a", "hit"))

    with caplog.at_level(logging.INFO, "understudy.cache"):
        run(main())
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2
    assert said[0].startswith("Redis can't be used: no connection")
    assert said[1] == "Redis is back"
    assert "secret" not in caplog.text


def test_a_redis_that_hangs_holds_up_one_request_and_not_for_long(redis: Any) -> None:
    async def main() -> None:
        server = redis()
        async with opened(server.url, patience_s=HASTY) as cache:
            await present(cache)
            waited = await longest_wait_s(cache, 400, lambda number: server.stop() if number == 100 else None)
            assert waited < WAIT_S
            cache.put("a", an_answer())
            server.cont()
            await present(cache)
            assert (await cache.get("a")).outcome == "hit"

    run(main())


def test_a_redis_that_comes_and_goes_never_holds_anybody_up(redis: Any) -> None:
    async def main() -> None:
        server = redis()
        async with opened(server.url, patience_s=HASTY) as cache:
            await present(cache)
            turns = itertools.cycle([server.stop, server.cont])
            waited = await longest_wait_s(
                cache, 2_000, lambda number: next(turns)() if number % 100 == 0 else None
            )
            assert waited < WAIT_S
            server.cont()
            await present(cache)

    run(main())


def test_a_redis_that_restarts_is_empty_and_nothing_else(redis: Any) -> None:
    async def main() -> None:
        server = redis()
        async with opened(server.url, max_bytes=0) as cache:
            await present(cache)
            cache.put("a", an_answer())
            await becomes(lambda: outcome_is(cache, "a", "hit"))
            server.kill()
            server.start()
            await becomes(lambda: outcome_is(cache, "a", "miss"))

    run(main())


def test_a_full_redis_is_read_and_written_again_once_it_has_room(redis: Any) -> None:
    async def main() -> None:
        server = redis()
        metrics = Metrics()
        async with opened(server.url, metrics, max_bytes=0) as cache:
            await present(cache)
            cache.put("a", an_answer())
            await becomes(lambda: outcome_is(cache, "a", "hit"))
            server.command("CONFIG", "SET", "maxmemory", 1)

            async def failed() -> bool:
                cache.put("b", an_answer())
                return counted(metrics, "understudy_cache_puts_total", outcome="failed") > 0

            await becomes(failed)
            assert (await cache.get("a")).outcome == "hit"
            assert (await cache.get("b")).outcome == "miss"
            server.command("CONFIG", "SET", "maxmemory", 0)

            async def stored() -> bool:
                cache.put("b", an_answer())
                return (await cache.get("b")).outcome == "hit"

            await becomes(stored)

    run(main())


def test_a_replica_is_read_and_left_alone_with_writes(redis: Any) -> None:
    async def main() -> None:
        server = redis()
        metrics = Metrics()
        async with opened(server.url, metrics, max_bytes=0) as cache:
            await present(cache)
            cache.put("a", an_answer())
            await becomes(lambda: outcome_is(cache, "a", "hit"))
            server.command("REPLICAOF", "127.0.0.1", 1)

            async def failed() -> bool:
                cache.put("b", an_answer())
                return counted(metrics, "understudy_cache_puts_total", outcome="failed") > 0

            await becomes(failed)
            assert (await cache.get("a")).outcome == "hit"
            server.command("REPLICAOF", "NO", "ONE")

            async def stored() -> bool:
                cache.put("b", an_answer())
                return (await cache.get("b")).outcome == "hit"

            await becomes(stored)

    run(main())


def test_a_wrong_password_is_said_once_and_never_shown(redis: Any, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        server = redis(password="right")
        async with opened(f"redis://:wrong@127.0.0.1:{server.port}", patience_s=HASTY) as cache:
            waited = await longest_wait_s(cache, 200, lambda _: None)
            assert waited < WAIT_S
            await becomes(lambda: said(caplog, 1))
            assert (await cache.get("a")).outcome == "error"

    async def said(caplog: pytest.LogCaptureFixture, count: int) -> bool:
        return len(caplog.records) >= count

    with caplog.at_level(logging.INFO):
        run(main())
    assert "doesn't accept the user and password" in caplog.text
    assert "wrong" not in caplog.text


ANSWERS = {
    "silence": None,
    "nothing": b"",
    "garbage": b"\x00\xff" * 50,
    "HTTP": b"HTTP/1.1 400 Bad Request\r\n\r\n",
    "another kind": b"+OK\r\n" * 3,
    "numbers": b":1\r\n" * 3,
    "too few": b"*0\r\n" * 3,
    "an entry that isn't asked for": b"*1\r\n$3\r\nabc\r\n" * 3,
    "the password": b"-ERR unknown command `AUTH`, with args beginning with: `secret`\r\n" * 3,
    "half an answer": b"*1\r\n$100\r\nabc",
}


@pytest.mark.parametrize("kind", ANSWERS)
def test_what_is_no_redis_is_done_without(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            answer = ANSWERS[kind]
            try:
                while await reader.read(65536):
                    if answer is not None:
                        writer.write(answer)
                    if not answer and answer is not None:
                        break
            except ConnectionError:
                pass
            finally:
                writer.close()

        metrics = Metrics()
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        async with opened(f"redis://:secret@127.0.0.1:{port}", metrics, patience_s=HASTY) as cache:
            waited = await longest_wait_s(cache, 300, lambda _: None)
            assert waited < WAIT_S
            cache.put("a", an_answer())
            assert (await cache.get("a")).outcome == "hit"
            began = time.monotonic()
        assert time.monotonic() - began < 5
        server.close()

    run(main())
    assert "secret" not in caplog.text


def test_an_address_that_swallows_everything_costs_nothing() -> None:
    async def main() -> None:
        # A full backlog: connections are neither accepted nor refused.
        with socket.create_server(("127.0.0.1", 0), backlog=0) as swallowing:
            port = swallowing.getsockname()[1]
            filling = [socket.socket() for _ in range(4)]
            for item in filling:
                item.setblocking(False)
                item.connect_ex(("127.0.0.1", port))
            async with opened(f"redis://127.0.0.1:{port}", patience_s=HASTY) as cache:
                assert await longest_wait_s(cache, 300, lambda _: None) < WAIT_S
            for item in filling:
                item.close()

    run(main())


def test_writes_that_redis_does_not_take_are_bounded_and_counted(redis: Any) -> None:
    async def main() -> None:
        server = redis()
        metrics = Metrics()
        async with opened(server.url, metrics) as cache:
            await present(cache)
            server.stop()
            for number in range(2_000):
                cache.put(f"{number}", an_answer())
            waiting = 2_000 - counted(metrics, "understudy_cache_puts_total", outcome="dropped")
            assert 0 < waiting <= 600

            async def all_dropped() -> bool:
                return counted(metrics, "understudy_cache_puts_total", outcome="dropped") == 2_000

            await becomes(all_dropped)
            server.cont()

    run(main())


def test_closing_writes_what_waits_and_leaves_nothing_behind(redis: Any) -> None:
    async def main() -> None:
        server = redis()
        async with opened(server.url) as cache:
            await present(cache)
            for number in range(100):
                cache.put(f"{number}", an_answer())
        assert len(server.command("KEYS", "*")) == 100
        assert len(asyncio.all_tasks()) == 2  # this one, and what bounds its time
        assert (await cache.get("0")).outcome == "hit"
        assert (await cache.get("other")).outcome == "error"
        cache.put("later", an_answer())
        await cache.aclose()

    run(main())
