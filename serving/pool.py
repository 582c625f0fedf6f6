"""The servers of `[student.vllm]`: which of them are there, and asking the least busy one.

One pool a process, shared by all students that name no server of their own. A server is there while its `/health`
says so, which is looked at every two seconds; a connection that fails takes it out at once, and three requests in a
row that it took in and left without a word take it out for a while. Ties between servers as busy go round. Whatever it
surely hasn't read is asked elsewhere; what it may have is not: an answer that broke off is the teacher's to give.

The server that `understudy serve --vllm` runs has another address and key after each start: they are read from
`state/vllm.json`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

from serving.device_time import DeviceTime
from serving.engines import Engines
from serving.errors import ConfigError, UnderstudyError, UpstreamBroken, UpstreamRefused, UpstreamTimeout
from serving.exchange import Json
from serving.guarded_student import StudentUnavailable
from serving.pool_member import Address, Member, least_busy
from serving.student_server import Served, StudentBroken, StudentServer, key_of, refusal_of
from serving.student_settings import VllmSettings
from serving.upstream import NothingSent, StaleConnection, UpstreamResponse
from serving.vllm_place import VllmPlace, read_place

log = logging.getLogger("understudy.pool")

OURS = "vllm"
"""The name of the server that `serve --vllm` runs; others are called by host and port."""

_LOOK_EVERY_S = 2.0
_LOOK_S = 5.0
_LATE_LOOKS = 2
"""So many looks in a row without an answer: one that is busy may be late for one."""


class Pool:
    """See above. Belongs to the event loop in which it is first asked, or `start`ed. To be closed.

    `on_look` is called after each look at the servers.
    """

    def __init__(
        self,
        state_dir: Path,
        vllm: VllmSettings | None,
        *,
        on_look: Callable[[Pool], None] = lambda _: None,
        look_every_s: float = _LOOK_EVERY_S,
    ) -> None:
        self._look_every_s = look_every_s
        self._state_dir = state_dir
        self._vllm = vllm
        self._key = _key(vllm)
        self._on_look = on_look
        self.device = DeviceTime()
        self._members: list[Member] = []
        self._leaving: list[Member] = []
        self._place: VllmPlace | None = None
        self._turns = 0
        self._looking: asyncio.Task[None] | None = None
        self._looked = asyncio.Event()
        self._found = asyncio.Event()

    def adopt(self, vllm: VllmSettings | None) -> None:
        """Go on by a reloaded configuration, from the next look on. Raises ConfigError for a key that can't be sent."""
        key = _key(vllm)
        self._vllm, self._key = vllm, key

    def start(self) -> None:
        """Begin to look at the servers."""
        if self._looking is None:
            self._looking = asyncio.get_running_loop().create_task(self._look_on(), name="student servers")

    def served(self, *, below: str, timeout_s: float) -> PooledServer:
        """The pool as one server: paths are `below` a server's root, `timeout_s` bounds every silence."""
        return PooledServer(self, below, timeout_s)

    def states(self) -> Mapping[str, bool]:
        """Which servers there should be, by name, and whether they are there."""
        if self._vllm is None:
            return {}
        if not self._vllm.urls:
            return {OURS: any(member.up for member in self._members)}
        return {member.address.name: member.up for member in self._members}

    def restarts(self) -> int:
        """How often the one that `serve --vllm` runs was started again."""
        return 0 if self._place is None else self._place.restarts

    def summary(self) -> str | None:
        """How the servers are, in a few words; None if there are to be none."""
        if self._vllm is None:
            return None
        if self._vllm.urls:
            up = sum(member.up for member in self._members)
            return f"{up} of {len(self._members)} servers are up"
        if self._place is None:
            return "not running: `understudy serve --vllm` runs it"
        if self._place.phase == "waiting":
            return f"to be started again, since it {self._place.error}"
        return self._place.phase

    async def members(self) -> list[Member]:
        """The servers that are there. Raises StudentUnavailable if none is."""
        self.start()
        await self._looked.wait()  # the first look only
        there = [member for member in self._members if member.up]
        if not there:
            raise self._unavailable()
        return there

    async def ask(
        self, question: Callable[[StudentServer], Awaitable[UpstreamResponse]], *, timeout_s: float
    ) -> UpstreamResponse:
        """Ask the least busy server; `question` sends a request to the one it is given.

        Raises StudentUnavailable at once if none is there, and what `question` raises.
        """
        self.start()
        await self._found.wait()  # in the first look only
        while (member := least_busy(self._members, time.monotonic())) is not None:
            self._turns += 1
            member.turn = self._turns
            member.outstanding += 1
            began = time.monotonic()
            try:
                async with asyncio.timeout(timeout_s):
                    response = await question(member.server)
            except (NothingSent, StaleConnection) as error:
                member.outstanding -= 1
                self._down(member, error)
                continue
            except UpstreamRefused:
                member.outstanding -= 1
                member.spoke()
                raise
            except TimeoutError:
                member.outstanding -= 1
                member.was_silent(timeout_s)
                raise UpstreamTimeout(
                    f"the student at {member.address.name} didn't answer within {timeout_s:.3g} s"
                ) from None
            except BaseException as error:
                member.outstanding -= 1
                if isinstance(error, UpstreamBroken):
                    self._down(member, error)
                else:  # cancelled
                    member.was_silent(time.monotonic() - began)
                raise
            response.when_closed(partial(member.left, response, began))
            return response
        raise self._unavailable()

    def _unavailable(self) -> StudentUnavailable:
        why = self.summary() or "there is no such section"
        if any(member.up for member in self._members):
            why = "what is up has left requests without a word and is left alone for a moment"
        return StudentUnavailable(f"no server of student.vllm can be asked: {why}")

    @property
    def api_key_env(self) -> str | None:
        """The environment variable with the key of servers that others run."""
        return None if self._vllm is None else self._vllm.api_key_env

    def refusal(self, error: UpstreamRefused) -> StudentBroken:
        """What a server's refusal means, without keys."""
        keys = [member.address.key for member in self._members]
        return refusal_of(error, "student.vllm", [key for key in keys if key is not None])

    async def aclose(self) -> None:
        """Look no more, and close every connection."""
        if self._looking is not None:
            self._looking.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._looking
        for member in [*self._members, *self._leaving]:
            await member.upstream.aclose()
        self._members, self._leaving = [], []
        for told in (self._looked, self._found):
            told.set()  # whoever waits for the first look has none to wait for

    async def _look_on(self) -> None:
        while True:
            try:
                await self._look()
            except Exception:
                log.exception("looking at the students' servers failed; trying again")
            self._looked.set()
            self._found.set()  # or nobody is there
            await asyncio.sleep(self._look_every_s)

    async def _look(self) -> None:
        wanted = self._addresses()
        known = {member.address: member for member in self._members}
        self._leaving += [member for address, member in known.items() if address not in wanted]
        self._members = [known.get(address) or Member.at(address) for address in wanted]
        for member in [member for member in self._leaving if not member.outstanding]:
            self._leaving.remove(member)
            await member.upstream.aclose()
        await asyncio.gather(*(self._check(member) for member in self._members))
        self._on_look(self)

    async def _check(self, member: Member) -> None:
        try:
            async with asyncio.timeout(_LOOK_S):
                response = await member.upstream.request("GET", "/health", headers=[], body=b"")
                async with response:
                    healthy = response.status == 200
                    error = f"/health says {response.status}"
        except TimeoutError:
            member.late += 1
            if member.late >= _LATE_LOOKS:
                self._down(member, f"/health gave no answer within {_LOOK_S:g} s, {member.late} times")
            return
        except UnderstudyError as failure:
            healthy, error = False, str(failure)
        member.late = 0
        if not healthy:
            self._down(member, error)
        elif not member.up:
            member.up = True
            self._found.set()
            log.info("the student's server %s is there", member.address.name)

    def _down(self, member: Member, why: object) -> None:
        if member.up:
            log.warning(
                "the student's server %s is out until its /health says otherwise: %s",
                member.address.name,
                why,
            )
        member.up = False

    def _addresses(self) -> list[Address]:
        """Where servers are to be now."""
        if self._vllm is None:
            self._place = None
            return []
        if self._vllm.urls:
            roots = dict.fromkeys(url.rstrip("/").removesuffix("/v1") for url in self._vllm.urls)
            return [Address(_name_of(root), root, self._key) for root in roots]
        self._place = read_place(self._state_dir)
        if self._place is None or self._place.phase != "ready":
            return []
        return [Address(OURS, self._place.url, self._place.key)]


class PooledServer:
    """A pool as a student's server: see `StudentServer`. The pool isn't its to close.

    `device` measures all its servers as one: a price by the hour is that of all of them.
    """

    def __init__(self, pool: Pool, below: str, timeout_s: float) -> None:
        self.device = pool.device
        self._pool = pool
        self._below = below
        self._timeout_s = timeout_s

    @property
    def place(self) -> str:
        """What it is called in messages."""
        return "student.vllm"

    async def post(self, path: str, asked: Json) -> UpstreamResponse:
        """As `StudentServer.post`. Raises StudentUnavailable as well."""
        limit_s = self._timeout_s
        return await self._pool.ask(
            lambda server: server.post(self._below + path, asked, silence_s=limit_s), timeout_s=limit_s
        )

    async def get(self, path: str) -> UpstreamResponse:
        """As `StudentServer.get`. Raises StudentUnavailable as well."""
        limit_s = self._timeout_s
        return await self._pool.ask(
            lambda server: server.get(self._below + path, silence_s=limit_s), timeout_s=limit_s
        )

    def refusal(self, error: UpstreamRefused) -> StudentBroken:
        """As `Pool.refusal`."""
        return self._pool.refusal(error)

    async def aclose(self) -> None:
        """Do nothing: others use the pool."""


def served_at(
    base_url: str | None, *, below: str, timeout_s: float, api_key_env: str | None, engines: Engines
) -> Served:
    """A student's own server at `base_url`, with its key from the environment; None: those of `student.vllm`.

    There, its paths are `below` the server's root. Raises ConfigError for a key that can't be sent, and where there is
    no pool.
    """
    if base_url is not None:
        device = engines.device(base_url)
        return StudentServer.at(base_url, timeout_s=timeout_s, api_key_env=api_key_env, device=device)
    if engines.pool is None:
        raise ConfigError("the student is served by what [student.vllm] says, and there is no such section")
    return engines.pool.served(below=below, timeout_s=timeout_s)


def _key(vllm: VllmSettings | None) -> str | None:
    return None if vllm is None else key_of(vllm.api_key_env)


def _name_of(url: str) -> str:
    """Host and port: a URL may hold credentials."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    return host if parts.port is None else f"{host}:{parts.port}"
