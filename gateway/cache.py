"""The response cache: a first level in this process, and behind it a Redis that several processes share."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from gateway import leases
from gateway.cache_entry import CachedAnswer, decode, encode
from gateway.cache_memory import MemoryLevel
from gateway.leases import Lease, Names
from gateway.metrics import CachePut, Metrics
from serving.cache_settings import CacheSettings
from serving.redis_url import RedisUrl

_JITTER = 0.1
_FIRST_LOOK_S = 0.005
_LONGEST_LOOK_S = 0.05


@dataclass(frozen=True, slots=True)
class Lookup:
    """What came of looking for an answer. `error`: none was found, and Redis could not be asked."""

    answer: CachedAnswer | None
    outcome: Literal["hit", "miss", "error"]


class Cache:
    """Answers by key (`gateway.cache_key`). One per process, made and used inside one event loop.

    It holds what it is given: that only complete, successful answers get in is up to who puts them. An entry
    is kept for `ttl_s`, give or take 10 %, so that what came in together doesn't go together. A newer answer
    takes the place of an older one here and in Redis; other processes may have the older one until its time.

    `scope` keeps apart, within one Redis, what doesn't belong together (`gateway.cache_key.cache_scope`).
    `patience_s` is how long Redis may take; nobody waits longer than half as much again. Raises ConfigError
    for certificates of Redis that can't be used; no method ever raises.
    """

    def __init__(
        self,
        settings: CacheSettings,
        metrics: Metrics,
        *,
        scope: str = "",
        patience_s: float = 0.03,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._ttl_s = settings.ttl_s
        self._max_entry_bytes = settings.max_entry_bytes
        self._among_replicas = settings.single_flight == "replicas"
        self._lease_s = settings.lease_s
        self._memory = MemoryLevel(settings.max_bytes)
        self._metrics = metrics
        self._scope = scope
        self._clock = clock
        self._redis = None
        if settings.url is not None:
            # A gateway without Redis doesn't load its library.
            from gateway.cache_redis import RedisLevel

            self._redis = RedisLevel(RedisUrl.parse(settings.url.get_secret_value()), patience_s=patience_s)

    async def get(self, key: str, *, max_age_s: float | None = None) -> Lookup:
        """Look for the answer to a key, not older than `max_age_s`. Takes 50 ms at most."""
        data = self._memory.get(key)
        answer = None if data is None else self._usable(decode(data, key), max_age_s)
        if answer is not None:
            return Lookup(answer, "hit")
        if self._redis is None:
            return Lookup(None, "miss")
        found = await self._redis.read(self._names(key).entry)
        if found is None:
            return Lookup(None, "error")
        (data,) = found
        if data is None:
            return Lookup(None, "miss")
        entry = decode(data, key)
        if entry is None:
            # Damaged, or another's: the next answer will be written over it.
            return Lookup(None, "error")
        answer = self._usable(entry, max_age_s)
        if answer is None:
            return Lookup(None, "miss")
        self._keep_rest(key, data, answer)
        return Lookup(answer, "hit")

    def put(self, key: str, answer: CachedAnswer, *, lease: Lease | None = None) -> None:
        """Keep an answer, in place of an earlier one. Never waits; what can't be kept isn't.

        With the lease it was asked under, an answer that comes too late, when another replica has taken
        over, is refused; one that comes in time gives the lease back.
        """
        try:
            data = encode(answer, key)
        except ValueError:
            data = None
        if data is None or len(data) > self._max_entry_bytes:
            self._metrics.record_cache_put("refused")
            if lease is not None:
                self.release(lease)
            return
        ttl_s = self._lifetime_s()
        token = None if lease is None else lease.token
        if token is None:
            self._keep(key, data, ttl_s)
        if self._redis is None:
            self._metrics.record_cache_put("stored")
            return

        def done(outcome: CachePut) -> None:
            self._metrics.record_cache_put(outcome)
            if lease is None or lease.token is None or outcome == "fenced":
                return
            # Only now is it known that no other replica's answer takes its place.
            self._keep(key, data, ttl_s)
            if outcome != "stored":
                self.release(lease)

        self._redis.write(leases.store(self._names(key), data, ttl_s=ttl_s, token=token), len(data), done)

    async def lease(self, key: str, *, max_age_s: float | None = None) -> Lease | None:
        """Ask for the right to answer a key; None: another replica is at it, or has just answered (`awaited`).

        With single flight within the process only, or without Redis, everyone gets it. With `max_age_s` an
        answer that is there already doesn't count. Takes 50 ms at most.
        """
        if self._redis is None or not self._among_replicas:
            return Lease(key)
        command = leases.take(self._names(key), lease_s=self._lease_s, unless_answered=max_age_s is None)
        asking = asyncio.ensure_future(self._redis.call(command))
        try:
            token = await asyncio.shield(asking)
        except asyncio.CancelledError:
            # Nobody is going to answer under the lease this may still get.
            asking.add_done_callback(lambda asked: self._release_late(key, asked))
            raise
        return None if token == 0 else Lease(key, token)

    async def awaited(self, key: str, *, max_age_s: float | None = None) -> CachedAnswer | None:
        """Wait for the answer another replica is at.

        None as soon as its lease has ended without one, or Redis can't be asked: after `lease_s` at most.
        """
        if self._redis is None:
            return (await self.get(key, max_age_s=max_age_s)).answer
        names = self._names(key)
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._lease_s
        rest_s = _FIRST_LOOK_S
        while True:
            found = await self._redis.read(names.lease, names.entry)
            if found is None:
                return None
            held, data = found
            answer = None if data is None else self._usable(decode(data, key), max_age_s)
            if data is not None and answer is not None:
                self._keep_rest(key, data, answer)
                return answer
            left_s = deadline - loop.time()
            if held is None or left_s <= 0:
                return None
            await asyncio.sleep(min(rest_s, left_s))
            rest_s = min(1.5 * rest_s, _LONGEST_LOOK_S)

    def release(self, lease: Lease) -> None:
        """Give a lease back without an answer, so that nobody waits for one. Never waits."""
        if self._redis is not None and lease.token is not None:
            command = leases.release(self._names(lease.key), lease.token)
            self._redis.write(command, len(lease.key), lambda _: None, takes_room=False)

    async def aclose(self) -> None:
        """Write what is still to be written, and let go of Redis. May be called twice."""
        if self._redis is not None:
            await self._redis.aclose()

    def _names(self, key: str) -> Names:
        return Names.of(key, self._scope)

    def _usable(self, answer: CachedAnswer | None, max_age_s: float | None) -> CachedAnswer | None:
        if answer is None:
            return None
        age_s = answer.age_s(self._clock())
        if max_age_s is not None and age_s > max_age_s:
            return None
        self._metrics.record_cache_age(age_s)
        return answer

    def _keep(self, key: str, data: bytes, ttl_s: float) -> None:
        self._memory.put(key, data, ttl_s)
        self._metrics.record_cache_bytes(self._memory.taken)

    def _keep_rest(self, key: str, data: bytes, answer: CachedAnswer) -> None:
        """Keep here what came from Redis, for what is left of its time."""
        self._keep(key, data, self._lifetime_s() - answer.age_s(self._clock()))

    def _lifetime_s(self) -> float:
        return self._ttl_s * random.uniform(1 - _JITTER, 1 + _JITTER)

    def _release_late(self, key: str, asked: asyncio.Future[int | None]) -> None:
        token = None if asked.cancelled() else asked.result()
        if token:
            self.release(Lease(key, token))
