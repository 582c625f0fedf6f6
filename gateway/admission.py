"""How many requests one worker takes on at once: beyond that it says no, at once and cheaply.

A server that takes everything answers nobody: memory and event loop fill with requests whose clients have
given up by the time it is their turn. What is turned away costs a fraction of a millisecond, its body isn't
read, and OpenAI's clients try again (https://sre.google/sre-book/handling-overload/).
"""

from __future__ import annotations

from gateway import names
from gateway.envelope import Refusal, overloaded
from gateway.metrics import NOWHERE, Metrics

TEACHERS_SHARE = 0.8
"""What may wait on the teacher at most, so that students and cache answer however slow it is."""


class Admission:
    """Counts the requests under way, and the bytes of the bodies that are held for them."""

    def __init__(self, metrics: Metrics, *, max_requests: int, max_bytes: int) -> None:
        self._metrics = metrics
        self._max_requests = max_requests
        self._max_bytes = max_bytes
        self._requests = 0
        self._bytes = 0

    def enter(self, held_bytes: int) -> Refusal | None:
        """Take a request on; or return what to tell its client. Who was taken on has to `leave`."""
        if self._requests >= self._max_requests:
            return self._turned_away(
                f"{self._requests} requests are under way, as many as this worker takes on at once "
                "(server.max_concurrency): try again in a moment"
            )
        # A body alone is always taken, however small the limit is.
        if self._bytes + held_bytes > self._max_bytes and self._bytes:
            return self._turned_away(
                f"bodies of {self._bytes} bytes are under way, and this one has {held_bytes} more, beyond what "
                f"this worker holds at once (server.max_held_bytes = {self._max_bytes}): try again in a moment"
            )
        self._requests += 1
        self._bytes += held_bytes
        return None

    def leave(self, held_bytes: int) -> None:
        """Give its place back, with the same number of bytes."""
        self._requests -= 1
        self._bytes -= held_bytes

    def _turned_away(self, message: str) -> Refusal:
        refusal = overloaded(message)
        self._metrics.record_request(NOWHERE, NOWHERE, names.REASON_OVERLOADED, refusal.status, 0.0)
        return refusal
