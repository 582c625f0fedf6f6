"""The teacher: the expensive model behind any OpenAI-compatible base URL.

A failed attempt is repeated while the client has seen nothing of its answer: when there was no connection or
it ended early, and for the statuses 408, 409, 429 and 5xx, with exponential backoff and full jitter
(https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/). Like OpenAI's own clients it
follows `retry-after-ms`, `retry-after` and `x-should-retry`. A repeated chat completion may be billed twice,
never answered twice. Retries have a budget (serving/retry_budget.py), a teacher that fails most of the time
is left alone for a moment (serving/breaker.py), and only so many requests are there at once (serving/slots.py).
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import orjson
from pydantic import SecretStr

from serving.asking import Asking, could_not_be_reached, failed_to_answer
from serving.breaker import Breaker, State
from serving.errors import ConfigError, UnderstudyError, UpstreamError, UpstreamRefused, UpstreamTimeout
from serving.exchange import Json, TeacherAnswer
from serving.logprobs import LogprobsForTheLog, may_be_about_logprobs
from serving.pricing import PriceList
from serving.slots import Slots
from serving.teacher_settings import TeacherSettings
from serving.teacher_stream import Chunk, StreamFailed, TeacherStream, completion_of, shown_of
from serving.upstream import Headers, NothingSent, StaleConnection, Upstream, UpstreamResponse
from serving.wire import forwardable_request, forwardable_response, upstream_path

__all__ = ["Chunk", "OnAsked", "StreamFailed", "Teacher", "TeacherReply", "TeacherStream"]

_T = TypeVar("_T")
_Attempt = Callable[[bytes, bool], Awaitable[_T]]

OnAsked = Callable[[bool], None]
"""Hears, with True, that the teacher is being asked and may bill it; with False, that the attempt failed before that.

An attempt that is given up (deadline, client gone) isn't followed by False: the teacher may be at work on it.
"""

_CHAT = "/chat/completions"
_IDEMPOTENT = frozenset({"GET", "HEAD", "OPTIONS", "PUT", "DELETE"})
_CHAT_HEADERS = frozenset(
    {"openai-organization", "openai-project", "openai-beta", "user-agent", "traceparent", "tracestate"}
)
"""What of the client's headers goes along with a chat completion."""


@dataclass(frozen=True, slots=True)
class TeacherReply:
    """A whole answer: `body` is the completion, `raw` its bytes, `headers` what of its headers may go on.

    Body and bytes are mended where strict clients need it (`serving.mending`), and lack the log-probabilities
    that `answer` has for the log alone.
    """

    answer: TeacherAnswer
    body: Json
    raw: bytes
    headers: list[tuple[str, str]]


class Teacher:
    """Asks the teacher, through the connections of `upstream`, which it doesn't close.

    `key` is the gateway's own key for the teacher; without it the client's `authorization` is passed on.
    `slots` bound the requests under way (absent: `max_concurrency` and as many waiting). `on_breaker` hears
    the state of the breaker of `chat` and of `other` requests, `on_retry` how retries end (see `Asking`).
    Raises ConfigError for a key that can't stand in a header.
    """

    def __init__(
        self,
        settings: TeacherSettings,
        upstream: Upstream,
        key: SecretStr | None,
        prices: PriceList,
        *,
        slots: Slots | None = None,
        on_breaker: Callable[[str, State], None] | None = None,
        on_retry: Callable[[str], None] | None = None,
    ) -> None:
        self._settings = settings
        self._upstream = upstream
        self._prices = prices
        self._logprobs = LogprobsForTheLog(wanted=settings.logprobs)
        self._authorization = None if key is None else SecretStr(f"Bearer {_checked(key)}")
        self._slots = slots or Slots(settings.max_concurrency, waiting=settings.max_concurrency)

        def asking(what: str, is_fault: Callable[[UpstreamError], bool]) -> Asking:
            heard = None if on_breaker is None else partial(on_breaker, what)
            return Asking(
                upstream.place,
                timeout_s=settings.timeout_s,
                max_retries=settings.max_retries,
                breaker=Breaker(on_change=heard) if settings.breaker else None,
                is_fault=is_fault,
                on_retry=on_retry,
            )

        self._chat = asking("chat", failed_to_answer)
        self._other = asking("other", could_not_be_reached)

    @property
    def has_room(self) -> bool:
        """Whether it may be asked for what isn't strictly needed: it is well, and a fifth of its slots stays free."""
        return self._chat.is_well and self._slots.has_room

    async def complete(
        self,
        request: Json,
        *,
        authorization: str | None,
        request_id: str,
        headers: Headers = (),
        background: bool = False,
        on_asked: OnAsked | None = None,
    ) -> TeacherReply:
        """Ask for a whole answer; `stream` and `stream_options` are left out of the request.

        `authorization` is the client's header value, `headers` the client's headers (lower-case names), of
        which an allow-list goes along. The deadline `timeout_s` spans all attempts. `background`: nobody
        waits for it, so it lets everybody else go first, and there is one attempt. `on_asked`: see `OnAsked`.

        Raises UpstreamRefused (the upstream's own status, headers and body), UpstreamTimeout, UpstreamBroken,
        or, without having asked, UpstreamUnavailable or UpstreamBusy.
        """
        began = time.perf_counter()
        sent = self._chat_headers(authorization, request_id, headers)

        async def attempt(body: bytes, hide: bool) -> tuple[Json, Json, bytes, Headers]:
            async with await self._upstream.request("POST", _CHAT, headers=sent, body=body) as response:
                raw = await response.read()
            if not 200 <= response.status < 300:
                raise _refused(response, raw)
            completion, raw = completion_of(raw, response.headers, request)
            return completion, *shown_of(completion, raw, hide=hide), response.headers

        async with self._slots.taken(background=background):
            completion, shown, raw, received = await self._asked(
                request, _told(attempt, on_asked), stream=False, retries=not background
            )
        answer = self._answer(
            model=completion.get("model") or request["model"],
            choices=completion["choices"],
            usage=completion.get("usage"),
            system_fingerprint=completion.get("system_fingerprint"),
            service_tier=completion.get("service_tier"),
            asked_model=self._settings.model or request["model"],
            latency_s=time.perf_counter() - began,
        )
        return TeacherReply(answer, shown, raw, forwardable_response(received, whole=False))

    @asynccontextmanager
    async def stream(
        self,
        request: Json,
        *,
        authorization: str | None,
        request_id: str,
        headers: Headers = (),
        on_asked: OnAsked | None = None,
    ) -> AsyncIterator[TeacherStream]:
        """Ask for a stream; the context is entered when the answer begins, so that errors keep their status.

        Usage is always asked for: a client that didn't must not be shown it (see `Chunk`). The deadline
        `timeout_s` holds until the answer begins, then `stall_timeout_s` for every silence between chunks.
        Leaving the context early closes the connection.

        Raises as `complete` does, on entering and while iterating.
        """
        began = time.perf_counter()
        sent = self._chat_headers(authorization, request_id, headers)

        async def attempt(body: bytes, hide: bool) -> TeacherStream:
            response = await self._upstream.request("POST", _CHAT, headers=sent, body=body)
            try:
                if not 200 <= response.status < 300:
                    raise _refused(response, await response.read())
                stream = TeacherStream(
                    response,
                    request,
                    hide=hide,
                    stall_s=self._settings.stall_timeout_s,
                    finish=finish,
                    failed=self._chat.broke_off,
                )
                await stream.begin()
            except BaseException:
                await response.aclose()
                raise
            return stream

        def finish(stream: TeacherStream) -> TeacherAnswer:
            whole = stream.assembler
            return self._answer(
                model=whole.model or request["model"],
                choices=whole.choices,
                usage=whole.usage,
                system_fingerprint=whole.system_fingerprint,
                service_tier=whole.service_tier,
                asked_model=self._settings.model or request["model"],
                latency_s=time.perf_counter() - began,
            )

        async with self._slots.taken():
            stream = await self._asked(request, _told(attempt, on_asked), stream=True)
            try:
                yield stream
            finally:
                await stream.aclose()

    async def forward(
        self,
        method: str,
        target: str,
        headers: Headers,
        body: bytes | AsyncIterator[bytes],
        *,
        authorization: str | None,
    ) -> UpstreamResponse:
        """Pass on any other request under /v1 and hand back the answer, whatever its status.

        `target` is path and query as the client sent them; what follows "/v1" is appended to the base URL.
        Headers lose what belongs to one connection or to us, in both directions; bodies stay as they are.
        Repeated, if `body` is bytes, when there was no connection, and for idempotent methods when a kept one
        had ended: of a POST nobody can tell then whether it was done (nginx and Go's client don't repeat it
        either). The client gets 502, which OpenAI's own clients repeat.

        Raises RequestError for a target outside /v1, otherwise as `complete` does.
        """
        path = upstream_path(target)
        sent = [*forwardable_request(headers), *self._credentials(authorization)]

        def repeatable(error: UpstreamError) -> bool:
            if not isinstance(body, bytes):
                return False
            return isinstance(error, NothingSent) or (
                isinstance(error, StaleConnection) and method in _IDEMPOTENT
            )

        async def attempt() -> UpstreamResponse:
            return await self._upstream.request(method, path, headers=sent, body=body)

        await self._slots.take()
        try:
            response = await self._other.until_answered(attempt, repeatable=repeatable)
        except BaseException:
            self._slots.give_back()
            raise
        response.when_closed(self._slots.give_back)
        response.headers = forwardable_response(response.headers, whole=True)
        return response

    async def _asked(
        self,
        request: Json,
        attempt: _Attempt[_T],
        *,
        stream: bool,
        retries: bool = True,
    ) -> _T:
        """Ask for a chat completion, with log-probabilities where the log wants them and the model has them.

        `attempt` gets the body to send, and whether its log-probabilities are for the log only.
        """

        async def ask(hide: bool) -> _T:
            body = self._body(request, stream=stream, logprobs=hide)
            return await self._chat.until_answered(
                lambda: attempt(body, hide), repeatable=_always, retries=retries
            )

        model = self._settings.model or request["model"]
        wanted = self._logprobs.to_be_asked(request, model)
        if wanted:
            try:
                return await ask(True)
            except UpstreamRefused as error:
                if not may_be_about_logprobs(error):
                    raise
        answer = await ask(False)
        if wanted:
            self._logprobs.not_from(model)
        return answer

    def _body(self, request: Json, *, stream: bool, logprobs: bool) -> bytes:
        body = dict(request)
        if logprobs:
            body["logprobs"] = True
        if self._settings.model is not None:
            body["model"] = self._settings.model
        if stream:
            body["stream"] = True
            body["stream_options"] = {**(request.get("stream_options") or {}), "include_usage": True}
        elif body.get("stream"):
            del body["stream"]
            body.pop("stream_options", None)
        return orjson.dumps(body)

    def _credentials(self, authorization: str | None) -> list[tuple[str, str]]:
        own = self._authorization
        value = authorization if own is None else own.get_secret_value()
        return [] if value is None else [("authorization", value)]

    def _chat_headers(self, authorization: str | None, request_id: str, headers: Headers) -> Headers:
        return [
            ("content-type", "application/json"),
            # Answers are read here, and a few kilobytes aren't worth unpacking.
            ("accept-encoding", "identity"),
            ("x-request-id", request_id),
            *((name, value) for name, value in headers if name in _CHAT_HEADERS),
            *self._credentials(authorization),
        ]

    def _answer(
        self,
        *,
        model: str,
        choices: list[Json],
        usage: Json | None,
        system_fingerprint: str | None,
        service_tier: str | None,
        asked_model: str,
        latency_s: float,
    ) -> TeacherAnswer:
        cost, version = self._prices.cost(model, usage, service_tier=service_tier)
        if cost is None and asked_model != model:
            cost, version = self._prices.cost(asked_model, usage, service_tier=service_tier)
        return TeacherAnswer(
            model=model,
            choices=choices,
            usage=usage,
            latency_s=latency_s,
            system_fingerprint=system_fingerprint,
            cost_usd=cost,
            price_version=version,
            trainable=self._settings.trainable,
        )


def _checked(key: SecretStr) -> str:
    """Strip what a file or a shell left around the key. Raises ConfigError without showing it."""
    value = key.get_secret_value().strip()
    if not value or not value.isascii() or not value.isprintable():
        raise ConfigError("the teacher's key is empty or has characters that can't be sent: set it again")
    return value


def _told(attempt: _Attempt[_T], on_asked: OnAsked | None) -> _Attempt[_T]:
    if on_asked is None:
        return attempt

    async def told(body: bytes, hide: bool) -> _T:
        on_asked(True)
        try:
            return await attempt(body, hide)
        except UnderstudyError as error:
            on_asked(isinstance(error, UpstreamTimeout))
            raise

    return told


def _always(_: UpstreamError) -> bool:
    return True


def _refused(response: UpstreamResponse, body: bytes) -> UpstreamRefused:
    kept = forwardable_response(response.headers, whole=True)
    return UpstreamRefused(response.status, {k: v for k, v in kept if k != "content-length"}, body)
