"""The cache's first level: a bounded number of bytes in this process, the least recently used leave first."""

from __future__ import annotations

import sys
import time
from collections import OrderedDict
from collections.abc import Callable

_ENTRY_OVERHEAD = 256
"""What the interpreter keeps for one entry besides its two strings: the OrderedDict's node and slot, and the
pair with its time. Measured: 134 to 178 bytes (CPython 3.11), by how full the table is."""


class MemoryLevel:
    """Encoded answers by key, each until its time. Used from one event loop; every operation is O(1).

    `max_bytes` bounds the memory really taken, not only the answers' own bytes.
    """

    def __init__(self, max_bytes: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._max_bytes = max_bytes
        self._clock = clock
        self._entries: OrderedDict[str, tuple[bytes, float]] = OrderedDict()
        self._bytes = 0

    @property
    def taken(self) -> int:
        """The memory taken, in bytes."""
        return self._bytes

    def get(self, key: str) -> bytes | None:
        """Return what is kept under a key, unless its time is over."""
        found = self._entries.get(key)
        if found is None:
            return None
        if found[1] <= self._clock():
            self.drop(key)
            return None
        self._entries.move_to_end(key)
        return found[0]

    def put(self, key: str, data: bytes, ttl_s: float) -> None:
        """Keep `data` for `ttl_s` seconds; what is too large for the level, or over already, isn't kept."""
        self.drop(key)
        size = _size(key, data)
        if size > self._max_bytes or ttl_s <= 0:
            return
        while self._bytes + size > self._max_bytes:
            oldest, (old, _) = self._entries.popitem(last=False)
            self._bytes -= _size(oldest, old)
        self._entries[key] = (data, self._clock() + ttl_s)
        self._bytes += size

    def drop(self, key: str) -> None:
        """Forget a key, if it is there."""
        found = self._entries.pop(key, None)
        if found is not None:
            self._bytes -= _size(key, found[0])


def _size(key: str, data: bytes) -> int:
    return sys.getsizeof(key) + sys.getsizeof(data) + _ENTRY_OVERHEAD
