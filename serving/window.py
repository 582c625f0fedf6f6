"""What happened within the last few seconds: two counts that forget."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable


class Window:
    """Counts events of two kinds, 0 and 1, over the last `span_s` seconds, in slots of one second.

    Holds at most `span_s` + 1 slots, however much happens.
    """

    def __init__(self, span_s: int, clock: Callable[[], float]) -> None:
        self._span_s = span_s
        self._clock = clock
        self._slots: deque[list[int]] = deque()
        self._sums = [0, 0]

    def add(self, kind: int) -> None:
        """Count one event."""
        now = int(self._clock())
        if not self._slots or self._slots[-1][0] != now:
            self._forget(now)
            self._slots.append([now, 0, 0])
        self._slots[-1][1 + kind] += 1
        self._sums[kind] += 1

    def counts(self) -> tuple[int, int]:
        """Return how many of each kind there were."""
        self._forget(int(self._clock()))
        return self._sums[0], self._sums[1]

    def clear(self) -> None:
        """Forget everything."""
        self._slots.clear()
        self._sums = [0, 0]

    def _forget(self, now: int) -> None:
        while self._slots and self._slots[0][0] <= now - self._span_s:
            _, first, second = self._slots.popleft()
            self._sums[0] -= first
            self._sums[1] -= second
