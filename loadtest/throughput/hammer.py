"""Load at the lowest price: bytes made beforehand, kept connections, and answers that are looked at, not parsed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import cast

_PATIENCE_S = 60.0


@dataclass(slots=True)
class Volley:
    """What came of a number of requests. Times in seconds; `odd` are answers that weren't what was expected."""

    seconds: float = 0.0
    latencies: list[float] = field(default_factory=list)
    odd: int = 0

    def quantile(self, share: float) -> float:
        """Return the latency that so many of the requests don't exceed."""
        ordered = sorted(self.latencies)
        return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


async def fire(port: int, requests: Sequence[bytes], expected: bytes, *, connections: int) -> Volley:
    """Send the requests over so many connections to a port of this machine, each when the one before is answered.

    An answer whose head lacks one of the words of `expected` (separated by commas) is odd. Raises TimeoutError
    when it takes more than a minute, and ConnectionError when a connection is lost.
    """
    volley = Volley()
    waiting = iter(requests)
    loop = asyncio.get_running_loop()
    lanes: list[_Lane] = []
    for _ in range(min(connections, len(requests))):
        _, lane = await loop.create_connection(
            lambda: _Lane(waiting, volley, expected.split(b",")), "127.0.0.1", port
        )
        lanes.append(lane)
    began = time.perf_counter()
    for lane in lanes:
        lane.send()
    try:
        async with asyncio.timeout(_PATIENCE_S):
            await asyncio.gather(*(lane.done for lane in lanes))
    finally:
        for lane in lanes:
            lane.close()
    volley.seconds = time.perf_counter() - began
    return volley


class _Lane(asyncio.Protocol):
    """One connection. `waiting` is shared by all."""

    def __init__(self, waiting: Iterator[bytes], volley: Volley, expected: list[bytes]) -> None:
        self.done = asyncio.get_running_loop().create_future()
        self._waiting = waiting
        self._volley = volley
        self._expected = expected
        self._began = 0.0
        self._received = b""
        self._transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports aren't instances of asyncio's classes.
        self._transport = cast("asyncio.Transport", transport)

    def send(self) -> None:
        request = next(self._waiting, None)
        if request is None:
            self.done.set_result(None)
            return
        self._began = time.perf_counter()
        self._transport.write(request)

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, end, body = self._received.partition(b"\r\n\r\n")
        if not end:
            return
        at = head.find(b"content-length: ") + len(b"content-length: ")
        if len(body) < int(head[at : at + 8].partition(b"\r")[0]):
            return
        self._volley.latencies.append(time.perf_counter() - self._began)
        self._volley.odd += not all(word in head for word in self._expected)
        self._received = b""
        self.send()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.done.done():
            self.done.set_exception(exc or ConnectionError("the server closed a connection"))

    def close(self) -> None:
        self._transport.close()
