"""One server of a pool, as this process sees it, and which of several is the least busy."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

from serving.device_time import DeviceTime
from serving.student_server import StudentServer
from serving.upstream import Upstream, UpstreamResponse

log = logging.getLogger("understudy.pool")

_SILENT_S = 0.5
_SILENT_TIMES = 3
_FIRST_REST_S = 5.0
_LONGEST_REST_S = 60.0
_LONGEST_ANSWER_S = 3600.0
"""Each student has a shorter one."""


@dataclass(frozen=True, slots=True)
class Address:
    """Where a server is: `url` is its root, without /v1."""

    name: str
    url: str
    key: str | None


@dataclass(eq=False, slots=True)
class Member:
    """One server as this process sees it: requests that are there, and what speaks against it."""

    address: Address
    upstream: Upstream
    server: StudentServer
    up: bool = False
    outstanding: int = 0
    turn: int = 0
    late: int = 0
    silent: int = 0
    rest_s: float = _FIRST_REST_S
    rests_until: float = 0.0

    @classmethod
    def at(cls, address: Address) -> Member:
        """The server at an address, not known to be there yet."""
        upstream = Upstream(address.url, timeout_s=_LONGEST_ANSWER_S, max_connections=0, who="the student")
        # What a student takes is measured for all of them together: see `PooledServer`.
        return cls(address, upstream, StudentServer(upstream, DeviceTime(), key=address.key))

    def spoke(self) -> None:
        """Note that it answers."""
        self.silent, self.rest_s = 0, _FIRST_REST_S

    def was_silent(self, seconds: float) -> None:
        """Note that a request was there for so long and heard nothing. A client that goes away at once says nothing.

        Nor does one that was there before it was left alone, with those that were the reason to.
        """
        now = time.monotonic()
        if seconds < _SILENT_S or now - seconds < self.rests_until:
            return
        self.silent += 1
        if self.silent >= _SILENT_TIMES:
            log.warning(
                "the student's server %s has left %d requests in a row without a word, and is left alone for %g s",
                self.address.name,
                self.silent,
                self.rest_s,
            )
            self.rests_until = now + self.rest_s
            self.rest_s = min(2 * self.rest_s, _LONGEST_REST_S)
            self.silent = _SILENT_TIMES - 1  # the next one is a trial

    def left(self, response: UpstreamResponse, began: float) -> None:
        """Note that a request is over."""
        self.outstanding -= 1
        if response.brought_something:
            self.spoke()
        else:
            self.was_silent(time.monotonic() - began)


def least_busy(members: Sequence[Member], now: float) -> Member | None:
    """Who is there and has the fewest requests, of those who was asked the longest ago; None if nobody is there."""
    there = [member for member in members if member.up and member.rests_until <= now]
    return min(there, key=lambda member: (member.outstanding, member.turn), default=None)
