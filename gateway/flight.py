"""Single flight: identical requests at the same time are answered once.

The answer is made in a task of its own, which belongs to no request: whoever waits for it *rides*, the leader
(whose request is made) like the followers, and it goes on as long as anyone does. When the last rider leaves
it is cancelled, unless the answer is whole already.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from gateway.cache_entry import CachedAnswer
from gateway.turn import Turn
from serving.errors import UpstreamBroken
from serving.teacher import Chunk

Headers = list[tuple[str, str]]


class Flight:
    """One answer in the making. Whoever makes it calls `begin`, `add`, `arrive` and, at the end, `land`.

    `turn` is the leader's. `chunks` is what has come of a stream so far, and `headers` what came with it;
    `answer` is there once it is whole; `raw` are a whole answer's own bytes, if it has some. When it is
    `over`, there is an answer that was logged, or an `error`. `elsewhere`: another replica made the answer.
    """

    def __init__(self, turn: Turn) -> None:
        self.turn = turn
        self.headers: Headers = []
        self.chunks: list[Chunk] = []
        self.answer: CachedAnswer | None = None
        self.raw: bytes | None = None
        self.error: Exception | None = None
        self.over = False
        self.elsewhere = False
        self._changed = asyncio.Event()
        self._riders = 0
        self._task: asyncio.Task[None] | None = None

    @property
    def begun(self) -> bool:
        """Whether a streaming client can be sent something."""
        return bool(self.chunks) or self.answer is not None

    def start(self, making: Callable[[Flight], Awaitable[None]]) -> asyncio.Task[None]:
        """Begin to make the answer."""

        async def make() -> None:
            await making(self)

        self._task = asyncio.get_running_loop().create_task(make())
        return self._task

    def add(self, chunk: Chunk) -> None:
        """Take the next piece of a stream."""
        self.chunks.append(chunk)
        self._tell()

    def arrive(self, answer: CachedAnswer, raw: bytes | None = None) -> None:
        """Take the whole answer; what is left to do is to log it."""
        self.answer = answer
        self.raw = raw
        self._tell()

    def land(self, error: Exception | None = None) -> None:
        """End, with an answer or with an error."""
        self.error = error
        self.over = True
        self._tell()

    async def news(self) -> None:
        """Wait until something has come."""
        await self._changed.wait()

    def board(self) -> None:
        """Ride along, until `leave`."""
        self._riders += 1

    def leave(self) -> bool:
        """Stop riding. Whether the flight was given up, since nobody waits for it any more."""
        self._riders -= 1
        if self._riders > 0 or self.answer is not None or self.over or self._task is None:
            return False
        self._task.cancel()
        return True

    def _tell(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()


class Flights:
    """The flights under way in this process, by cache key."""

    def __init__(self) -> None:
        self._flying: dict[str, Flight] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        return len(self._tasks)

    def get(self, key: str) -> Flight | None:
        """Return the flight that a request with this key may join."""
        return self._flying.get(key)

    def start(self, key: str, turn: Turn, making: Callable[[Flight], Awaitable[None]]) -> Flight:
        """Start a flight, which is the one to join from now on."""
        flight = self._flying[key] = Flight(turn)
        task = flight.start(making)
        self._tasks.add(task)

        def ended(task: asyncio.Task[None]) -> None:
            self._tasks.discard(task)
            self.close(key, flight)
            if not flight.over:  # given up before it took off
                flight.land(UpstreamBroken("the answer was given up"))

        task.add_done_callback(ended)
        return flight

    def close(self, key: str, flight: Flight) -> None:
        """Let nobody join this flight any more. Its riders aren't touched."""
        if self._flying.get(key) is flight:
            del self._flying[key]

    async def aclose(self) -> None:
        """Give up what is still flying, and wait for its end."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
