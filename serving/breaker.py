"""A circuit breaker: whoever fails most of the time isn't asked for a while.

    closed ── half of the last ten seconds' attempts failed, and ten at least ──→ open
    open ── its time is over: one attempt is let through ──→ half-open
    half-open ── it succeeded ──→ closed
              ── it failed ──→ open, for twice as long as before (5 s at first, 60 s at most)

After Nygard, Release It!, chapter 5. A breaker spares clients the wait for an answer that won't come, and
spares whoever is failing the requests that keep it down.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from enum import IntEnum

from serving.window import Window

_SPAN_S = 10
_FAILURES = 10
_SHARE = 0.5
_FIRST_WAIT_S = 5.0
_LONGEST_WAIT_S = 60.0
_WELL, _FAILED = 0, 1


class State(IntEnum):
    """The states of a breaker, as the metric shows them."""

    CLOSED = 0
    HALF_OPEN = 1
    OPEN = 2


class Breaker:
    """Lets attempts through, or doesn't. Every attempt that was let through is reported once, by its ticket.

    An attempt that began before the breaker opened says nothing any more when it ends after that. A trial
    that hears nothing for as long as the breaker was open makes room for another: at a teacher that accepts
    connections and never answers, nobody would try again otherwise before its deadline.
    """

    def __init__(
        self,
        *,
        clock: Callable[[], float] = time.monotonic,
        on_change: Callable[[State], None] | None = None,
    ) -> None:
        self._clock = clock
        self._on_change = on_change
        self._window = Window(_SPAN_S, clock)
        self._epoch = 0
        self._wait_s = _FIRST_WAIT_S
        self._next_trial = 0.0
        self.state = State.CLOSED

    def enter(self) -> int | None:
        """Begin an attempt: return its ticket, or None when it must not be made now."""
        if self.state is State.CLOSED:
            return self._epoch
        now = self._clock()
        if now < self._next_trial:
            return None
        self._next_trial = now + self._wait_s
        self._become(State.HALF_OPEN)
        return self._epoch

    def lets_through(self) -> bool:
        """Say whether an attempt may be made now, without beginning one."""
        return self.state is State.CLOSED or self._clock() >= self._next_trial

    def retry_after_s(self) -> int:
        """Say in how many whole seconds, at least one, it is worth asking again."""
        return max(1, math.ceil(self._next_trial - self._clock()))

    def succeeded(self, ticket: int) -> None:
        """Report an attempt that went well."""
        if ticket != self._epoch:
            return
        if self.state is State.CLOSED:
            self._window.add(_WELL)
            return
        self._epoch += 1
        self._window.clear()
        self._wait_s = _FIRST_WAIT_S
        self._become(State.CLOSED)

    def failed(self, ticket: int) -> None:
        """Report an attempt that failed."""
        if ticket != self._epoch:
            return
        if self.state is State.CLOSED:
            self._window.add(_FAILED)
            well, failed = self._window.counts()
            if failed < _FAILURES or failed < _SHARE * (well + failed):
                return
            self._epoch += 1
        else:
            self._wait_s = min(2 * self._wait_s, _LONGEST_WAIT_S)
        self._next_trial = self._clock() + self._wait_s
        self._become(State.OPEN)

    def failed_later(self) -> None:
        """Report that something broke now which had been reported to go well."""
        if self.state is State.CLOSED:
            self.failed(self._epoch)

    def abandoned(self, ticket: int) -> None:
        """Report an attempt of which nobody knows how it would have ended: its client went away."""
        if ticket == self._epoch and self.state is State.HALF_OPEN:
            self._next_trial = self._clock()

    def _become(self, state: State) -> None:
        if state is not self.state:
            self.state = state
            if self._on_change is not None:
                self._on_change(state)
