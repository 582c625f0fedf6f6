"""What a gateway is made of: the parts of one configuration, and what they share with the next one."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gateway.access_log import AccessLog
from gateway.admission import TEACHERS_SHARE, Admission
from gateway.attempts import Attempts
from gateway.audits import WAITS_FOR_S, Audits
from gateway.auth import AdminGate, Gate
from gateway.cache import Cache
from gateway.cache_key import cache_scope
from gateway.chat import ChatEndpoint
from gateway.ledger import Ledger
from gateway.live import LiveReleases
from gateway.metrics import Metrics
from gateway.passthrough import Passthrough
from gateway.pipeline import Pipeline
from gateway.reload import Generation, Kept
from gateway.tasks import Tasks
from serving.adapter_shelf import AdapterShelf
from serving.breaker import State
from serving.disk import Disk
from serving.engines import Engines
from serving.errors import ConfigError
from serving.layout import task_names
from serving.log import EventLog
from serving.pool import Pool
from serving.pricing import PriceList
from serving.redaction import Redactor
from serving.settings import Settings
from serving.slots import Slots
from serving.student_price import StudentPrices
from serving.teacher import Teacher
from serving.upstream import Upstream

if TYPE_CHECKING:
    from gateway.tracing import Tracing

_AUDIT_GRACE_S = 60.0


@dataclass(frozen=True, slots=True)
class Lasting:
    """What outlives a reload: whatever has a memory, or exists once in a process."""

    metrics: Metrics
    event_log: EventLog
    live: LiveReleases
    attempts: Attempts
    audited: set[str]
    pool: Pool


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


def make_lasting(settings: Settings, tasks: Tasks, disk: Disk, stack: AsyncExitStack) -> Lasting:
    """Build what every configuration shares; `stack` takes it down. Raises ConfigError."""
    metrics = Metrics()
    pool = Pool(settings.state_dir, settings.student.vllm, on_look=metrics.record_servers)
    stack.push_async_callback(pool.aclose)
    live = LiveReleases(
        settings.state_dir,
        tasks,
        metrics,
        redact=settings.log.redact,
        engines=Engines(
            pool=pool,
            onnx=settings.student.onnx,
            adapters=AdapterShelf(settings.state_dir, seen_at=settings.student.adapters_at),
        ),
    )
    stack.push_async_callback(live.aclose)
    event_log = EventLog(settings.state_dir, settings.log, disk=disk)
    stack.push_async_callback(event_log.aclose)
    return Lasting(metrics, event_log, live, Attempts(), set(), pool)


def make_tasks(settings: Settings, known: Iterable[str] = ()) -> Tasks:
    """Build the tasks; those `known` to an earlier configuration stay, even before they are on disk."""
    carried = list(known)
    return Tasks(settings, lambda: {*task_names(settings.state_dir), *carried})


async def make_parts(
    settings: Settings, lasting: Lasting, tasks: Tasks, old: Parts | None = None
) -> Generation[Parts]:
    """Build the parts of one configuration; they are taken down in the opposite order.

    `old` are those of the configuration before, for what may go on. Raises ConfigError; then nothing is left open.
    """
    async with AsyncExitStack() as stack:
        cache = _cache(settings, lasting.metrics, old)
        stack.push_async_callback(cache.hold())
        prices = PriceList(settings.teacher.price, base_url=settings.teacher.base_url)
        teacher, tracing = _teacher(settings, prices, lasting.metrics, stack)
        ledger = _ledger(settings, lasting, prices)
        stack.push_async_callback(ledger.aclose)
        gate = Gate(settings.server.api_keys, settings.teacher_key())
        if old is not None and old.settings.teacher.base_url == settings.teacher.base_url:
            gate.take_over(old.gate)
        audits = Audits(
            teacher=teacher,
            ledger=ledger,
            live=lasting.live,
            tasks=tasks,
            metrics=lasting.metrics,
            client_keys=gate.client_keys,
            keeper_can_audit=_keeper_can_audit(settings),
            under_way=lasting.audited,
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
            metrics=lasting.metrics,
        )
        stack.push_async_callback(pipeline.aclose)
        server = settings.server
        parts = Parts(
            settings=settings,
            admins=AdminGate(server.admin_key, server.host),
            gate=gate,
            tasks=tasks,
            audits=audits,
            cache=cache,
            admission=Admission(
                lasting.metrics, max_requests=server.max_concurrency, max_bytes=server.max_held_bytes
            ),
            chat=ChatEndpoint(pipeline, gate, lasting.metrics, max_body_bytes=server.max_body_bytes),
            passthrough=Passthrough(
                teacher,
                gate,
                lasting.metrics,
                max_upload_bytes=server.max_upload_bytes,
                paths=server.pass_through,
            ),
            access_log=AccessLog(sample=settings.observe.access_log_sample),
            tracing=tracing,
        )
        return Generation(parts, stack.pop_all())


def audit_deadline_s(settings: Settings) -> float:
    """Say after how long no process can still be at an audit."""
    patience_s = 0.0 if _keeper_can_audit(settings) else WAITS_FOR_S
    return max(settings.teacher.timeout_s + _AUDIT_GRACE_S, patience_s)


def hand_over_audits(old: Parts, new: Parts) -> None:
    """Let new parts go on with the old ones' waiting audits, unless that showed a client's key to another teacher."""
    if not old.gate.client_keys or old.settings.teacher.base_url == new.settings.teacher.base_url:
        old.audits.hand_over(new.audits)


def _keeper_can_audit(settings: Settings) -> bool:
    """Say whether another process can finish an audit: not without the client's key, or what was asked."""
    own_key = bool(settings.server.api_keys) or settings.teacher_key() is not None
    return own_key and not settings.log.redact


def _cache(settings: Settings, metrics: Metrics, old: Parts | None) -> Kept[Cache]:
    """Go on with the old cache, unless its answers may be another teacher's or its settings others."""
    scope = cache_scope(settings.teacher)
    if (
        old is not None
        and old.settings.cache == settings.cache
        and cache_scope(old.settings.teacher) == scope
    ):
        return old.cache
    cache = Cache(settings.cache, metrics, scope=scope)
    return Kept(cache, cache.aclose)


def _teacher(
    settings: Settings, prices: PriceList, metrics: Metrics, stack: AsyncExitStack
) -> tuple[Teacher, Tracing | None]:
    """Build the teacher, what leads to it, and what traces requests there if that is wanted."""
    upstream = Upstream(settings.teacher.base_url, timeout_s=settings.teacher.timeout_s, max_connections=0)
    stack.push_async_callback(upstream.aclose)
    make_tracing, make_teacher = tracing_of(settings)
    tracing = None if make_tracing is None else make_tracing(settings.teacher.base_url)
    if tracing is not None:
        stack.push_async_callback(tracing.aclose)
    for requests in ("chat", "other"):
        metrics.record_breaker(requests, State.CLOSED)
    room = max(1, int(TEACHERS_SHARE * settings.server.max_concurrency))
    at_once = min(settings.teacher.max_concurrency, room)
    teacher = make_teacher(
        settings.teacher,
        upstream,
        settings.teacher_key(),
        prices,
        slots=Slots(at_once, waiting=min(at_once, room - at_once)),
        on_breaker=metrics.record_breaker,
        on_retry=metrics.record_retry,
    )
    return teacher, tracing


def _ledger(settings: Settings, lasting: Lasting, prices: PriceList) -> Ledger:
    return Ledger(
        lasting.event_log,
        lasting.metrics,
        prices,
        student_prices=StudentPrices(settings.student),
        teacher_model=settings.teacher.model,
        max_wait_s=settings.log.max_wait_s,
        redactor=Redactor(settings.log.redact) if settings.log.redact else None,
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
