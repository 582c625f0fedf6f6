"""What isn't traffic: health, readiness and metrics, and who may see how much of them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Literal

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException

from gateway.auth import AdminGate
from gateway.envelope import internal_error, refusal_of, refuse
from serving.errors import RequestError


@dataclass(frozen=True, slots=True)
class Readiness:
    """Whether to send requests here. `degraded` is served all the same; `details` are for admins."""

    status: Literal["ready", "degraded", "starting", "draining"]
    details: Mapping[str, str | int] = field(default_factory=dict)

    @property
    def code(self) -> int:
        """The status of `/readyz`: 503 takes the gateway out of a load balancer."""
        return 200 if self.status in ("ready", "degraded") else 503


def create_admin(
    *,
    lifespan: Callable[[FastAPI], AbstractAsyncContextManager[None]],
    gate: Callable[[], AdminGate],
    readiness: Callable[[], Awaitable[Readiness]],
    exposition: Callable[[], bytes],
) -> FastAPI:
    """Build the application that carries the lifespan, and answers whatever isn't below `/v1/`.

    `gate` is asked anew for every request: it changes with the configuration. `/healthz` and the status of
    `/readyz` are for everyone, since probes carry no keys.
    """
    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        return {"status": "alive"}

    @app.get("/readyz")
    async def readyz(request: Request) -> Response:
        found = await readiness()
        body: dict[str, str | int] = {"status": found.status}
        if gate().admits(request.headers.get("authorization")):
            body |= found.details
        return JSONResponse(body, status_code=found.code)

    @app.get("/metrics")
    async def metrics(request: Request) -> Response:
        try:
            gate().admit(request.headers.get("authorization"))
        except RequestError as error:
            refusal = refusal_of(error)
            headers = {"content-type": "application/json", "www-authenticate": "Bearer"}
            return Response(refusal.body, refusal.status, headers)
        # In a thread: with many tasks and workers this takes longer than a request may wait.
        text = await asyncio.to_thread(exposition)
        return Response(text, headers={"content-type": CONTENT_TYPE_LATEST})

    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(Exception, _unhandled_error)
    return app


_NOTHING_THERE = "there is nothing at this path: the API is under /v1/, so a client's base_url ends in /v1"


async def _http_error(_: Request, error: Exception) -> Response:
    """Put the framework's own errors (404, 405, …) into the envelope."""
    status = error.status_code if isinstance(error, HTTPException) else 500
    headers = dict(error.headers or {}) if isinstance(error, HTTPException) else {}
    said = {404: _NOTHING_THERE, 405: "this path doesn't take this method"}
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
