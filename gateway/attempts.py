"""A client's second attempt at the same request takes the place of the first.

openai-python sends `x-stainless-retry-count` and no idempotency key, so that an attempt is known by its
tenant and its body (STATISTICS.md §2). A retry inherits the first attempt's audit coin: retrying mustn't be
a way to flip it again.
"""

from __future__ import annotations

import hashlib
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Attempt:
    """What is kept of a request: the id of its exchange, its coin, the rate it was flipped at, and when."""

    id: str
    coin: bool
    audit_rate: float
    at: float


class Attempts:
    """The latest attempts seen by this process; bounded in number and time."""

    def __init__(
        self, *, limit: int = 10_000, window_s: float = 600.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._limit = limit
        self._window_s = window_s
        self._clock = clock
        self._latest: OrderedDict[bytes, Attempt] = OrderedDict()

    @staticmethod
    def key(tenant: str, body: bytes) -> bytes:
        """Return what two attempts at the same request have in common."""
        return hashlib.blake2b(body, digest_size=16, key=tenant.encode()[:64]).digest()

    def earlier(self, key: bytes) -> Attempt | None:
        """Return the attempt that a retry takes the place of, if it was seen here within the window."""
        found = self._latest.get(key)
        return found if found is not None and self._clock() - found.at < self._window_s else None

    def remember(self, key: bytes, id: str, *, coin: bool, audit_rate: float) -> None:
        """Note the latest attempt; the oldest are forgotten."""
        self._latest[key] = Attempt(id, coin, audit_rate, self._clock())
        self._latest.move_to_end(key)
        if len(self._latest) > self._limit:
            self._latest.popitem(last=False)
