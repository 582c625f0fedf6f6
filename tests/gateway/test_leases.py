"""Single flight across replicas: one asks, the others get its answer, and nobody waits for the dead."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

from gateway.cache import Cache
from gateway.cache_entry import CachedAnswer
from gateway.leases import Lease, Names
from gateway.metrics import Metrics
from serving.cache_settings import CacheSettings


def an_answer(text: str = "x") -> CachedAnswer:
    completion = {"id": "1", "choices": [{"index": 0, "message": {"content": text}}]}
    return CachedAnswer(completion, "teacher", None, None, None, True, None, None, time.time())


@asynccontextmanager
async def replicas(url: str, count: int = 2, lease_s: float = 60.0) -> AsyncIterator[list[Cache]]:
    """Caches that know of each other through Redis only, without first levels to hide behind."""
    settings = CacheSettings(url=url, single_flight="replicas", lease_s=lease_s, max_bytes=0)
    async with AsyncExitStack() as stack:
        caches = [Cache(settings, Metrics(), patience_s=5.0) for _ in range(count)]
        for cache in caches:
            stack.push_async_callback(cache.aclose)
        for cache in caches:
            await present(cache)
        yield caches


async def becomes(holds: Callable[[], Awaitable[bool]]) -> None:
    deadline = time.monotonic() + 20
    while not await holds():
        assert time.monotonic() < deadline, "it didn't happen within 20 s"
        await asyncio.sleep(0.01)


async def present(cache: Cache) -> None:
    async def asked() -> bool:
        return (await cache.get("not there")).outcome == "miss"

    await becomes(asked)


async def taken(cache: Cache, key: str = "a") -> Lease:
    """Take a lease that must be free, with its token."""
    lease = await cache.lease(key)
    assert lease is not None
    assert lease.token is not None
    return lease


def run(main: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(main, 100))


def test_one_of_many_leads_and_the_others_get_its_answer(redis: Any) -> None:
    async def main() -> None:
        async with replicas(redis().url, 5) as caches:
            leases = await asyncio.gather(*(cache.lease("a") for cache in caches))
            (leader,) = [position for position, lease in enumerate(leases) if lease is not None]
            waiting = [
                asyncio.create_task(cache.awaited("a"))
                for position, cache in enumerate(caches)
                if position != leader
            ]
            await asyncio.sleep(0.05)
            assert not any(task.done() for task in waiting)
            caches[leader].put("a", an_answer("led"), lease=leases[leader])
            answers = await asyncio.gather(*waiting)
            assert {
                answer.completion["choices"][0]["message"]["content"] for answer in answers if answer
            } == {"led"}
            assert len(answers) == 4

    run(main())


def test_leases_of_different_keys_are_independent(redis: Any) -> None:
    async def main() -> None:
        async with replicas(redis().url) as (one, other):
            assert (await taken(one, "a")).key == "a"
            assert (await taken(other, "b")).key == "b"

    run(main())


def test_an_answer_that_has_just_come_is_no_reason_to_lead(redis: Any) -> None:
    async def main() -> None:
        async with replicas(redis().url) as (one, other):
            lease = await taken(one)
            answer = an_answer()
            one.put("a", answer, lease=lease)
            assert await other.awaited("a") == answer
            assert await other.lease("a") is None
            # Unless it is too old for who asks.
            assert await other.lease("a", max_age_s=0.0) is not None

    run(main())


def test_a_leader_that_fails_frees_the_others_at_once(redis: Any) -> None:
    async def main() -> None:
        async with replicas(redis().url) as (one, other):
            lease = await taken(one)
            waiting = asyncio.create_task(other.awaited("a"))
            await asyncio.sleep(0.02)
            one.release(lease)
            began = time.monotonic()
            assert await waiting is None
            assert time.monotonic() - began < 5
            await taken(other)

    run(main())


def test_an_answer_that_can_not_be_kept_frees_the_others_too(redis: Any) -> None:
    async def main() -> None:
        server = redis()
        began = time.monotonic()
        async with replicas(server.url) as (one, other):
            one.put("a", an_answer("x" * 2_000_000), lease=await taken(one))
            assert await other.awaited("a") is None
            lease, another = await taken(other, "b"), await taken(other, "c")
            server.command("CONFIG", "SET", "maxmemory", 1)
            other.put("b", an_answer(), lease=lease)
            assert await one.awaited("b") is None
            # Redis is known to be full now, and isn't asked to keep this one at all.
            other.put("c", an_answer(), lease=another)
            assert await one.awaited("c") is None
        assert time.monotonic() - began < 50, "somebody waited for the end of a lease"

    run(main())


def test_a_leader_that_died_costs_the_others_its_lease(redis: Any) -> None:
    async def main() -> None:
        async with replicas(redis().url, lease_s=0.3) as (one, other):
            began = time.monotonic()
            await taken(one)
            assert await other.lease("a") is None
            assert await other.awaited("a") is None
            assert time.monotonic() - began >= 0.2
            await taken(other)

    run(main())


def test_nobody_waits_longer_than_one_lease_whoever_takes_over(redis: Any) -> None:
    async def main() -> None:
        async with replicas(redis().url, 3, lease_s=2.0) as (one, other, third):
            lease = await taken(one)
            began = time.monotonic()
            waiting = asyncio.create_task(third.awaited("a"))
            await asyncio.sleep(1.5)
            one.release(lease)
            # Taken over at once: whoever waits may not see the moment between.
            successor = None
            while successor is None:
                successor = await other.lease("a")
            assert await waiting is None
            assert time.monotonic() - began < 2.0 + 1.0

    run(main())


def test_who_was_given_up_can_not_write_over_who_took_over(redis: Any) -> None:
    async def main() -> None:
        async with replicas(redis().url, lease_s=0.1) as (slow, quick):
            late = await taken(slow)

            async def over() -> bool:
                return await quick.awaited("a") is None

            await becomes(over)
            lease = await taken(quick)
            slow.put("a", an_answer("late"), lease=late)
            quick.put("a", an_answer("in time"), lease=lease)
            answer = await slow.awaited("a")
            assert answer is not None
            slow.put("a", an_answer("even later"), lease=late)
            slow.release(late)
            await slow.aclose()  # everything is written
            answer = (await quick.get("a")).answer
            assert answer is not None
            assert answer.completion["choices"][0]["message"]["content"] == "in time"

    run(main())


def test_an_answer_that_was_refused_is_not_kept_here_either(redis: Any) -> None:
    async def main() -> None:
        server = redis()
        settings = CacheSettings(url=server.url, single_flight="replicas")
        metrics = Metrics()
        cache = Cache(settings, metrics, patience_s=5.0)
        await present(cache)
        cache.put("a", an_answer(), lease=Lease("a", 12345))

        async def fenced() -> bool:
            return 'understudy_cache_puts_total{outcome="fenced"} 1.0' in metrics.exposition().decode()

        await becomes(fenced)
        assert (await cache.get("a")).outcome == "miss"
        lease = await taken(cache)
        cache.put("a", an_answer(), lease=lease)
        await cache.aclose()
        assert (await cache.get("a")).outcome == "hit"

    run(main())


def test_who_is_slow_but_not_replaced_may_still_write(redis: Any) -> None:
    async def main() -> None:
        async with replicas(redis().url, lease_s=0.05) as (one, other):
            lease = await taken(one)
            assert await other.awaited("a") is None
            answer = an_answer()
            one.put("a", answer, lease=lease)

            async def found() -> bool:
                return (await other.get("a")).answer == answer

            await becomes(found)

    run(main())


def test_no_token_is_given_twice_even_by_a_redis_that_has_forgotten(redis: Any) -> None:
    async def main() -> None:
        server = redis()
        async with replicas(server.url) as (one, other):
            tokens = set()
            for _ in range(20):
                lease = await taken(one)
                tokens.add(lease.token)
                server.command("FLUSHALL")
            assert len(tokens) == 20
            current = await taken(other)
            one.put("a", an_answer("late"), lease=lease)
            one.release(lease)
            await one.aclose()
            assert server.command("EXISTS", Names.of("a", "").entry) == 0
            assert server.command("GET", Names.of("a", "").lease) == str(current.token).encode()

    run(main())


def test_without_redis_everyone_leads_and_nobody_waits(redis: Any) -> None:
    async def main() -> None:
        server = redis()
        async with replicas(server.url) as (one, other):
            lease = await taken(one)
            server.kill()
            assert await other.lease("a") == Lease("a", None)
            assert await other.awaited("a") is None
            one.release(lease)
            one.put("a", an_answer(), lease=lease)
            other.put("a", an_answer(), lease=Lease("a", None))

    run(main())


def test_who_stops_waiting_for_a_lease_leaves_none_behind(redis: Any) -> None:
    async def main() -> None:
        server = redis()
        async with replicas(server.url) as (one, other):
            for number in range(20):
                asking = asyncio.create_task(one.lease(f"{number}"))
                for _ in range(number % 6):
                    await asyncio.sleep(0)
                asking.cancel()
                got = (await asyncio.gather(asking, return_exceptions=True))[0]
                if isinstance(got, Lease):
                    one.release(got)

                async def free(key: str = f"{number}") -> bool:
                    return await other.lease(key) is not None

                await becomes(free)

    run(main())


def test_nothing_of_it_stays_in_redis(redis: Any) -> None:
    async def main() -> None:
        server = redis()
        async with replicas(server.url) as (one, _):
            one.put("a", an_answer(), lease=await taken(one, "a"))
            await taken(one, "b")
        names = server.command("KEYS", "*")
        assert len(names) == 4  # a: fence and entry; b: fence and lease
        assert all(server.command("PTTL", name) > 0 for name in names)

    run(main())
