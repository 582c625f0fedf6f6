"""OpenTelemetry traces, by the semantic conventions of generative AI. The only module that imports it.

A chat request is a span `chat {model}` of kind SERVER, continuing the client's `traceparent`; each question to
the teacher is a child of kind CLIENT, whose `traceparent` the teacher gets. A prompt or an answer is never
part of one. Spans go out as OTLP over HTTP from a thread of the SDK's, in batches; a collector that is slow
or away costs spans, not requests. Everything the SDK reads from `OTEL_…` variables holds (endpoint, headers,
sampler, batches, resource).

https://opentelemetry.io/docs/specs/semconv/gen-ai/gen-ai-spans/
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from contextvars import ContextVar
from urllib.parse import urlsplit

from opentelemetry import context as otel_context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import INVALID_SPAN, Span, SpanKind, Status, StatusCode, Tracer, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue

from gateway import names
from gateway.access_log import status_of
from gateway.client import Client
from gateway.turn import Turn
from serving.errors import UpstreamBroken, UpstreamError, UpstreamRefused
from serving.exchange import Json, TeacherAnswer
from serving.teacher import OnAsked, Teacher, TeacherReply, TeacherStream
from serving.upstream import Headers, UpstreamResponse

Attributes = dict[str, AttributeValue]

_SCOPE = "understudy"
_CLOSE_WITHIN_S = 1.5
_TRACE_HEADERS = ("traceparent", "tracestate")
_OURSELVES = "understudy"
_OTHER_ROUTE = "/v1/{path}"
_W3C = TraceContextTextMapPropagator()
_PROVIDERS = {
    "openai.azure.com": "azure.ai.openai",
    "anthropic.com": "anthropic",
    "deepseek.com": "deepseek",
    "googleapis.com": "gcp.gen_ai",
    "groq.com": "groq",
    "mistral.ai": "mistral_ai",
    "perplexity.ai": "perplexity",
    "x.ai": "x_ai",
}
"""The convention's name of a provider by the end of its host; whatever else speaks OpenAI's language: `openai`."""


class Tracing:
    """Makes the spans of one process, as long as its application lives. `base_url` is the teacher's."""

    def __init__(self, base_url: str) -> None:
        self._provider = TracerProvider(resource=_resource(), shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        self._tracer = self._provider.get_tracer(_SCOPE)
        self._teacher = _place(base_url)

    @contextmanager
    def request(self, client: Client) -> Iterator[None]:
        """Trace one request, from its head to the end of its answer."""
        known = {name: value for name, value in client.headers if name in _TRACE_HEADERS}
        chat = client.target.partition("?")[0] == names.CHAT_PATH
        route = names.CHAT_PATH if chat else _OTHER_ROUTE
        span = self._tracer.start_span(
            f"{client.method} {route}",
            context=_W3C.extract(known),
            kind=SpanKind.SERVER,
            attributes={
                "http.request.method": client.method,
                "http.route": route,
                "understudy.request_id": client.request_id,
            },
        )
        request = _Request(self._tracer, span, self._teacher)
        ours = _current.set(request)
        theirs = otel_context.attach(set_span_in_context(span))
        try:
            yield
        finally:
            otel_context.detach(theirs)
            _current.reset(ours)
            request.over(client)

    async def aclose(self) -> None:
        """Send what is left, for at most a second and a half: a collector that is away must not hold the exit."""
        loop = asyncio.get_running_loop()
        sent = asyncio.Event()

        def shut_down() -> None:
            self._provider.shutdown()
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(sent.set)

        # A thread that the interpreter's exit doesn't wait for, unlike those of the loop's pool.
        threading.Thread(target=shut_down, name="otel-shutdown", daemon=True).start()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_CLOSE_WITHIN_S):
                await sent.wait()


class _Request:
    """The span of a request, and the parent of what is asked for its sake, its audit included."""

    def __init__(self, tracer: Tracer, span: Span, teacher: Attributes) -> None:
        self._tracer = tracer
        self._span = span
        self._teacher = teacher
        self._over = False

    def over(self, client: Client) -> None:
        """Say how the request ended, and end its span."""
        self._over = True
        span, status = self._span, status_of(client)
        if span.is_recording():
            if client.status is not None:
                span.set_attribute("http.response.status_code", client.status)
            if client.turn is not None:
                span.update_name(f"chat {client.turn.chat.model}")
                span.set_attributes(_of_turn(client.turn, self._teacher))
            if client.gone:
                span.set_attribute("understudy.client_gone", True)
            if status >= 500:
                _fail(span, str(status), client.failure or (client.turn.failure if client.turn else None))
        span.end()

    def ask(self, name: str, attributes: Attributes) -> Span:
        """Start the span of a question to the teacher."""
        asked = {**self._teacher, **attributes}
        if self._over:
            asked["understudy.audit"] = True
        parent = set_span_in_context(self._span)
        return self._tracer.start_span(name, context=parent, kind=SpanKind.CLIENT, attributes=asked)


_current: ContextVar[_Request | None] = ContextVar("understudy_request", default=None)
"""The request that is being served: tasks started for its sake inherit it."""


class TracedTeacher(Teacher):
    """The teacher, with a span for each question. What no request asks for (a left-over audit) has none."""

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
        """As `Teacher.complete`."""
        with _asking(f"chat {request['model']}", _of_request(request, stream=False)) as span:
            reply = await super().complete(
                request,
                authorization=authorization,
                request_id=request_id,
                headers=_with_trace(headers, span),
                background=background,
                on_asked=on_asked,
            )
            span.set_attributes(_of_answer(reply.answer, reply.body.get("id")))
        return reply

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
        """As `Teacher.stream`."""
        with _asking(f"chat {request['model']}", _of_request(request, stream=True)) as span:
            async with super().stream(
                request,
                authorization=authorization,
                request_id=request_id,
                headers=_with_trace(headers, span),
                on_asked=on_asked,
            ) as stream:
                try:
                    yield stream
                finally:
                    _note_stream(span, stream)

    async def forward(
        self,
        method: str,
        target: str,
        headers: Headers,
        body: bytes | AsyncIterator[bytes],
        *,
        authorization: str | None,
    ) -> UpstreamResponse:
        """As `Teacher.forward`. The span ends with the head of the answer."""
        with _asking(method, {"http.request.method": method}) as span:
            response = await super().forward(
                method, target, _with_trace(headers, span), body, authorization=authorization
            )
            span.set_attribute("http.response.status_code", response.status)
            if response.status >= 400:
                _fail(span, str(response.status), None)
        return response


@contextmanager
def _asking(name: str, attributes: Attributes) -> Iterator[Span]:
    """Start a span and end it, with what went wrong on the way; one that is none where no request asks."""
    request = _current.get()
    span = INVALID_SPAN if request is None else request.ask(name, attributes)
    try:
        yield span
    except UpstreamRefused as error:
        _fail(span, str(error.status), str(error))
        raise
    except UpstreamError as error:
        _fail(span, error.kind, str(error))
        raise
    except asyncio.CancelledError:
        _fail(span, "cancelled", None)
        raise
    finally:
        span.end()


def _note_stream(span: Span, stream: TeacherStream) -> None:
    try:
        answer = stream.answer()
    except UpstreamBroken:
        # It broke, or nobody listens any more; the request's own span knows which.
        _fail(span, "incomplete", None)
    else:
        span.set_attributes(_of_answer(answer, stream.assembler.id))


def _with_trace(headers: Headers, span: Span) -> Headers:
    """Put our span where the client's was: it is the teacher's parent now."""
    if span is INVALID_SPAN:
        return headers
    carrier: dict[str, str] = {}
    _W3C.inject(carrier, context=set_span_in_context(span))
    return [*((name, value) for name, value in headers if name not in _TRACE_HEADERS), *carrier.items()]


def _fail(span: Span, kind: str, said: str | None) -> None:
    span.set_attribute("error.type", kind)
    span.set_status(Status(StatusCode.ERROR, said))


def _of_request(request: Json, *, stream: bool) -> Attributes:
    return {
        "gen_ai.operation.name": "chat",
        "gen_ai.request.model": str(request["model"]),
        "gen_ai.request.stream": stream,
    }


def _of_answer(answer: TeacherAnswer, response_id: object) -> Attributes:
    found: Attributes = {"gen_ai.response.model": answer.model, **_of_choices(answer.choices, answer.usage)}
    if isinstance(response_id, str):
        found["gen_ai.response.id"] = response_id
    return found


def _of_choices(choices: list[Json], usage: Json | None) -> Attributes:
    reasons = [reason for choice in choices if isinstance(reason := choice.get("finish_reason"), str)]
    found: Attributes = {"gen_ai.response.finish_reasons": reasons}
    for key, name in (("input_tokens", "prompt_tokens"), ("output_tokens", "completion_tokens")):
        count = (usage or {}).get(name)
        if isinstance(count, int):
            found[f"gen_ai.usage.{key}"] = count
    return found


def _of_turn(turn: Turn, teacher: Attributes) -> Attributes:
    """Say what became of a chat request: the convention's attributes, then our own."""
    found = _of_request(turn.chat.body, stream=turn.chat.stream)
    given = turn.given
    found["gen_ai.provider.name"] = _OURSELVES if turn.by_student else teacher["gen_ai.provider.name"]
    if isinstance(given, TeacherAnswer):
        found |= _of_answer(given, None)
    elif given is not None:
        found |= _of_choices(given.choices, given.usage)
    found |= {
        "understudy.route": turn.route,
        "understudy.reason": turn.reason,
        "understudy.task": turn.task,
        "understudy.audit": turn.audit() != "none",
    }
    if turn.release is not None:
        found["understudy.release"] = turn.release.name
    if turn.decision is not None:
        found["understudy.confidence"] = turn.decision.confidence
    if turn.cost_usd is not None:
        found["understudy.cost_usd"] = turn.cost_usd
    return found


def _place(base_url: str) -> Attributes:
    address = urlsplit(base_url)
    host = address.hostname or ""
    provider = next((name for end, name in _PROVIDERS.items() if f".{host}".endswith(f".{end}")), "openai")
    found: Attributes = {"gen_ai.provider.name": provider, "server.address": host}
    if address.port is not None:
        found["server.port"] = address.port
    return found


def _resource() -> Resource:
    """Describe this process as the environment says; without a name there, it is `understudy`."""
    resource = Resource.create()
    if str(resource.attributes.get(SERVICE_NAME, "")).startswith("unknown_service"):
        resource = resource.merge(Resource({SERVICE_NAME: "understudy"}))
    return resource
