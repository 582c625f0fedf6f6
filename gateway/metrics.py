"""Prometheus metrics: an own registry, bounded labels, one small method for each thing that happens.

No label value comes from a client: tasks are bounded by `server.max_tasks`, routes and reasons by the code,
releases by what is live. With several workers the values live in files that all share
(PROMETHEUS_MULTIPROC_DIR, which `serve` sets before a worker imports anything), so that counts are right
whichever worker is asked.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Literal, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest, multiprocess

from gateway import names
from gateway.tallies import Distribution, Tally
from serving.exchange import Json, Route
from serving.live import Cause
from serving.pool import OURS, Pool

NOWHERE = ""
"""The task and route of requests that were refused before they had one."""

CacheOutcome = Literal["bypass", "hit", "miss", "error", "joined"]
CachePut = Literal["stored", "refused", "dropped", "failed", "fenced"]

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_OVERHEAD = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5)
_USD = (1e-7, 1e-6, 1e-5, 5e-5, 1e-4, 5e-4, 1e-3, 5e-3, 1e-2, 5e-2, 0.1, 0.5, 1.0)
_AGES = (1.0, 5.0, 15.0, 60.0, 300.0, 900.0, 1800.0, 3600.0, 7200.0, 21600.0, 86400.0)
_SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.925, 0.95, 0.975, 0.99, 1.0)


class Metrics:
    """Everything the gateway counts."""

    def __init__(self) -> None:
        self._shared = "PROMETHEUS_MULTIPROC_DIR" in os.environ
        self._registry = CollectorRegistry()
        self._requests = self._tally(names.METRIC_REQUESTS, "Requests.", ("task", "route", "reason", "code"))
        self._duration = self._distribution(
            names.METRIC_DURATION, "From the request to the end of its answer.", ("task", "route"), _SECONDS
        )
        self._overhead = self._distribution(
            names.METRIC_OVERHEAD, "Time of the gateway itself: total minus waiting on models.", (), _OVERHEAD
        )
        self._first_token = self._histogram(
            names.METRIC_FIRST_TOKEN,
            "From a streamed request to its first frame.",
            ("task", "route"),
            _SECONDS,
        )
        self._tokens = self._tally(
            names.METRIC_TOKENS,
            "Tokens of the answers given, in the teacher's count.",
            ("task", "route", "kind"),
        )
        self._cost = self._tally(
            names.METRIC_COST,
            "What the requests cost; audits and repeats count with the requests they are of.",
            ("task", "route"),
        )
        self._request_cost = self._distribution(
            names.METRIC_REQUEST_COST, "What one request cost.", ("task", "route"), _USD
        )
        self._avoided = self._tally(
            names.METRIC_COST_AVOIDED,
            "What the teacher would have cost, minus what was spent.",
            ("task", "route"),
        )
        self._confidence = self._distribution(
            names.METRIC_CONFIDENCE, "Calibrated confidence of the student's answers.", ("task",), _SHARES
        )
        self._threshold = self._gauge(
            names.METRIC_THRESHOLD, "The confidence from which the student's answer is served.", ("task",)
        )
        self._student_answers = self._tally(
            names.METRIC_STUDENT_ANSWERS, "Answers of students, whether or not they were served.", ("task",)
        )
        self._student_tokens = self._tally(
            names.METRIC_STUDENT_TOKENS, "Output tokens of those answers.", ("task",)
        )
        self._student_device = self._tally(
            names.METRIC_STUDENT_DEVICE, "Seconds that what students run on worked for them.", ("task",)
        )
        self._spared = self._counter(
            names.METRIC_STUDENT_SPARED,
            "Time of the student's that skipping it spared, estimated.",
            ("task",),
        )
        self._hedges = self._counter(
            names.METRIC_HEDGES,
            "Teachers started beside the student, by what became of them.",
            ("task", "outcome"),
        )
        self._audits = self._counter(
            names.METRIC_AUDITS, "Audits of answers the student gave.", ("task", "outcome")
        )
        self._repeats = self._counter(
            names.METRIC_REPEATS, "Requests that the teacher was asked twice.", ("task", "outcome")
        )
        self._logged = self._tally(names.METRIC_LOGGED, "Exchanges made durable.", ("task",))
        self._lost = self._counter(names.METRIC_LOST, "Exchanges that could not be logged.", ("task",))
        self._late = self._counter(
            names.METRIC_LATE, "Answers that went out before their exchange was on disk.", ("task",)
        )
        self._upstream_errors = self._counter(
            names.METRIC_UPSTREAM_ERRORS, "Requests that an upstream failed on.", ("upstream", "kind")
        )
        self._server_up = self._gauge(
            names.METRIC_SERVER_UP, "1 while a server of student.vllm is there.", ("server",)
        )
        self._servers: frozenset[str] = frozenset()
        self._server_restarts = self._gauge(
            names.METRIC_SERVER_RESTARTS,
            "How often the vLLM that `serve --vllm` runs was started again.",
            ("server",),
        )
        self._breaker = Gauge(
            names.METRIC_BREAKER,
            "Whether the teacher is left alone: 0 no, 1 being tried again, 2 yes (the worst of the workers).",
            ("requests",),
            registry=self._registry,
            multiprocess_mode="livemax",
        )
        self._retries = self._counter(
            names.METRIC_RETRIES, "Retries at the teacher, by how they ended.", ("outcome",)
        )
        self._release = self._gauge(
            names.METRIC_RELEASE, "1 for the release that is live.", ("task", "release")
        )
        self._cache_requests = self._tally(
            names.METRIC_CACHE_REQUESTS, "What came of looking into the cache.", ("task", "outcome")
        )
        self._cache_age = self._histogram(
            names.METRIC_CACHE_AGE, "Age of the answers that came from the cache.", (), _AGES
        )
        self._cache_bytes = Gauge(
            names.METRIC_CACHE_BYTES,
            "Memory of the cache's first level, over all workers.",
            registry=self._registry,
            multiprocess_mode="livesum",
        )
        self._cache_puts = self._counter(
            names.METRIC_CACHE_PUTS, "What came of putting answers into the cache.", ("outcome",)
        )
        self._max_disagreement = self._gauge(
            names.METRIC_MAX_DISAGREEMENT, "α of the task's promise.", ("task",)
        )
        self._keeper_round = self._gauge(
            names.METRIC_KEEPER_ROUND, "When the keeper last came round, in seconds since the epoch.", ()
        )
        self._learning = self._counter(names.METRIC_LEARNING, "Runs of `understudy learn`.", ("outcome",))
        self._evidence = self._gauge(
            names.METRIC_WATCH_EVIDENCE, "Evidence that the live release breaks its promise.", ("task",)
        )
        self._evidence_limit = self._gauge(
            names.METRIC_WATCH_LIMIT, "The evidence at which the live release is withdrawn.", ("task",)
        )
        self._drift = self._gauge(
            names.METRIC_DRIFT,
            "Share of requests whose confidence isn't where it was in the test.",
            ("task",),
        )
        self._withdrawals = self._counter(
            names.METRIC_WITHDRAWALS, "Releases that the watch has withdrawn.", ("task", "cause")
        )
        self._request_series: dict[tuple[str, str, str, int], Counter] = {}
        self._duration_series: dict[tuple[str, str], Histogram] = {}
        self._spending_series: dict[tuple[str, str], tuple[Counter, Histogram, Counter]] = {}
        self._token_series: dict[tuple[str, str], tuple[Counter, Counter]] = {}
        self._confidence_series: dict[str, Histogram] = {}
        self._student_series: dict[str, tuple[Counter, Counter, Counter]] = {}
        self._logged_series: dict[str, Counter] = {}
        self._cache_series: dict[tuple[str, CacheOutcome], Counter] = {}
        self._put_series: dict[CachePut, Counter] = {}

    def record_request(self, task: str, route: str, reason: str, code: int, seconds: float) -> None:
        """Count a request that is over. A reason with a detail (`unsupported:tools`) counts without it."""
        key = (task, route, reason, code)
        counter = self._request_series.get(key)
        if counter is None:
            counter = self._requests.labels(task, route, reason.partition(":")[0], str(code))
            self._request_series[key] = counter
        counter.inc()
        histogram = self._duration_series.get((task, route))
        if histogram is None:
            histogram = self._duration_series[task, route] = self._duration.labels(task, route)
        histogram.observe(seconds)

    def record_overhead(self, seconds: float) -> None:
        """Note the time a request spent in the gateway itself."""
        self._overhead.observe(max(0.0, seconds))

    def record_first_token(self, task: str, route: Route, seconds: float) -> None:
        """Note how long a streaming client waited for the first frame."""
        self._first_token.labels(task, route).observe(seconds)

    def record_spending(self, task: str, route: Route, usd: float | None, avoided_usd: float | None) -> None:
        """Note what a request cost and what it saved; None where no price is known."""
        series = self._spending_series.get((task, route))
        if series is None:
            labels = (task, route)
            series = (
                self._cost.labels(*labels),
                self._request_cost.labels(*labels),
                self._avoided.labels(*labels),
            )
            self._spending_series[labels] = series
        if usd is not None:
            series[0].inc(usd)
            series[1].observe(usd)
        if avoided_usd is not None and avoided_usd > 0:
            series[2].inc(avoided_usd)

    def record_late_cost(self, task: str, route: Route, usd: float) -> None:
        """Count what a request cost after its answer: a student's that was finished for the log."""
        self._cost.labels(task, route).inc(max(0.0, usd))

    def record_tokens(self, task: str, route: Route, usage: Json | None) -> None:
        """Count the tokens of an answer by OpenAI's `usage`."""
        if usage is None:
            return
        series = self._token_series.get((task, route))
        if series is None:
            series = (
                self._tokens.labels(task, route, "input"),
                self._tokens.labels(task, route, "output"),
            )
            self._token_series[task, route] = series
        for kind, count in _counts(usage):
            series[kind == "output"].inc(count)

    def record_confidence(self, task: str, confidence: float) -> None:
        """Note how sure the student was, whoever answered in the end."""
        histogram = self._confidence_series.get(task)
        if histogram is None:
            histogram = self._confidence_series[task] = self._confidence.labels(task)
        histogram.observe(confidence)

    def record_student(
        self, task: str, *, answers: int, seconds: float, usage: Json | None, counted: Json | None
    ) -> None:
        """Count what a student has done since it was last counted: answers, and seconds of what it runs on.

        Its tokens are those of `usage` less those `counted` already.
        """
        series = self._student_series.get(task)
        if series is None:
            series = (
                self._student_answers.labels(task),
                self._student_device.labels(task),
                self._student_tokens.labels(task),
            )
            self._student_series[task] = series
        series[0].inc(answers)
        series[1].inc(max(0.0, seconds))
        series[2].inc(max(0, _output(usage) - _output(counted)))

    def record_spared(self, task: str, seconds: float) -> None:
        """Count a request that the student wasn't asked about, by the seconds it takes on average."""
        self._spared.labels(task).inc(seconds)

    def record_hedge(self, task: str, outcome: Literal["used", "dropped"]) -> None:
        """Count a teacher that was started beside the student."""
        self._hedges.labels(task, outcome).inc()

    def record_audit(
        self,
        task: str,
        agreed: bool | None,
        usd: float | None,
        usage: Json | None = None,
        route: Route = "student",
    ) -> None:
        """Count an audit that is over; `agreed` None: the teacher could not be had; `route`: what was audited.

        Its tokens have kinds of their own: they are no part of the answer the client got.
        """
        self._audits.labels(task, _outcome(agreed)).inc()
        if usd is not None:
            self._cost.labels(task, route).inc(usd)
        for kind, count in _counts(usage):
            self._tokens.labels(task, route, f"audit_{kind}").inc(count)

    def record_repeat(self, task: str, agreed: bool | None, usd: float | None, usage: Json | None) -> None:
        """Count a teacher that was asked twice, and what that cost; `agreed` None: it gave no second answer."""
        self._repeats.labels(task, _outcome(agreed)).inc()
        if usd is not None:
            self._cost.labels(task, "teacher").inc(usd)
        for kind, count in _counts(usage):
            self._tokens.labels(task, "teacher", f"repeat_{kind}").inc(count)

    def record_logged(self, task: str) -> None:
        """Count an exchange that is on disk."""
        counter = self._logged_series.get(task)
        if counter is None:
            counter = self._logged_series[task] = self._logged.labels(task)
        counter.inc()

    def record_lost(self, task: str) -> None:
        """Count an exchange that could not be logged."""
        self._lost.labels(task).inc()

    def record_late(self, task: str) -> None:
        """Count an answer that went out before its exchange was on disk."""
        self._late.labels(task).inc()

    def record_upstream_error(self, upstream: str, kind: str) -> None:
        """Count a failure of an upstream (`teacher`, `student`), by the kind of `UpstreamError`."""
        self._upstream_errors.labels(upstream, kind).inc()

    def record_servers(self, pool: Pool) -> None:
        """Note which of the students' servers are there; those that aren't wanted any more are no news."""
        states = pool.states()
        for server in self._servers - states.keys():
            self._forget(self._server_up, server)
            if server == OURS:
                self._forget(self._server_restarts, server)
        self._servers = frozenset(states)
        for server, is_up in states.items():
            self._server_up.labels(server).set(is_up)
        if OURS in states:
            self._server_restarts.labels(OURS).set(pool.restarts())

    def record_breaker(self, requests: str, state: int) -> None:
        """Note the state of the teacher's breaker for requests of a kind (`chat`, `other`)."""
        self._breaker.labels(requests).set(state)

    def record_retry(self, outcome: str) -> None:
        """Count a retry at the teacher, by how it ended."""
        self._retries.labels(outcome).inc()

    def record_cache(self, task: str, outcome: CacheOutcome) -> None:
        """Count one request by what the cache had for it; `joined`: the answer of one under way was shared."""
        counter = self._cache_series.get((task, outcome))
        if counter is None:
            counter = self._cache_series[task, outcome] = self._cache_requests.labels(task, outcome)
        counter.inc()

    def record_cache_age(self, seconds: float) -> None:
        """Note how old an answer from the cache was."""
        self._cache_age.observe(seconds)

    def record_cache_bytes(self, count: int) -> None:
        """Note how much memory the first level takes in this process."""
        self._cache_bytes.set(count)

    def record_cache_put(self, outcome: CachePut) -> None:
        """Count an answer that was put, by where it got to."""
        counter = self._put_series.get(outcome)
        if counter is None:
            counter = self._put_series[outcome] = self._cache_puts.labels(outcome)
        counter.inc()

    def record_live(
        self, task: str, release: str | None, previous: str | None, threshold: float | None
    ) -> None:
        """Note which release is live; None: withdrawn."""
        if previous is not None and previous != release:
            # A series can't be taken out of the files that workers share.
            if self._shared:
                self._release.labels(task, previous).set(0)
            else:
                self._release.remove(task, previous)
        if release is not None:
            self._release.labels(task, release).set(1)
        if threshold is not None:
            self._threshold.labels(task).set(threshold)
        elif previous is not None:
            self._threshold.labels(task).set(float("nan"))

    def record_promise(self, task: str, max_disagreement: float) -> None:
        """Note what a task with a live release promises."""
        self._max_disagreement.labels(task).set(max_disagreement)

    def record_watched(self, task: str) -> None:
        """Note that a release is watched from now on: an alert on withdrawals needs a count to begin with."""
        for cause in get_args(Cause):
            self._withdrawals.labels(task, cause)

    def record_evidence(self, task: str, evidence: float, limit: float) -> None:
        """Note what the watch has against the live release, and how much is enough."""
        self._evidence.labels(task).set(evidence)
        self._evidence_limit.labels(task).set(limit)

    def record_drift(self, task: str, distance: float) -> None:
        """Note how far the confidence of requests has moved from that of the test."""
        self._drift.labels(task).set(distance)

    def record_unwatched(self, task: str) -> None:
        """Note that no release is live, and none is watched."""
        self._evidence.labels(task).set(float("nan"))
        self._evidence_limit.labels(task).set(float("nan"))
        self._drift.labels(task).set(float("nan"))

    def record_withdrawal(self, task: str, cause: Cause) -> None:
        """Count a release that the watch has withdrawn."""
        self._withdrawals.labels(task, cause).inc()

    def record_keeper_round(self) -> None:
        """Note that the keeper did what must happen once."""
        self._keeper_round.set_to_current_time()

    def record_learning(self, outcome: Literal["ended", "failed"]) -> None:
        """Count a run of `understudy learn`, whether or not it released something."""
        self._learning.labels(outcome).inc()

    def exposition(self) -> bytes:
        """Write everything in Prometheus's text format."""
        if not self._shared:
            return generate_latest(self._registry)
        registry = CollectorRegistry()
        multiprocess.MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        return generate_latest(registry)

    def _counter(self, name: str, text: str, labels: Sequence[str]) -> Counter:
        return Counter(name, text, labels, registry=self._registry)

    def _histogram(self, name: str, text: str, labels: Sequence[str], buckets: Sequence[float]) -> Histogram:
        return Histogram(name, text, labels, buckets=buckets, registry=self._registry)

    def _tally(self, name: str, text: str, labels: Sequence[str]) -> Counter:
        """Make a counter that every request increases, always in the event loop."""
        kind = Counter if self._shared else Tally
        return kind(name, text, labels, registry=self._registry)

    def _distribution(
        self, name: str, text: str, labels: Sequence[str], buckets: Sequence[float]
    ) -> Histogram:
        """Make a histogram that every request adds to, always in the event loop."""
        kind = Histogram if self._shared else Distribution
        return kind(name, text, labels, buckets=buckets, registry=self._registry)

    def _forget(self, gauge: Gauge, *labels: str) -> None:
        """Take a series out; out of the files that workers share it can't be, and says nothing there."""
        if self._shared:
            gauge.labels(*labels).set(float("nan"))
        else:
            gauge.remove(*labels)

    def _gauge(self, name: str, text: str, labels: Sequence[str]) -> Gauge:
        return Gauge(name, text, labels, registry=self._registry, multiprocess_mode="mostrecent")


def _outcome(agreed: bool | None) -> str:
    return "missing" if agreed is None else "agreed" if agreed else "disagreed"


def _output(usage: Json | None) -> int:
    count = usage.get("completion_tokens") if usage is not None else None
    return count if isinstance(count, int) and count > 0 else 0


def _counts(usage: Json | None) -> list[tuple[str, int]]:
    """Return the tokens of OpenAI's `usage` by kind, as far as they are numbers."""
    found = []
    for kind, name in (("input", "prompt_tokens"), ("output", "completion_tokens")):
        count = usage.get(name) if usage is not None else None
        if isinstance(count, int) and count > 0:
            found.append((kind, count))
    return found
