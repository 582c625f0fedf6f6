"""What deciding costs: microseconds of CPU a decision, and a gateway's requests with and without a router.

Figures are of CPU time, which other processes on the machine disturb least.
"""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import orjson
from rich.table import Table

from distillation.simulated import SimulatedLearner, SimulatedRelease
from loadtest.processes import cpu_seconds
from loadtest.routing.runner import Runner
from loadtest.stack import Plan, Stack, running
from routers.confidence import SCORE, Confidence, Term
from routers.foresight import WIDTH, Foresight
from routers.meter import TokenMeter
from routers.router import Router
from routers.simulator import Message, simulate
from serving.errors import UnderstudyError
from serving.exchange import Json
from serving.recording import read_recording
from serving.releases import ReleaseStore
from serving.task_settings import TaskPolicy
from serving.upstream import Upstream

TASK, MODEL = "banking", "stand-in"
ROUNDS, CALLS = 7, 20_000
REQUESTS, CONNECTIONS = 1500, 16
_MESSAGES, _LEARN_EVERY = 1500, 250
_TOKENS = 24
_SWAP_S = 20.0


class NothingToMeasure(UnderstudyError):
    """The recording gave no release to measure with."""


@dataclass(frozen=True, slots=True)
class Spent:
    """What a gateway spent on a state's requests: medians over rounds.

    `cpu_s` is a request's share of the gateway's CPU time, `rate` requests a second, `p50_s` a client's wait.
    """

    cpu_s: float
    rate: float
    p50_s: float


def tables(runner: Runner) -> Iterator[Table]:
    """Learn a release in the simulator, time its decisions, and run it in a real gateway."""
    path = runner.data / "banking77_gpt4" / "stream.csv"
    messages = [Message(row.text, row.teacher or "", row.gold) for row in read_recording(path).rows]
    release = learned(messages[:_MESSAGES])
    texts = [message.text for message in messages[:200]]
    yield decisions_table(decisions(release, texts, max(200, round(CALLS * runner.scale))))
    requests = max(60, round(REQUESTS * runner.scale))
    yield gateway_table(gateway(path, release, texts, requests), requests)


def learned(messages: Sequence[Message]) -> SimulatedRelease:
    """The first release of a stream. Raises NothingToMeasure where there is none."""
    learner = SimulatedLearner(TaskPolicy(max_disagreement=0.1, certainty=0.9), seed=0)
    simulate(messages, learner, learn_every=_LEARN_EVERY, seed=0)
    if not learner.releases:
        raise NothingToMeasure(f"{len(messages)} messages gave no release; measure with more, or with others")
    return SimulatedRelease(learner.releases["r0001"])


def decisions(release: SimulatedRelease, texts: Sequence[str], calls: int) -> dict[str, float]:
    """Seconds of CPU for each step of a decision."""
    said = [release.predict(text) for text in texts]
    answer, score, signals = said[0]
    of_score = Router(Confidence.of_score(1.0, 0.0), 0.0)
    of_signals = Router(hinges(signals), 0.0)
    tokens = _tokens(_TOKENS)
    request: Json = {"model": MODEL, "messages": [{"role": "user", "content": texts[0]}]}
    meter = TokenMeter(request)
    for token in tokens:
        meter.add(*token)
    lm_signals = meter.signals()
    of_tokens = Router(hinges(lm_signals), 0.0)

    def add() -> None:
        taking = TokenMeter(request)
        for token in tokens:
            taking.add(*token)

    student = release.release.student
    # Its weights don't matter here, as long as there are as many.
    ahead = Foresight((0.1,) * WIDTH, 0.5, 1.0, 0.0, 0.1, 0.0)
    return {
        "decide by the score alone": cost(lambda: of_score.decide(score, {}, answer), calls),
        f"decide for a linear student, {len(signals) + 1} hinged signals": cost(
            lambda: of_signals.decide(score, signals, answer), calls
        ),
        f"decide for a language model, {len(lm_signals) + 1} hinged signals": cost(
            lambda: of_tokens.decide(score, lm_signals, answer), calls
        ),
        "read one token's log-probabilities (top 5)": cost(add, max(1, calls // _TOKENS)) / _TOKENS,
        f"signals of {_TOKENS} tokens at a checkpoint": cost(meter.signals, calls),
        "foresee an escalation, where there is something to foresee for": cost(
            lambda: ahead.skips(texts[0]), calls
        ),
        "the linear student's answer itself": cost(lambda: student.predict(texts[0]), max(1, calls // 20)),
    }


def hinges(signals: Mapping[str, float]) -> Confidence:
    """A confidence as large as they get: every signal in six pieces, and an offset for an answer."""
    knots = (-2.0, -1.0, 0.0, 1.0, 2.0)
    names = [SCORE, *sorted(signals)]
    return Confidence(tuple(Term(name, (0.1,) * 6, (0.0,) * 6, knots) for name in names), 0.5, {"other": 0.1})


def cost(step: Callable[[], object], calls: int) -> float:
    """Seconds of this thread's CPU time a call, the median of several rounds."""
    rounds = []
    for _ in range(ROUNDS):
        began = time.thread_time()
        for _ in range(calls):
            step()
        rounds.append((time.thread_time() - began) / calls)
    return statistics.median(rounds)


def _tokens(count: int) -> list[tuple[str, float, list[Json]]]:
    others: list[Json] = [{"token": f"t{rank}", "logprob": -0.05 - rank} for rank in range(5)]
    return [("t0", -0.05, others) for _ in range(count)]


def gateway(path: Path, release: SimulatedRelease, texts: Sequence[str], requests: int) -> dict[str, Spent]:
    """Run one gateway through its states in turn, several times over; what each state's requests cost."""
    router = release.router
    states = {
        "no release: the teacher answers": None,
        "escalated: student, router, then the teacher": replace(router, rank_threshold=1e9),
        "answered: student and router (audits are the teacher's)": replace(router, rank_threshold=-1e9),
    }
    with tempfile.TemporaryDirectory(prefix="understudy-cost-") as work:
        plan = Plan(path, Path(work), TASK, 0.1, 0.9, (2.5, 10.0), model=MODEL)
        with running(plan) as stack:
            store = ReleaseStore(stack.state_dir)
            names = {
                state: None
                if changed is None
                else store.write(
                    TASK, replace(release.release, router=changed).files(), {"student": "linear"}
                )
                for state, changed in states.items()
            }
            load = _Load(stack, texts)
            rounds: dict[str, list[Spent]] = {state: [] for state in states}
            for _ in range(3):
                for state, name in names.items():
                    store.set_live(TASK, name)
                    asyncio.run(load.until_live(name))
                    rounds[state].append(asyncio.run(load.spend(requests)))
    return {
        state: Spent(*(statistics.median(figures) for figures in zip(*map(_figures, measured), strict=True)))
        for state, measured in rounds.items()
    }


def _figures(spent: Spent) -> tuple[float, float, float]:
    return spent.cpu_s, spent.rate, spent.p50_s


class _Load:
    """Requests to a stack's gateway, no two of them alike, so that the cache has none."""

    def __init__(self, stack: Stack, texts: Sequence[str]) -> None:
        self._stack = stack
        self._texts = texts
        self._sent = 0
        self._gateway = stack.children[-1].pid

    async def until_live(self, release: str | None) -> None:
        """Return when the gateway decides by `release`. Raises StackError's kind if it doesn't."""
        upstream = Upstream(self._stack.base_url, timeout_s=30)
        try:
            deadline = time.monotonic() + _SWAP_S
            while await self._ask(upstream) != release:
                if time.monotonic() > deadline:
                    raise NothingToMeasure(f"the gateway hasn't taken in {release} within {_SWAP_S:.0f} s")
                await asyncio.sleep(0.05)
        finally:
            await upstream.aclose()

    async def spend(self, requests: int) -> Spent:
        """Send `requests` over 16 connections."""
        upstream = Upstream(self._stack.base_url, timeout_s=30)
        left = iter(range(requests))
        waits: list[float] = []

        async def client() -> None:
            for _ in left:
                asked = time.monotonic()
                await self._ask(upstream)
                waits.append(time.monotonic() - asked)

        try:
            before, began = cpu_seconds(self._gateway), time.monotonic()
            await asyncio.gather(*(client() for _ in range(CONNECTIONS)))
            elapsed, spent = time.monotonic() - began, cpu_seconds(self._gateway) - before
        finally:
            await upstream.aclose()
        return Spent(spent / requests, requests / elapsed, statistics.median(waits))

    async def _ask(self, upstream: Upstream) -> str | None:
        """Send one request; gives the release that decided on it."""
        self._sent += 1
        text = self._texts[self._sent % len(self._texts)]
        body = orjson.dumps(
            {"model": MODEL, "messages": [{"role": "user", "content": text}], "user": str(self._sent)}
        )
        headers = [("content-type", "application/json"), ("authorization", "Bearer unused")]
        async with await upstream.request(
            "POST", "/chat/completions", headers=headers, body=body
        ) as response:
            said = await response.read()
            if response.status != 200:
                raise NothingToMeasure(f"the gateway answered {response.status}: {said[:200]!r}")
            return dict(response.headers).get("x-understudy-release") or None


def decisions_table(spent: Mapping[str, float]) -> Table:
    """A row for each step."""
    table = Table(title="Cost of a decision", title_justify="left")
    table.add_column("")
    table.add_column("µs of CPU", justify="right")
    for name, seconds in spent.items():
        table.add_row(name, f"{seconds * 1e6:.1f}")
    return table


def gateway_table(spent: Mapping[str, Spent], requests: int) -> Table:
    """A row for each state of the gateway."""
    table = Table(
        title=f"Cost of a request: one worker, {CONNECTIONS} connections, medians of 3 × {requests:,} requests",
        title_justify="left",
    )
    for name in ("", "ms of the gateway's CPU", "requests/s", "p50"):
        table.add_column(name, justify="right" if name else "left")
    for state, one in spent.items():
        table.add_row(state, f"{one.cpu_s * 1e3:.2f}", f"{one.rate:,.0f}", f"{one.p50_s * 1e3:.1f} ms")
    return table
