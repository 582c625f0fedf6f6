"""The composition root: settings in, an ASGI application out.

`/v1/*` is answered by plain ASGI endpoints; FastAPI carries what isn't on the hot path (health, readiness,
metrics, 404s) and the lifespan.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import tempfile
from collections.abc import AsyncIterator, Coroutine, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fastapi import FastAPI
from starlette.types import Message, Receive, Scope, Send

from gateway import names
from gateway.access_log import AccessLog
from gateway.admin import Readiness, create_admin
from gateway.admission import TEACHERS_SHARE, Admission
from gateway.attempts import Attempts
from gateway.audits import WAITS_FOR_S, Audits
from gateway.auth import AdminGate, Gate
from gateway.cache import Cache
from gateway.cache_key import cache_scope
from gateway.chat import ChatEndpoint
from gateway.client import Client, request_id_of
from gateway.envelope import internal_error, stopping
from gateway.keeper import Keeper
from gateway.ledger import Ledger
from gateway.live import LiveReleases
from gateway.metrics import Metrics
from gateway.passthrough import Passthrough
from gateway.pipeline import Pipeline
from gateway.reload import Generation, Kept, reloadable
from gateway.tasks import Tasks
from serving.breaker import State
from serving.disk import Disk
from serving.errors import ConfigError
from serving.layout import task_names
from serving.log import EventLog
from serving.pricing import PriceList
from serving.redaction import Redactor
from serving.settings import Settings
from serving.slots import Slots
from serving.teacher import Teacher
from serving.upstream import Upstream

if TYPE_CHECKING:
    from gateway.tracing import Tracing

log = logging.getLogger("understudy.app")

_AUDIT_GRACE_S = 60.0


@dataclass(frozen=True, slots=True)
class Lasting:
    """What outlives a reload: whatever has a memory, or exists once in a process."""

    metrics: Metrics
    event_log: EventLog
    live: LiveReleases
    attempts: Attempts


@dataclass(frozen=True, slots=True)
class Parts:
    """What is made from one configuration, and made anew when that is reloaded."""

    settings: Settings
    admins: AdminGate
    gate: Gate
    tasks: Tasks
    audits: Audits
    cache: Kept[Cache]
    admission: Admission
    chat: ChatEndpoint
    passthrough: Passthrough
    access_log: AccessLog
    tracing: Tracing | None


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
        tasks = _tasks(settings, old.parts.tasks.names())
        new = await self._assemble(settings, lasting, tasks, self._cache(settings, lasting, old.parts))
        if settings.teacher.base_url == old.parts.settings.teacher.base_url:
            new.parts.gate.take_over(old.parts.gate)
        self._generation = new
        self._admins = new.parts.admins
        lasting.live.adopt(new.parts.tasks)
        keeper.adopt(
            new.parts.audits,
            deadline_s=_audit_deadline_s(settings),
            interval_s=settings.learning.interval_s,
            retention_days=settings.log.retention_days,
        )
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
            await self._observed(parts, client)
        finally:
            parts.admission.leave(held)

    async def _observed(self, parts: Parts, client: Client) -> None:
        if parts.tracing is None:
            await self._serve(parts, client)
        else:
            with parts.tracing.request(client):
                await self._serve(parts, client)

    @staticmethod
    async def _serve(parts: Parts, client: Client) -> None:
        try:
            if _is_chat(client):
                await parts.chat(client)
            else:
                await parts.passthrough(client)
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
        problem = await asyncio.to_thread(_log_problem, self._settings.state_dir)
        details: dict[str, str | int] = {
            "log": problem or "writable",
            "tasks": len(generation.parts.tasks.names()),
            "live_releases": len(lasting.live.names()),
        }
        if self._draining:
            return Readiness("draining", details)
        # Without the log requests are served all the same: taking every gateway out would be the outage.
        return Readiness("ready" if problem is None else "degraded", details)

    @asynccontextmanager
    async def _lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        settings = self._settings
        async with AsyncExitStack() as stack:
            self._disk.make_directory(settings.state_dir / "tasks")
            tasks = _tasks(settings)
            lasting = _lasting(settings, tasks, self._disk, stack)
            await lasting.live.refresh()
            generation = await self._assemble(settings, lasting, tasks, self._cache(settings, lasting, None))
            keeper = Keeper(
                settings.state_dir,
                generation.parts.audits,
                lasting.metrics,
                deadline_s=_audit_deadline_s(settings),
                interval_s=settings.learning.interval_s,
                config_path=self._config_path,
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

    @staticmethod
    def _cache(settings: Settings, lasting: Lasting, old: Parts | None) -> Kept[Cache]:
        """Go on with the old cache, unless its answers may be another teacher's or its settings others."""
        scope = cache_scope(settings.teacher)
        if (
            old is not None
            and old.settings.cache == settings.cache
            and cache_scope(old.settings.teacher) == scope
        ):
            return old.cache
        cache = Cache(settings.cache, lasting.metrics, scope=scope)
        return Kept(cache, cache.aclose)

    async def _assemble(
        self, settings: Settings, lasting: Lasting, tasks: Tasks, cache: Kept[Cache]
    ) -> Generation[Parts]:
        """Build the parts of one configuration; they are taken down in the opposite order."""
        async with AsyncExitStack() as stack:
            stack.push_async_callback(cache.hold())
            key = settings.teacher_key()
            metrics = lasting.metrics
            prices = PriceList(settings.teacher.price, base_url=settings.teacher.base_url)
            upstream = Upstream(
                settings.teacher.base_url,
                timeout_s=settings.teacher.timeout_s,
                max_connections=0,
            )
            stack.push_async_callback(upstream.aclose)
            make_tracing, make_teacher = tracing_of(settings)
            tracing = None if make_tracing is None else make_tracing(settings.teacher.base_url)
            if tracing is not None:
                stack.push_async_callback(tracing.aclose)
            room = max(1, int(TEACHERS_SHARE * settings.server.max_concurrency))
            at_once = min(settings.teacher.max_concurrency, room)
            for requests in ("chat", "other"):
                metrics.record_breaker(requests, State.CLOSED)
            teacher = make_teacher(
                settings.teacher,
                upstream,
                key,
                prices,
                slots=Slots(at_once, waiting=min(at_once, room - at_once)),
                on_breaker=metrics.record_breaker,
                on_retry=metrics.record_retry,
            )
            ledger = Ledger(
                lasting.event_log,
                metrics,
                prices,
                student_usd_per_hour=settings.student.usd_per_hour,
                teacher_model=settings.teacher.model,
                max_wait_s=settings.log.max_wait_s,
                redactor=Redactor(settings.log.redact) if settings.log.redact else None,
            )
            stack.push_async_callback(ledger.aclose)
            gate = Gate(settings.server.api_keys, key)
            audits = Audits(
                teacher=teacher,
                ledger=ledger,
                live=lasting.live,
                tasks=tasks,
                metrics=metrics,
                client_keys=gate.client_keys,
                keeper_can_audit=_keeper_can_audit(settings),
            )
            stack.push_async_callback(audits.aclose)
            pipeline = Pipeline(
                teacher=teacher,
                tasks=tasks,
                live=lasting.live,
                gate=gate,
                ledger=ledger,
                audits=audits,
                attempts=lasting.attempts,
                cache=cache.thing,
                cache_settings=settings.cache,
                metrics=metrics,
            )
            stack.push_async_callback(pipeline.aclose)
            parts = Parts(
                settings=settings,
                admins=AdminGate(settings.server.admin_key, settings.server.host),
                gate=gate,
                tasks=tasks,
                audits=audits,
                cache=cache,
                admission=Admission(
                    metrics,
                    max_requests=settings.server.max_concurrency,
                    max_bytes=settings.server.max_held_bytes,
                ),
                chat=ChatEndpoint(pipeline, gate, metrics, max_body_bytes=settings.server.max_body_bytes),
                passthrough=Passthrough(
                    teacher, gate, metrics, max_upload_bytes=settings.server.max_upload_bytes
                ),
                access_log=AccessLog(sample=settings.observe.access_log_sample),
                tracing=tracing,
            )
            return Generation(parts, stack.pop_all())


def _lasting(settings: Settings, tasks: Tasks, disk: Disk, stack: AsyncExitStack) -> Lasting:
    """Build what every configuration shares."""
    state_dir = settings.state_dir
    metrics = Metrics()
    live = LiveReleases(state_dir, tasks, metrics, redact=settings.log.redact)
    stack.push_async_callback(live.aclose)
    event_log = EventLog(state_dir, settings.log, disk=disk)
    stack.push_async_callback(event_log.aclose)
    return Lasting(metrics, event_log, live, Attempts())


def _tasks(settings: Settings, known: Iterable[str] = ()) -> Tasks:
    """Build the tasks; those `known` to an earlier configuration stay, even before they are on disk."""
    carried = list(known)
    return Tasks(settings, lambda: {*task_names(settings.state_dir), *carried})


def _audit_deadline_s(settings: Settings) -> float:
    patience_s = 0.0 if _keeper_can_audit(settings) else WAITS_FOR_S
    return max(settings.teacher.timeout_s + _AUDIT_GRACE_S, patience_s)


def _keeper_can_audit(settings: Settings) -> bool:
    """Say whether another process can finish an audit: not without the client's key, or what was asked."""
    own_key = bool(settings.server.api_keys) or settings.teacher_key() is not None
    return own_key and not settings.log.redact


async def _finish_audits(parts: Parts) -> None:
    await parts.audits.aclose(grace_s=None)


def tracing_of(settings: Settings) -> tuple[type[Tracing] | None, type[Teacher]]:
    """Return what traces requests, and a teacher whose questions are traced; None and the plain one if off.

    Raises ConfigError when traces are wanted and OpenTelemetry isn't installed.
    """
    if not settings.observe.traced():
        return None, Teacher
    try:
        # Only now: it is an extra, and takes a third of a second.
        from gateway.tracing import TracedTeacher, Tracing
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "opentelemetry":
            raise
        raise ConfigError(
            "traces are wanted (observe.otel, or OTEL_EXPORTER_OTLP_ENDPOINT) and OpenTelemetry isn't installed: "
            "pip install 'understudy[otel]', or set observe.otel = false"
        ) from None
    return Tracing, TracedTeacher


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


def _log_problem(state_dir: Path) -> str | None:
    """Say why the log can't be written, by writing beside it; None when it can."""
    try:
        with tempfile.TemporaryFile(dir=state_dir / "tasks") as file:
            file.write(b"ready")
    except OSError as error:
        return f"the state directory isn't writable: {error.strerror}"
    return None


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
