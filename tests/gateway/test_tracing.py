"""Traces through a whole gateway, to a collector that speaks OTLP over HTTP."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from starlette.types import Receive, Scope, Send

from serving.errors import ConfigError
from serving.failures import Failure, Failures, Rule
from serving.observe_settings import ObserveSettings

Start = Callable[..., Any]
Wait = Callable[[Callable[[], bool]], None]
ROOT = Path(__file__).parents[2]
BODY = {"model": "gpt-4o", "messages": [{"role": "user", "content": "hello"}]}
CLIENT_TRACE = "0af7651916cd43dd8448eb211c80319c"
CLIENT_SPAN = "b7ad6b7169203331"
TRACEPARENT = {"traceparent": f"00-{CLIENT_TRACE}-{CLIENT_SPAN}-01"}


@dataclass
class Collector:
    """An OTLP/HTTP receiver. `silent_s`: how long it keeps an exporter waiting."""

    silent_s: float = 0.0
    url: str = ""
    spans: list[Span] = field(default_factory=list)
    services: set[str] = field(default_factory=set)
    raw: bytes = b""
    asked: int = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        self.asked += 1
        body, more = b"", True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
        await asyncio.sleep(self.silent_s)
        self.raw += body
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            self.services |= {
                a.value.string_value for a in resource.resource.attributes if a.key == "service.name"
            }
            for scoped in resource.scope_spans:
                self.spans.extend(scoped.spans)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    def of_kind(self, kind: int) -> list[Span]:
        return [span for span in self.spans if span.kind == kind]

    @property
    def served(self) -> list[Span]:
        return self.of_kind(Span.SPAN_KIND_SERVER)

    @property
    def asked_teacher(self) -> list[Span]:
        return self.of_kind(Span.SPAN_KIND_CLIENT)


def attributes(span: Span) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for attribute in span.attributes:
        value = attribute.value
        kind = value.WhichOneof("value")
        assert kind is not None
        found[attribute.key] = (
            [item.string_value for item in value.array_value.values]
            if kind == "array_value"
            else getattr(value, kind)
        )
    return found


@pytest.fixture
def collector(serve: Start, monkeypatch: pytest.MonkeyPatch) -> Collector:
    """A collector that every gateway started after it sends to."""
    made = Collector()
    made.url = serve(made)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", made.url)
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
    return made


@pytest.fixture
def teacher(serve: Start, stand_in: Start) -> Start:
    """The stand-in, which remembers the headers it was sent."""

    def start(**options: Any) -> tuple[str, list[dict[str, str]]]:
        app = stand_in({"hello": "greeting", "parcel lost": "lost"}, **options).app
        seen: list[dict[str, str]] = []

        async def noting(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] == "http":
                seen.append({name.decode(): value.decode() for name, value in scope["headers"]})
            await app(scope, receive, send)

        return serve(noting), seen

    return start


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_is_a_span_and_the_teachers_call_its_child(
    teacher: Start, gateway: Start, collector: Collector, eventually: Wait, stream: bool
) -> None:
    url, seen = teacher()
    running = gateway(url)
    running.post(json={**BODY, "stream": stream}, headers={**TRACEPARENT, "x-request-id": "mine-1"})
    eventually(lambda: len(collector.spans) == 2)
    (request,), (call,) = collector.served, collector.asked_teacher
    assert request.trace_id.hex() == call.trace_id.hex() == CLIENT_TRACE
    assert request.parent_span_id.hex() == CLIENT_SPAN
    assert call.parent_span_id == request.span_id
    assert seen[-1]["traceparent"] == f"00-{CLIENT_TRACE}-{call.span_id.hex()}-01"
    assert request.name == call.name == "chat gpt-4o"
    assert collector.services == {"understudy"}
    (exchange,) = running.exchanges()
    assert exchange.teacher is not None
    assert exchange.teacher.usage is not None
    common = {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "openai",
        "gen_ai.request.model": "gpt-4o",
        "gen_ai.request.stream": stream,
        "gen_ai.response.model": exchange.teacher.model,
        "gen_ai.response.finish_reasons": ["stop"],
        "gen_ai.usage.input_tokens": exchange.teacher.usage["prompt_tokens"],
        "gen_ai.usage.output_tokens": exchange.teacher.usage["completion_tokens"],
    }
    told = attributes(call)
    assert str(told.pop("gen_ai.response.id")).startswith("chatcmpl-")
    assert (told.pop("server.address"), told.pop("server.port")) == ("127.0.0.1", int(url.rpartition(":")[2]))
    assert told == common
    assert attributes(request) == {
        **common,
        "http.request.method": "POST",
        "http.route": "/v1/chat/completions",
        "http.response.status_code": 200,
        "understudy.request_id": "mine-1",
        "understudy.route": "teacher",
        "understudy.reason": "no_release",
        "understudy.task": exchange.task,
        "understudy.audit": exchange.audit != "none",
        "understudy.cost_usd": exchange.cost_usd,
    }
    assert b"hello" not in collector.raw
    assert b"greeting" not in collector.raw, "neither prompt nor answer"


def test_the_students_answer_and_its_audit_are_one_trace(
    teacher: Start, gateway: Start, collector: Collector, publish: Start, eventually: Wait, tmp_path: Path
) -> None:
    url, _ = teacher()
    publish(tmp_path / "state", "small", {"parcel lost": "lost", "parcel late": "late"})
    running = gateway(url, task=[{"name": "small", "audit_rate": 1.0}])
    question = {"model": "m", "messages": [{"role": "user", "content": "parcel lost"}]}
    answer = running.post(json=question, headers={"x-understudy-task": "small"})
    assert answer.headers["x-understudy-route"] == "student"
    eventually(
        lambda: any(attributes(span).get("understudy.audit") is True for span in collector.asked_teacher)
    )
    (request,) = collector.served
    told = attributes(request)
    assert told["understudy.release"] == "r0001"
    assert told["understudy.audit"] is True
    assert 0 < told["understudy.confidence"] <= 1
    assert told["gen_ai.provider.name"] == "understudy"
    assert told["gen_ai.usage.output_tokens"] > 0
    (audit,) = collector.asked_teacher
    assert audit.parent_span_id == request.span_id


def test_an_answer_from_the_cache_says_whose_it_was_and_asks_nobody(
    teacher: Start, gateway: Start, collector: Collector, eventually: Wait
) -> None:
    url, _ = teacher()
    running = gateway(url)
    for _ in range(2):
        assert running.post(json={**BODY, "temperature": 0}).status_code == 200
    eventually(lambda: len(collector.served) == 2)
    first, again = (attributes(span) for span in collector.served)
    assert len(collector.asked_teacher) == 1
    assert (again["understudy.route"], again["understudy.reason"]) == ("cache", "hit:teacher")
    same = {key for key in first if key.startswith("gen_ai.")}
    assert {key: again[key] for key in same} == {key: first[key] for key in same}


def test_a_failure_is_one_in_both_spans(
    teacher: Start, gateway: Start, collector: Collector, eventually: Wait
) -> None:
    url, _ = teacher(failures=Failures((Rule(Failure(status=503)),)))
    assert gateway(url).post(json=BODY).status_code == 503
    eventually(lambda: len(collector.spans) == 2)
    for span in collector.spans:
        assert attributes(span)["error.type"] == "503"
        assert span.status.message == "the teacher answered with status 503"


def test_other_requests_are_traced_by_their_route(
    teacher: Start, gateway: Start, collector: Collector, eventually: Wait
) -> None:
    url, seen = teacher()
    running = gateway(url)
    running.get("/v1/models?secret=1", headers=TRACEPARENT)
    running.post(content=b"no JSON")
    eventually(lambda: len(collector.spans) == 3)
    (call,) = collector.asked_teacher
    assert seen[-1]["traceparent"] == f"00-{CLIENT_TRACE}-{call.span_id.hex()}-01"
    assert {span.name for span in collector.served} == {"GET /v1/{path}", "POST /v1/chat/completions"}
    assert b"secret" not in collector.raw


def test_a_collector_that_is_away_costs_nothing(
    teacher: Start, gateway: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
    url, _ = teacher()
    running = gateway(url)
    for _ in range(20):
        assert running.post(json=BODY).status_code == 200


def test_a_collector_that_is_slow_delays_neither_requests_nor_the_exit(
    serve: Start, teacher: Start, tmp_path: Path, eventually: Wait
) -> None:
    collector = Collector(silent_s=20)
    endpoint = serve(collector)
    url, _ = teacher()
    (tmp_path / "understudy.toml").write_text(f'[teacher]\nbase_url = "{url}/v1"\n')
    child = subprocess.Popen(
        [sys.executable, "-m", "understudy", "serve", "--port", "0"],
        cwd=tmp_path,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "OTEL_EXPORTER_OTLP_ENDPOINT": endpoint,
            "OTEL_BSP_SCHEDULE_DELAY": "50",
        },
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert child.stdout is not None
        address = child.stdout.readline().split()[3]
        eventually(lambda: _is_ready(address))
        assert httpx.post(f"{address}/v1/chat/completions", json=BODY).status_code == 200
        eventually(lambda: collector.asked > 0)
        began = time.monotonic()
        for _ in range(10):
            assert httpx.post(f"{address}/v1/chat/completions", json=BODY).status_code == 200
        assert time.monotonic() - began < 10
        began = time.monotonic()
        child.send_signal(signal.SIGTERM)
        child.wait(timeout=15)
        # Without the bound it would be 10 s, the exporter's own timeout.
        assert time.monotonic() - began < 6
    finally:
        child.kill()
        child.communicate()


def _is_ready(url: str) -> bool:
    try:
        return bool(httpx.get(f"{url}/readyz").status_code == 200)
    except httpx.TransportError:
        return False


def test_without_the_extra_it_says_what_to_install(tmp_path: Path) -> None:
    # A module of that name hides the installed one, and says what Python says of a missing one. (FastAPI brings
    # OpenTelemetry's API along, but not the SDK.)
    hidden = tmp_path / "hidden" / "opentelemetry"
    hidden.mkdir(parents=True)
    missing = "raise ModuleNotFoundError(\"No module named 'opentelemetry.sdk'\", name='opentelemetry.sdk')"
    (hidden / "sdk.py").write_text(missing)
    (tmp_path / "understudy.toml").write_text("[observe]\notel = true\n")
    path = os.pathsep.join([str(tmp_path / "hidden"), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-m", "understudy", "serve", "--port", "0"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert "pip install 'understudy[otel]'" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("otel", "environment", "wanted"),
    [
        (None, {}, False),
        (None, {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4318"}, True),
        (None, {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://collector:4318/v1/traces"}, True),
        (None, {"OTEL_EXPORTER_OTLP_ENDPOINT": ""}, False),
        (False, {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4318"}, False),
        (True, {}, True),
        (True, {"OTEL_SDK_DISABLED": "true"}, False),
        (True, {"OTEL_TRACES_EXPORTER": "none"}, False),
    ],
)
def test_who_decides_whether_there_are_traces(
    monkeypatch: pytest.MonkeyPatch, otel: bool | None, environment: dict[str, str], wanted: bool
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert ObserveSettings(otel=otel).traced() is wanted


def test_a_protocol_that_isnt_spoken_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc")
    with pytest.raises(ConfigError, match="OTEL_EXPORTER_OTLP_PROTOCOL says grpc"):
        ObserveSettings(otel=True).traced()
