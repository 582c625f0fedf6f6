"""How long a device worked for each of the requests that are at it together: processor sharing.

At every moment the requests under way share that moment equally. The shares of all of them sum up to the time in which
there was any, however many were batched; wall times would count a batch of thirty thirty times.

A meter sees what its own process sends. Several workers before one server count a moment that both of them use twice.
"""

from __future__ import annotations

import time
from collections.abc import Callable


class DeviceTime:
    """The meter of one device. `clock` gives seconds and never goes back.

    It keeps a virtual clock, which runs at 1/n of the true one while n requests are under way: a request's share is
    what that says at its end, less what it said at its beginning. Each costs the same few operations, however many
    there are.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._under_way = 0
        self._read_at = 0.0
        self._virtual = 0.0

    @property
    def under_way(self) -> int:
        """How many requests are at the device."""
        return self._under_way

    def begin(self) -> Share:
        """A request begins."""
        began = self._advanced()
        self._under_way += 1
        return Share(self, began)

    def _advanced(self) -> float:
        """The virtual clock, now."""
        now = self._clock()
        if self._under_way:
            self._virtual += (now - self._read_at) / self._under_way
        else:
            self._virtual = 0.0  # nobody remembers what it said, and small numbers are exact ones
        self._read_at = now
        return self._virtual

    def _end(self) -> float:
        virtual = self._advanced()
        self._under_way -= 1
        return virtual


class Share:
    """What one request has of a device's time, from its beginning on."""

    __slots__ = ("_began", "_device", "_seconds")

    def __init__(self, device: DeviceTime, began: float) -> None:
        self._device = device
        self._began = began
        self._seconds: float | None = None

    @property
    def seconds(self) -> float:
        """Its share so far; the whole of it once it has ended."""
        return self._device._advanced() - self._began if self._seconds is None else self._seconds

    def end(self) -> None:
        """The request has ended, whichever way. May be called again."""
        if self._seconds is None:
            self._seconds = self._device._end() - self._began
