"""The composition root: settings in, an ASGI application out.

`/v1/*` is answered by plain ASGI endpoints; FastAPI carries what isn't on the hot path (health, readiness,
metrics, 404s) and the lifespan.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import tempfile
from collections.abc import AsyncIterator, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.types import Message, Receive, Scope, Send

from gateway import names
from gateway.access_log import AccessLog
from gateway.attempts import Attempts
from gateway.audits import Audits
from gateway.auth import Gate
from gateway.cache import Cache
from gateway.cache_key import cache_scope
from gateway.chat import ChatEndpoint
from gateway.client import Client, request_id_of
from gateway.envelope import internal_error, refuse
from gateway.keeper import Keeper
from gateway.ledger import Ledger
from gateway.live import LiveReleases
from gateway.metrics import Metrics
from gateway.passthrough import Passthrough
from gateway.pipeline import Pipeline
from gateway.tasks import Tasks
from serving.breaker import State
from serving.disk import Disk
from serving.errors import ConfigError
from serving.layout import task_names
from serving.log import EventLog
from serving.pricing import PriceList
from serving.settings import Settings
from serving.teacher import Teacher
from serving.upstream import Upstream

if TYPE_CHECKING:
    from gateway.tracing import Tracing

log = logging.getLogger("understudy.app")

_AUDIT_GRACE_S = 60.0


@dataclass(frozen=True, slots=True)
class Parts:
    """What the running gateway is made of."""

    chat: ChatEndpoint
    passthrough: Passthrough
    access_log: AccessLog
    tracing: Tracing | None
    metrics: Metrics
    tasks: Tasks
    live: LiveReleases


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
        self._parts: Parts | None = None
        self._rest = self._create_rest()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection of any ASGI kind."""
        if scope["type"] != "http":
            await self._rest(scope, receive, send)
        elif scope["path"].startswith("/v1/") and self._parts is not None:
            await self._observed(self._parts, Client(scope, receive, send))
        else:
            await self._rest(scope, receive, _with_request_id(scope, send))

    async def _observed(self, parts: Parts, client: Client) -> None:
        if parts.tracing is None:
            await self._serve(parts, client)
        else:
            with parts.tracing.request(client):
                await self._serve(parts, client)

    @staticmethod
    async def _serve(parts: Parts, client: Client) -> None:
        try:
            if client.method == "POST" and client.target.partition("?")[0] == names.CHAT_PATH:
                await parts.chat(client)
            else:
                await parts.passthrough(client)
        except Exception:
            log.exception("request %s failed", client.request_id)
            if not client.started:
                await client.refuse(internal_error())
        finally:
            parts.access_log.over(client)

    def _create_rest(self) -> FastAPI:
        app = FastAPI(lifespan=self._lifespan, docs_url=None, redoc_url=None, openapi_url=None)

        @app.get("/healthz")
        async def healthz() -> dict[str, str]:
            return {"status": "alive"}

        @app.get("/readyz")
        async def readyz() -> Response:
            return await self._readiness()

        @app.get("/metrics")
        async def metrics() -> Response:
            parts = self._parts
            exposition = parts.metrics.exposition() if parts else b""
            return Response(exposition, headers={"content-type": CONTENT_TYPE_LATEST})

        app.add_exception_handler(HTTPException, _http_error)
        app.add_exception_handler(RequestValidationError, _validation_error)
        app.add_exception_handler(Exception, _unhandled_error)
        return app

    async def _readiness(self) -> Response:
        if self._parts is None:
            return JSONResponse({"status": "starting"}, status_code=503)
        problem = await asyncio.to_thread(_log_problem, self._settings.state_dir)
        details = {
            "status": "ready" if problem is None else "not ready",
            "log": problem or "writable",
            "tasks": len(self._parts.tasks.names()),
            "live_releases": len(self._parts.live.names()),
        }
        return JSONResponse(details, status_code=200 if problem is None else 503)

    @asynccontextmanager
    async def _lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            self._parts = await self._assemble(stack)
            yield
            self._parts = None

    async def _assemble(self, stack: AsyncExitStack) -> Parts:
        """Build every part and have `stack` take them down in the opposite order."""
        settings = self._settings
        state_dir = settings.state_dir
        self._disk.make_directory(state_dir / "tasks")
        key = settings.teacher_key()
        metrics = Metrics()
        prices = PriceList(settings.teacher.price, base_url=settings.teacher.base_url)
        upstream = Upstream(
            settings.teacher.base_url,
            timeout_s=settings.teacher.timeout_s,
            max_connections=settings.teacher.max_concurrency,
        )
        stack.push_async_callback(upstream.aclose)
        make_tracing, make_teacher = tracing_of(settings)
        tracing = None if make_tracing is None else make_tracing(settings.teacher.base_url)
        if tracing is not None:
            stack.push_async_callback(tracing.aclose)
        for requests in ("chat", "other"):
            metrics.record_breaker(requests, State.CLOSED)
        teacher = make_teacher(
            settings.teacher,
            upstream,
            key,
            prices,
            on_breaker=metrics.record_breaker,
            on_retry=metrics.record_retry,
        )
        tasks = Tasks(settings, lambda: task_names(state_dir))
        live = LiveReleases(state_dir, tasks, metrics)
        stack.push_async_callback(live.aclose)
        event_log = EventLog(state_dir, settings.log, disk=self._disk)
        stack.push_async_callback(event_log.aclose)
        ledger = Ledger(
            event_log,
            metrics,
            prices,
            student_usd_per_hour=settings.student.usd_per_hour,
            teacher_model=settings.teacher.model,
            max_wait_s=settings.log.max_wait_s,
        )
        stack.push_async_callback(ledger.aclose)
        gate = Gate(settings.server.api_keys, key)
        audits = Audits(
            teacher=teacher,
            ledger=ledger,
            live=live,
            tasks=tasks,
            metrics=metrics,
            client_keys=gate.client_keys,
        )
        stack.push_async_callback(audits.aclose)
        keeper = Keeper(
            state_dir,
            audits,
            metrics,
            deadline_s=settings.teacher.timeout_s + _AUDIT_GRACE_S,
            interval_s=settings.learning.interval_s,
            config_path=self._config_path,
            retention_days=settings.log.retention_days,
        )
        cache = Cache(settings.cache, metrics, scope=cache_scope(settings.teacher))
        stack.push_async_callback(cache.aclose)
        pipeline = Pipeline(
            teacher=teacher,
            tasks=tasks,
            live=live,
            gate=gate,
            ledger=ledger,
            audits=audits,
            attempts=Attempts(),
            cache=cache,
            cache_settings=settings.cache,
            metrics=metrics,
        )
        stack.push_async_callback(pipeline.aclose)
        await live.refresh()
        for name, work in (("the watch for releases", live.run()), ("the keeper", keeper.run())):
            stack.push_async_callback(_cancel, asyncio.create_task(_guarded(name, work)))
        limit = settings.server.max_body_bytes
        return Parts(
            chat=ChatEndpoint(pipeline, gate, metrics, max_body_bytes=limit),
            passthrough=Passthrough(teacher, gate, metrics),
            access_log=AccessLog(sample=settings.observe.access_log_sample),
            tracing=tracing,
            metrics=metrics,
            tasks=tasks,
            live=live,
        )


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


async def _http_error(_: Request, error: Exception) -> Response:
    """Put the framework's own errors (404, 405, …) into the envelope."""
    status = error.status_code if isinstance(error, HTTPException) else 500
    headers = dict(error.headers or {}) if isinstance(error, HTTPException) else {}
    said = {404: "there is nothing at this path", 405: "this path doesn't take this method"}
    message = said.get(status, str(error.detail) if isinstance(error, HTTPException) else "")
    refusal = refuse(status, message, kind="invalid_request_error")
    return Response(refusal.body, status, headers={**headers, "content-type": "application/json"})


async def _validation_error(_: Request, error: Exception) -> Response:
    message = "the request isn't valid"
    param = None
    if isinstance(error, RequestValidationError) and error.errors():
        first = error.errors()[0]
        param = ".".join(str(part) for part in first["loc"])
        message = f"{param}: {first['msg']}"
    refusal = refuse(400, message, kind="invalid_request_error", param=param)
    return Response(refusal.body, 400, media_type="application/json")


async def _unhandled_error(_: Request, __: Exception) -> Response:
    refusal = internal_error()
    return Response(refusal.body, refusal.status, media_type="application/json")
