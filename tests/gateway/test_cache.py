"""The cache without Redis: what is put is found, until it is too old, too large or pushed out."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any

from gateway.cache import Cache, Lookup
from gateway.cache_entry import CachedAnswer
from gateway.leases import Lease
from gateway.metrics import Metrics
from serving.cache_settings import CacheSettings


def an_answer(text: str = "x", stored_at: float = 1000.0) -> CachedAnswer:
    completion = {"id": "1", "choices": [{"index": 0, "message": {"content": text}}]}
    return CachedAnswer(completion, "teacher", None, None, None, True, None, None, stored_at)


def run(use: Callable[[Cache], Coroutine[Any, Any, None]], now: float = 1000.0, **settings: Any) -> str:
    """Use a cache; give the metrics it has left."""
    metrics = Metrics()

    async def main() -> None:
        cache = Cache(CacheSettings(**settings), metrics, clock=lambda: now)
        await use(cache)
        await cache.aclose()
        await cache.aclose()

    asyncio.run(main())
    return metrics.exposition().decode()


def test_what_is_put_is_found() -> None:
    async def use(cache: Cache) -> None:
        assert await cache.get("a") == Lookup(None, "miss")
        cache.put("a", an_answer())
        assert await cache.get("a") == Lookup(an_answer(), "hit")
        assert await cache.get("b") == Lookup(None, "miss")
        cache.put("a", an_answer("newer"))
        assert await cache.get("a") == Lookup(an_answer("newer"), "hit")

    metrics = run(use)
    assert 'understudy_cache_puts_total{outcome="stored"} 2.0' in metrics
    assert "understudy_cache_age_seconds_count 2.0" in metrics


def test_nobody_can_change_what_is_kept() -> None:
    async def use(cache: Cache) -> None:
        given = an_answer()
        cache.put("a", given)
        given.completion["choices"] = []
        found = (await cache.get("a")).answer
        assert found == an_answer()
        found.completion["choices"] = []
        assert (await cache.get("a")).answer == an_answer()

    run(use)


def test_what_is_older_than_asked_for_is_a_miss() -> None:
    async def use(cache: Cache) -> None:
        cache.put("a", an_answer(stored_at=940.0))
        assert (await cache.get("a", max_age_s=59.0)).outcome == "miss"
        assert (await cache.get("a", max_age_s=60.0)).outcome == "hit"
        assert (await cache.get("a", max_age_s=0.0)).outcome == "miss"

    metrics = run(use)
    assert "understudy_cache_age_seconds_sum 60.0" in metrics


def test_what_is_too_large_or_no_json_is_refused_and_an_older_answer_stays() -> None:
    async def use(cache: Cache) -> None:
        cache.put("a", an_answer())
        cache.put("a", an_answer("x" * 5000))
        cache.put("a", an_answer("\ud800"))
        assert (await cache.get("a")).answer == an_answer()

    assert 'understudy_cache_puts_total{outcome="refused"} 2.0' in run(use, max_entry_bytes=4096)


def test_the_memory_taken_is_a_metric() -> None:
    async def use(cache: Cache) -> None:
        for number in range(100):
            cache.put(f"{number}", an_answer("x" * 500))

    (line,) = [
        line for line in run(use, max_bytes=10_000).splitlines() if line.startswith("understudy_cache_bytes ")
    ]
    assert 9_000 < float(line.split()[1]) <= 10_000


def test_entries_that_came_together_go_one_by_one_and_in_time() -> None:
    async def use(cache: Cache) -> None:
        began = time.monotonic()
        for number in range(200):
            cache.put(f"{number}", an_answer())
        put = time.monotonic()
        seen: list[int] = []
        while not seen or seen[-1]:
            asked = time.monotonic()
            left = [(await cache.get(f"{number}")).answer is not None for number in range(200)]
            seen.append(sum(left))
            if asked - put > 1.1 * 0.5:
                assert not any(left), "one is there after its time"
            if time.monotonic() - began < 0.9 * 0.5:
                assert all(left), "one has gone before its time"
        assert time.monotonic() - began >= 0.9 * 0.5

    run(use, ttl_s=0.5)
    lifetimes = {round(Cache(CacheSettings(), Metrics())._lifetime_s()) for _ in range(100)}
    assert min(lifetimes) >= 3240
    assert max(lifetimes) <= 3960
    assert len(lifetimes) > 50


def test_within_one_process_everybody_leads() -> None:
    async def use(cache: Cache) -> None:
        assert await cache.lease("a") == await cache.lease("a") == Lease("a", None)
        cache.release(Lease("a", None))
        assert await cache.awaited("a") is None
        cache.put("a", an_answer(), lease=Lease("a", None))
        assert await cache.awaited("a") == an_answer()

    run(use)
