"""A client that goes away before it has its answer: its connection says so at once to whoever works for it.

ASGI tells only who asks (`receive`), which takes a task of its own beside each request.
"""

from __future__ import annotations

from collections.abc import Callable

STATE_KEY = "understudy.departure"
"""The key of a scope's `state` under which gateway/edge.py leaves a request's Departure."""


class Departure:
    """Whether the client has gone, and what then is to be done."""

    def __init__(self) -> None:
        self._happened = False
        self._then: Callable[[], None] | None = None

    def then(self, leave: Callable[[], None] | None) -> None:
        """Have this called when the client goes, or now if it has gone; None: nothing any more."""
        self._then = leave
        if self._happened and leave is not None:
            leave()

    def happens(self) -> None:
        """Note that the client has gone."""
        self._happened = True
        if self._then is not None:
            self._then()
