"""The stand-in: an OpenAI-compatible teacher that answers from a recording.

It is what the demo, the tests, the load tests and `understudy replay` use for a teacher, over real HTTP: a
plain ASGI app, which deliberately shares no code with the gateway's own reading and writing of the protocol.

- `POST /v1/chat/completions` looks up the text of the last user message. A text that was recorded more than
  once gets its answers in turn. An unknown text gets the default answer, or 404 `not_in_recording`.
- Latency is log-normal around a median and drawn per text, so that runs repeat; a stream spreads its chunks
  over it. Without a median, recorded latencies are used where there are some. With a rate of tokens the latency is
  that of the first one, and the rest comes at the rate.
- With a column `confidence` it plays a student: log-probabilities are made from it for those who ask for them.
- `GET /v1/models[/{id}]`. `POST /v1/echo` sends the body's bytes back as they come, `POST /v1/echo/sse` its
  lines as events; every other path under `/v1/` describes the request as JSON, so that a pass-through can be
  seen.
- `GET /stats` counts `chat` requests, those `answered` as recorded, those that met a scripted failure
  (`failed`), and clients that went away (`disconnected`). `GET /healthz` is ready.
- `POST /failures` takes a script of failures in place of the one before; an empty body ends them all.

What an answer looks like: `serving.recorded_reply`. Failures: `serving.failures`; how they are sent:
`serving.stand_in_call`.
"""

from __future__ import annotations

import hmac
import math
import random
import secrets
import signal
import socket
import time
import zlib
from collections.abc import Callable

import orjson
import uvicorn

from serving.errors import ConfigError, RequestError
from serving.exchange import Json
from serving.failures import Failure, Failures, parse_script
from serving.recorded_reply import Reply, content_text
from serving.recording import Recorded, Recording
from serving.stand_in_call import Call, Receive, Scope, ScriptedError, Send, StandInHttp


def create_stand_in(
    recording: Recording,
    *,
    model: str | None = None,
    latency_ms: float | None = None,
    latency_spread: float = 0.3,
    default: str | None = None,
    api_key: str | None = None,
    failures: Failures | None = None,
    tokens_per_s: float | None = None,
) -> StandIn:
    """Build the ASGI app that answers from `recording`.

    `model`: the name it answers under (absent: the recording's, else `stand-in`). `latency_ms`: median
    (absent: as recorded, else none). `latency_spread`: the σ of the latency's logarithm. `default`: the
    answer to texts that aren't in the recording. `api_key`: required as `authorization: Bearer …` when given.
    `tokens_per_s`: how fast tokens come after the first (absent: all of them within the latency).
    """
    return StandIn(
        recording,
        model=model or recording.model or "stand-in",
        latency=Latency(latency_ms, latency_spread),
        default=default,
        api_key=api_key,
        failures=failures or Failures(),
        tokens_per_s=tokens_per_s,
    )


class Latency:
    """How long an answer takes, in seconds: the same for the same text in every run."""

    def __init__(self, median_ms: float | None, spread: float) -> None:
        self._median_s = None if median_ms is None else median_ms / 1000
        self._spread = spread

    def of(self, row: Recorded) -> float:
        """Return the seconds that the answer `row` takes."""
        if self._median_s is None:
            return row.latency_s or 0.0
        if not self._median_s:
            return 0.0
        drawn = random.Random(zlib.crc32(row.text.encode())).gauss(0.0, self._spread)
        return self._median_s * math.exp(drawn)


class StandIn:
    """The ASGI app; `create_stand_in` builds it."""

    def __init__(
        self,
        recording: Recording,
        *,
        model: str,
        latency: Latency,
        default: str | None,
        api_key: str | None,
        failures: Failures,
        tokens_per_s: float | None,
    ) -> None:
        self.model = model
        self.answers = len(recording)
        self._latency = latency
        self._default = default
        self._key = None if api_key is None else f"Bearer {api_key}".encode()
        self._failures = failures
        self._token_s = None if tokens_per_s is None else 1.0 / tokens_per_s
        self._known: dict[str, list[tuple[Recorded, float]]] = {}
        for row in recording.rows:
            self._known.setdefault(row.text, []).append((row, latency.of(row)))
        self._turn: dict[str, int] = {}
        self._boot = secrets.token_hex(4)
        self._stats = {"chat": 0, "answered": 0, "failed": 0, "disconnected": 0}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one ASGI connection."""
        if scope["type"] != "http":
            raise RuntimeError(f"the stand-in serves HTTP only, not {scope['type']}")
        call = Call(scope, receive, send)
        try:
            await self._route(call)
        except RequestError as error:
            await call.refuse(error)
        except ConnectionResetError:
            self._stats["disconnected"] += 1

    async def _route(self, call: Call) -> None:
        path = call.path
        if path == "/healthz":
            return await call.answer({"status": "ok"})
        if path == "/stats":
            return await call.answer(dict(self._stats))
        if path == "/failures":
            return await self._take_failures(call)
        if not path.startswith("/v1/"):
            raise RequestError(f"there is no {path}; the API is under /v1", status=404, code="not_found")
        if self._key is not None and not hmac.compare_digest(call.header(b"authorization") or b"", self._key):
            raise RequestError(
                "missing or wrong API key", status=401, kind="authentication_error", code="invalid_api_key"
            )
        if path == "/v1/chat/completions":
            if call.method != "POST":
                raise RequestError(
                    f"{path} takes POST, not {call.method}", status=405, code="method_not_allowed"
                )
            return await self._chat(call)
        if path == "/v1/models" or path.startswith("/v1/models/"):
            return await self._models(call, path.removeprefix("/v1/models").lstrip("/"))
        if path == "/v1/echo":
            return await call.echo()
        if path == "/v1/echo/sse":
            return await call.echo_events()
        return await call.describe()

    async def _take_failures(self, call: Call) -> None:
        if call.method != "POST":
            raise RequestError(
                f"/failures takes POST, not {call.method}", status=405, code="method_not_allowed"
            )
        try:
            rules = parse_script(await call.body())
        except ValueError as error:
            raise RequestError(f"the script of failures: {error}", status=400) from error
        self._failures.replace(rules)
        await call.answer({"rules": len(rules)})

    async def _models(self, call: Call, name: str) -> None:
        entry = {"id": self.model, "object": "model", "created": 0, "owned_by": "stand-in"}
        if not name:
            return await call.answer({"object": "list", "data": [entry]})
        if name != self.model:
            raise RequestError(
                f"there is no model {name!r}; this is {self.model!r}", status=404, code="model_not_found"
            )
        return await call.answer(entry)

    async def _chat(self, call: Call) -> None:
        self._stats["chat"] += 1
        number = self._stats["chat"]
        request = parse_chat(await call.body())
        text = last_user_text(request)
        failure = self._failure(number, text, call, request)
        if failure is not None:
            self._stats["failed"] += 1
            await call.pause(failure.stall)
            if failure.status is not None:
                raise ScriptedError(failure.status, failure.retry_after)
        row, latency = self._look_up(text)
        reply = Reply(
            id=f"chatcmpl-{self._boot}-{number}",
            created=int(time.time()),
            model=row.model or self.model,
            row=row,
            request=request,
        )
        if request.get("stream") is True:
            each = latency / reply.length
            first, each = (each, each) if self._token_s is None else (latency, self._token_s)
            await call.stream(reply.chunks(), first, each, failure)
        else:
            await call.pause(latency + (self._token_s or 0.0) * reply.length)
            await call.answer(reply.whole(), failure)
        if failure is None:
            self._stats["answered"] += 1

    def _failure(self, number: int, text: str, call: Call, request: Json) -> Failure | None:
        metadata = request.get("metadata")
        asked: str | None = None
        if isinstance(metadata, dict) and isinstance(metadata.get("stand_in"), str):
            asked = metadata["stand_in"]
        header = call.header(b"x-stand-in")
        if header is not None:
            asked = header.decode("latin-1")
        try:
            return self._failures.draw(number, text, asked)
        except ValueError as error:
            raise RequestError(f"x-stand-in: {error}", status=400, param="x-stand-in") from error

    def _look_up(self, text: str) -> tuple[Recorded, float]:
        known = self._known.get(text)
        if known is None:
            if self._default is None:
                shown = text if len(text) <= 80 else f"{text[:79]}…"
                raise RequestError(
                    f"the recording has no answer to {shown!r}",
                    status=404,
                    param="messages",
                    code="not_in_recording",
                )
            row = Recorded(text=text, teacher=self._default)
            return row, self._latency.of(row)
        if len(known) == 1:
            return known[0]
        turn = self._turn.get(text, 0)
        self._turn[text] = turn + 1
        return known[turn % len(known)]


def parse_chat(raw: bytes) -> Json:
    """Read the body of a chat request as far as the stand-in needs it. Raises RequestError (400)."""
    try:
        request = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise RequestError(f"the body isn't valid JSON: {error}", status=400, code="invalid_json") from error
    if not isinstance(request, dict):
        raise RequestError("the body must be a JSON object", status=400)
    messages = request.get("messages")
    if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
        raise RequestError("`messages` must be a non-empty list of objects", status=400, param="messages")
    return request


def last_user_text(request: Json) -> str:
    """Return the text of the last message of role `user`; text parts are joined, other parts left out."""
    for message in reversed(request["messages"]):
        if message.get("role") == "user":
            return content_text(message.get("content"))
    raise RequestError("`messages` has none of role `user`", status=400, param="messages")


def serve_stand_in(app: StandIn, *, host: str, port: int, announce: Callable[[str], None]) -> None:
    """Serve until SIGINT or SIGTERM; streams in flight get three seconds to end.

    `port` 0 takes a free one. `announce` gets the base URL once connections are accepted. Raises ConfigError
    when the address can't be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(2048)
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"can't listen on {host} port {port}: {error.strerror or error}; choose another with --port"
        ) from error
    config = uvicorn.Config(
        app,
        http=StandInHttp,
        log_level="warning",
        access_log=False,
        lifespan="off",
        timeout_graceful_shutdown=3,
        timeout_keep_alive=75,  # longer than clients keep theirs, so that none meets a closing one
    )
    server = uvicorn.Server(config)

    def stop(*_: object) -> None:
        server.should_exit = True

    # For a signal that comes before uvicorn has its own handlers, and for when it has stopped and passes the
    # signal on to the handler it found: being stopped is no failure.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    shown = f"[{host}]" if family == socket.AF_INET6 else host
    announce(f"http://{shown}:{listener.getsockname()[1]}/v1")
    server.run(sockets=[listener])
