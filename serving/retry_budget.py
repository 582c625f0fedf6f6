"""How many retries there may be: so few that they don't make a bad time worse.

A teacher that refuses everything would get every request three times, from every client, just when it can
bear least. So retries are a share of the requests (https://sre.google/sre-book/handling-overload/, "Deciding
to retry"): a few failures are repeated, a storm is passed on.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from serving.window import Window

_SPAN_S = 10
_SHARE = 0.1
_ALWAYS = 10
_REQUEST, _RETRY = 0, 1


class RetryBudget:
    """Within ten seconds: one retry for ten requests, and ten more, so that little traffic has some too."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._window = Window(_SPAN_S, clock)

    def request(self) -> None:
        """Count a request."""
        self._window.add(_REQUEST)

    def take(self) -> bool:
        """Take a retry out of the budget; False when none is left."""
        requests, retries = self._window.counts()
        if retries >= _ALWAYS + _SHARE * requests:
            return False
        self._window.add(_RETRY)
        return True
