"""Whether Redis is there. While it isn't, nobody asks it but one task in the background."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import Awaitable, Callable

from gateway.redis_client import RedisClient, RedisLost

log = logging.getLogger("understudy.cache")

_FIRST_REST_S = 0.1
_LONGEST_REST_S = 2.0
_STEADY_RESTS = 10
_ATTEMPT_S = 3.0
_LINGER_S = 3.0
_PROBE = "understudy:cache:probe"


class Presence:
    """Holds the client while Redis can be used, and None while it can't.

    Whoever finds that it can't says so (`lost`). From then on nobody is held up by it: a background task makes
    a new client after 0.1 s, then after growing rests up to 2 s, and Redis is back once that client gets an
    answer as fast as requests need it. A Redis that comes and goes is left alone for longer and longer too:
    the rest starts small again only after ten seconds without a loss.

    A new client every time, so that a changed address, master or layout of a cluster is found out.
    """

    def __init__(self, connect: Callable[[], Awaitable[RedisClient]], *, patience_s: float) -> None:
        self._connect = connect
        self._patience_s = patience_s
        self._client: RedisClient | None = None
        self._since = 0.0
        self._rest_s = _FIRST_REST_S
        self._last_rest_s = 0.0
        self._trying: asyncio.Task[None] | None = None
        self._closing: set[asyncio.Task[None]] = set()
        self._closed = asyncio.Event()
        self._told = False

    @property
    def client(self) -> RedisClient | None:
        """The client to use now; None: do without Redis."""
        return self._client

    def start(self) -> None:
        """Begin to connect."""
        self._try(after_s=0.0)

    def lost(self, client: RedisClient, why: RedisLost) -> None:
        """Note that Redis can't be used through this client, which may have been replaced already."""
        if self._client is not client:
            return
        if not self._told:
            self._told = True
            log.warning("Redis can't be used: %s; answers are served without it until it is back", why)
        self._let_go(self._client)
        self._client = None
        if time.monotonic() - self._since > _STEADY_RESTS * self._last_rest_s:
            self._rest_s = _FIRST_REST_S
        self._try(after_s=self._next_rest_s())

    def renew(self) -> None:
        """Look in the background whether the URL leads elsewhere now, and go on with the present client."""
        self._try(after_s=0.0)

    async def aclose(self) -> None:
        """Close everything. May be called twice."""
        self._closed.set()
        if self._trying is not None:
            self._trying.cancel()
            await asyncio.wait([self._trying])
        if self._client is not None:
            self._let_go(self._client)
            self._client = None
        if self._closing:
            await asyncio.wait(self._closing)

    def _try(self, *, after_s: float) -> None:
        if self._trying is None:
            self._trying = asyncio.create_task(self._win_back(after_s), name="redis presence")

    async def _win_back(self, after_s: float) -> None:
        try:
            await asyncio.sleep(after_s)
            while True:
                try:
                    client = await self._attempt()
                except RedisLost as why:
                    if self._client is not None:
                        return  # only a renewal: the present one is still there
                    if not self._told:
                        self._told = True
                        log.warning("Redis can't be used: %s; answers are served without it", why)
                    await asyncio.sleep(self._next_rest_s())
                else:
                    break
            before, self._client = self._client, client
            self._since = time.monotonic()
            if before is not None:
                # Somebody may be waiting for an answer through it.
                self._let_go(before, after_s=_LINGER_S)
            elif self._told:
                self._told = False
                log.warning("Redis is back")
        finally:
            self._trying = None

    async def _attempt(self) -> RedisClient:
        """Return a client that has just been answered fast enough."""
        client: RedisClient | None = None
        try:
            async with asyncio.timeout(_ATTEMPT_S):
                client = await self._connect()
                await client.get([_PROBE])
            # Connecting may take its time; what requests will ask may not.
            async with asyncio.timeout(self._patience_s):
                await client.get([_PROBE])
            return client
        except BaseException as error:
            if client is not None:
                self._let_go(client)
            if isinstance(error, TimeoutError):
                raise RedisLost("it didn't answer in time") from None
            raise

    def _next_rest_s(self) -> float:
        rest_s = self._last_rest_s = self._rest_s
        self._rest_s = min(2 * rest_s, _LONGEST_REST_S)
        # Gateways that lost it together don't come back together.
        return rest_s * random.uniform(0.75, 1.0)

    def _let_go(self, client: RedisClient, *, after_s: float = 0.0) -> None:
        closing = asyncio.create_task(self._close(client, after_s), name="redis close")
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)

    async def _close(self, client: RedisClient, after_s: float) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._closed.wait(), after_s)
        await client.aclose()
