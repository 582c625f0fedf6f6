"""The composition root: settings in, an ASGI application out.

`/v1/*` is answered by plain ASGI endpoints; FastAPI carries what isn't on the hot path (health, readiness,
metrics, 404s) and the lifespan.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from fastapi import FastAPI
from starlette.types import Message, Receive, Scope, Send

from gateway import names
from gateway.admin import Readiness, create_admin
from gateway.auth import AdminGate
from gateway.chat import ChatEndpoint
from gateway.client import Client, request_id_of
from gateway.envelope import internal_error, stopping
from gateway.keeper import Keeper
from gateway.log_probe import LogProbe
from gateway.parts import (
    Lasting,
    Parts,
    audit_deadline_s,
    hand_over_audits,
    make_lasting,
    make_parts,
    make_tasks,
)
from gateway.passthrough import Passthrough
from gateway.reload import Generation, reloadable
from gateway.watcher import Watcher
from serving.disk import Disk
from serving.settings import Settings

log = logging.getLogger("understudy.app")


def create_app(settings: Settings, *, config_path: Path | None = None, disk: Disk | None = None) -> Gateway:
    """Build the gateway.

    `config_path` is the file the settings came from, for the learner started later; `disk` is what the log is
    written through.
    """
    return Gateway(settings, config_path, disk or Disk())


class Gateway:
    """The ASGI application. Its parts exist while its lifespan runs."""

    def __init__(self, settings: Settings, config_path: Path | None, disk: Disk) -> None:
        self._settings = settings
        self._config_path = config_path
        self._disk = disk
        self._draining = False
        self._log_probe = LogProbe(settings.state_dir)
        self._lasting: Lasting | None = None
        self._generation: Generation[Parts] | None = None
        self._keeper: Keeper | None = None
        self._retiring: set[asyncio.Task[None]] = set()
        self._admins = AdminGate(settings.server.admin_key, settings.server.host)
        self._rest = create_admin(
            lifespan=self._lifespan,
            gate=lambda: self._admins,
            readiness=self._readiness,
            exposition=lambda: self._lasting.metrics.exposition() if self._lasting else b"",
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection of any ASGI kind."""
        generation = self._generation
        if scope["type"] != "http":
            await self._rest(scope, receive, send)
        elif scope["path"].startswith("/v1/") and generation is not None:
            parts = generation.enter()
            try:
                await self._admitted(parts, Client(scope, receive, send))
            finally:
                generation.leave()
        else:
            await self._rest(scope, receive, _with_request_id(scope, send))

    def drain(self) -> None:
        """Say from now on that no more requests should come; those that do are served."""
        self._draining = True

    async def reload(self, settings: Settings) -> list[str]:
        """Go on with another configuration, without failing a request. Not to be called twice at once.

        Returns the keys that differ and can't be changed while the gateway runs: there the old value stays.
        Raises ConfigError, or whatever else keeps the configuration from being used; then nothing changes.
        """
        old, lasting, keeper = self._generation, self._lasting, self._keeper
        if old is None or lasting is None or keeper is None:
            raise RuntimeError("only a running gateway can be reloaded")
        settings, kept = reloadable(old.parts.settings, settings)
        tasks = make_tasks(settings, old.parts.tasks.names())
        lasting.pool.adopt(settings.student.vllm)
        try:
            new = await make_parts(settings, lasting, tasks, old.parts)
        except Exception:
            lasting.pool.adopt(old.parts.settings.student.vllm)
            raise
        self._generation = new
        self._admins = new.parts.admins
        lasting.live.adopt(new.parts.tasks, redact=settings.log.redact)
        lasting.event_log.adopt(retention_days=settings.log.retention_days)
        keeper.adopt(
            new.parts.audits,
            policy=new.parts.tasks.policy,
            deadline_s=audit_deadline_s(settings),
            interval_s=settings.learning.interval_s,
            retention_days=settings.log.retention_days,
        )
        hand_over_audits(old.parts, new.parts)
        retiring = asyncio.create_task(
            old.retire(_finish_audits), name="an old configuration's last requests"
        )
        self._retiring.add(retiring)
        retiring.add_done_callback(self._retiring.discard)
        return kept

    async def _admitted(self, parts: Parts, client: Client) -> None:
        """Take a request on if there is room for it."""
        endpoint = parts.chat if _is_chat(client) else parts.passthrough
        held = client.held_bytes(endpoint.max_held_bytes)
        refusal = parts.admission.enter(held)
        if refusal is not None:
            await client.turn_away(refusal)
            return
        try:
            if parts.tracing is None:
                await self._serve(parts, endpoint, client)
            else:
                with parts.tracing.request(client):
                    await self._serve(parts, endpoint, client)
        finally:
            parts.admission.leave(held)

    @staticmethod
    async def _serve(parts: Parts, endpoint: ChatEndpoint | Passthrough, client: Client) -> None:
        try:
            await endpoint(client)
        except asyncio.CancelledError:
            # By the server alone, whose grace is over: a client that goes away cancels what is done for it.
            await client.break_off(stopping())
        except Exception:
            log.exception("request %s failed", client.request_id)
            if not client.started:
                await client.refuse(internal_error())
        finally:
            parts.access_log.over(client)

    async def _readiness(self) -> Readiness:
        generation, lasting = self._generation, self._lasting
        if generation is None or lasting is None:
            return Readiness("starting")
        problem = await self._log_probe.problem()
        details: dict[str, str | int] = {
            "log": problem or "writable",
            "tasks": len(generation.parts.tasks.names()),
            "live_releases": len(lasting.live.names()),
        }
        servers = lasting.pool.summary()
        if servers is not None:
            details["student_servers"] = servers
        if self._draining:
            return Readiness("draining", details)
        # Without the log requests are served all the same: taking every gateway out would be the outage.
        return Readiness("ready" if problem is None else "degraded", details)

    @asynccontextmanager
    async def _lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        settings = self._settings
        async with AsyncExitStack() as stack:
            self._disk.make_directory(settings.state_dir / "tasks")
            tasks = make_tasks(settings)
            lasting = make_lasting(settings, tasks, self._disk, stack)
            lasting.pool.start()
            await lasting.live.refresh()
            generation = await make_parts(settings, lasting, tasks)
            keeper = Keeper(
                settings.state_dir,
                generation.parts.audits,
                lasting.metrics,
                deadline_s=audit_deadline_s(settings),
                interval_s=settings.learning.interval_s,
                config_path=self._config_path,
                watcher=Watcher(settings.state_dir, lasting.metrics, tasks.policy),
                retention_days=settings.log.retention_days,
            )
            self._lasting, self._generation, self._keeper = lasting, generation, keeper
            stack.push_async_callback(self._take_down)
            for name, work in (("the watch for releases", lasting.live.run()), ("the keeper", keeper.run())):
                stack.push_async_callback(_cancel, asyncio.create_task(_guarded(name, work)))
            yield

    async def _take_down(self) -> None:
        """Close every generation; those that still wait for their last request wait no longer."""
        for retiring in list(self._retiring):
            await _cancel(retiring)
        if self._generation is not None:
            generation, self._generation = self._generation, None
            await generation.aclose()


async def _finish_audits(parts: Parts) -> None:
    await parts.audits.aclose(grace_s=None)


def _is_chat(client: Client) -> bool:
    return client.method == "POST" and client.target.partition("?")[0] == names.CHAT_PATH


async def _guarded(name: str, work: Coroutine[None, None, None]) -> None:
    """Run background work; if it ends by an error, requests are served all the same, and the log says so."""
    try:
        await work
    except Exception:
        log.exception("%s stopped; restart the gateway to have it back", name)


async def _cancel(task: asyncio.Task[None]) -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


def _with_request_id(scope: Scope, send: Send) -> Send:
    """Wrap `send` so that the answer carries the request's id."""
    name = names.REQUEST_ID_HEADER.encode()
    given = next((value.decode("latin-1") for key, value in scope["headers"] if key == name), None)
    header = (name, request_id_of(given).encode())

    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message.get("headers", []), header]
        await send(message)

    return sending
