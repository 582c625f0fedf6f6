"""The response cache: a first level in this process, and behind it a Redis that several processes share."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from gateway.cache_entry import CachedAnswer, decode, encode
from gateway.cache_memory import MemoryLevel
from gateway.leases import Lease
from gateway.metrics import Metrics
from serving.settings import CacheSettings

_JITTER = 0.1


@dataclass(frozen=True, slots=True)
class Lookup:
    """What came of looking for an answer. `error`: none was found, and Redis could not be asked."""

    answer: CachedAnswer | None
    outcome: Literal["hit", "miss", "error"]


class Cache:
    """Answers by key (`gateway.cache_key`). One per process, used from one event loop.

    It holds what it is given: that only complete, successful answers get in is up to who puts them. An entry
    is kept for `ttl_s`, give or take 10 %, so that what came in together doesn't go together.
    """

    def __init__(
        self, settings: CacheSettings, metrics: Metrics, *, clock: Callable[[], float] = time.time
    ) -> None:
        self._ttl_s = settings.ttl_s
        self._max_entry_bytes = settings.max_entry_bytes
        self._memory = MemoryLevel(settings.max_bytes)
        self._metrics = metrics
        self._clock = clock

    async def get(self, key: str, *, max_age_s: float | None = None) -> Lookup:
        """Look for the answer to a key, not older than `max_age_s`. Never raises."""
        data = self._memory.get(key)
        answer = None if data is None else decode(data, key)
        return self._found(answer, max_age_s) or Lookup(None, "miss")

    def put(self, key: str, answer: CachedAnswer, *, lease: Lease | None = None) -> None:
        """Keep an answer, in place of an earlier one. Never waits, never raises; what can't be kept isn't.

        With the lease it was asked under, an answer that comes too late, when another replica has taken
        over, is refused, and a lease that is still held is given back.
        """
        try:
            data = encode(answer, key)
        except ValueError:
            self._metrics.record_cache_put("refused")
            return
        if len(data) > self._max_entry_bytes:
            self._metrics.record_cache_put("refused")
            return
        self._keep(key, data, self._lifetime_s())
        self._metrics.record_cache_put("stored")

    async def lease(self, key: str, *, max_age_s: float | None = None) -> Lease | None:
        """Ask for the right to answer a key; None: another replica is at it (wait for it with `awaited`).

        With single flight within the process only, everyone gets it. Never raises.
        """
        return Lease(key)

    async def awaited(self, key: str, *, max_age_s: float | None = None) -> CachedAnswer | None:
        """Wait for the answer another replica is at; None as soon as its lease has ended without one."""
        return (await self.get(key, max_age_s=max_age_s)).answer

    def release(self, lease: Lease) -> None:
        """Give a lease back without an answer, so that nobody waits for one. Never waits, never raises."""

    async def aclose(self) -> None:
        """Let go of everything. May be called twice."""

    def _found(self, answer: CachedAnswer | None, max_age_s: float | None) -> Lookup | None:
        if answer is None:
            return None
        age_s = answer.age_s(self._clock())
        if max_age_s is not None and age_s > max_age_s:
            return None
        self._metrics.record_cache_age(age_s)
        return Lookup(answer, "hit")

    def _keep(self, key: str, data: bytes, ttl_s: float) -> None:
        self._memory.put(key, data, ttl_s)
        self._metrics.record_cache_bytes(self._memory.taken)

    def _lifetime_s(self) -> float:
        return self._ttl_s * random.uniform(1 - _JITTER, 1 + _JITTER)
