"""`understudy replay`: recorded traffic as real requests through a gateway, and what that showed.

Time is compressed: requests follow each other at once, and with `learn_every` the real `understudy learn`
runs after every so many of them. By default sending waits for it, since a few seconds of learning would
otherwise see half of the stream go by, and since runs then repeat; with `wait=False` traffic goes on
meanwhile, as it does in life.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.error import URLError

import openai
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console

from loadtest.learner import Lesson, learn
from loadtest.progress import Progress
from loadtest.results import Results, summarise
from loadtest.stack import Stack
from loadtest.traffic import Outcome, Sender
from serving.agreement import comparison
from serving.configuration import load_settings
from serving.errors import ConfigError, UnderstudyError
from serving.exchange import Exchange
from serving.log import LogReader
from serving.recording import Recorded
from serving.releases import ReleaseStore
from serving.task_settings import AgreementChoice

_SETTLE_S = 10.0

_OUTCOMES = {"held": "no level passed yet", "not_due": "no look is due"}
"""What `learn` came to, where its own word says little."""


@dataclass(frozen=True, slots=True)
class Target:
    """The gateway that gets the traffic.

    `base_url` ends in `/v1`. `config` is its configuration file; without it nothing can be learned, and
    audits are known from the metrics only. `own_stack` is set for a gateway that we started ourselves.
    """

    base_url: str
    model: str
    api_key: str
    task: str | None = None
    config: Path | None = None
    own_stack: Stack | None = None


@dataclass(frozen=True, slots=True)
class Replay:
    """What is sent and how.

    `seed_rows` are sent first and not counted. `learn_every` 0: never learn. `max_disagreement` is the α of
    the floor in the table.
    """

    rows: Sequence[Recorded]
    seed_rows: Sequence[Recorded] = ()
    system_prompt: str | None = None
    concurrency: int = 4
    learn_every: int = 0
    wait: bool = True
    max_disagreement: float = 0.05


@dataclass(slots=True)
class _Run:
    """The state of one replay. `state_dir` is the gateway's, None when it can't be known."""

    outcomes: list[Outcome] = field(default_factory=list)
    lessons: list[Lesson] = field(default_factory=list)
    interrupted: bool = False
    task: str | None = None
    state_dir: Path | None = None


def order(rows: Sequence[Recorded], *, seed: int | None, limit: int | None) -> list[Recorded]:
    """Return the first `limit` rows in the order of sending: shuffled by `seed`; None keeps the file's."""
    ordered = list(rows)
    if seed is not None:
        random.Random(seed).shuffle(ordered)
    return ordered if limit is None else ordered[:limit]


def replay(target: Target, plan: Replay, console: Console) -> Results:
    """Send everything and return what it showed. Ctrl-C ends it early: the results say so.

    Raises ConfigError for what can't be run, StackError when our own gateway died.
    """
    if plan.learn_every and target.config is None:
        raise ConfigError("--learn-every needs --config, the configuration file of the gateway at --base-url")
    run = _Run(task=target.task)
    agreement = AgreementChoice()
    if target.own_stack is not None:
        run.state_dir = target.own_stack.state_dir
    elif target.config is not None:
        settings = load_settings(target.config)
        run.state_dir = settings.state_dir
        agreement = settings.for_task(target.task or "replay").agreement
    compare = comparison(agreement)
    audits_before = _audits(target.base_url)
    began = time.monotonic()
    asyncio.run(_drive(target, plan, run, Progress(console, len(plan.rows), compare)))
    seconds = time.monotonic() - began
    exchanges = _settled(run)
    audits_after = _audits(target.base_url)
    if target.own_stack is not None:
        target.own_stack.check()
    return summarise(
        run.outcomes,
        compare=compare,
        exchanges=exchanges,
        audits=None if audits_before is None or audits_after is None else audits_after - audits_before,
        oracle_share=_floor(run, plan, console) if plan.learn_every else None,
        lessons=run.lessons,
        seconds=seconds,
        interrupted=run.interrupted,
    )


def _floor(run: _Run, plan: Replay, console: Console) -> float | None:
    with console.status("finding the floor: the best threshold in hindsight …"):
        return oracle_share(
            [outcome.row.text for outcome in run.outcomes],
            [outcome.row.teacher or "" for outcome in run.outcomes],
            plan.max_disagreement,
        )


def oracle_share(texts: Sequence[str], answers: Sequence[str], max_disagreement: float) -> float | None:
    """Return the floor for this stream, or None when it can't be said.

    It is the share of teacher calls (0 to 1) that the same student would have needed with its threshold known
    in hindsight and no audits; `texts` and the teacher's `answers` are in the order of the stream.
    """
    from distillation.simulated import oracle
    from routers.simulator import Message

    if len(set(answers)) < 2:
        return None
    messages = [Message(text, answer) for text, answer in zip(texts, answers, strict=True)]
    floor = oracle(messages, max_disagreement)
    return floor.teacher_share if floor is not None else None


async def _drive(target: Target, plan: Replay, run: _Run, progress: Progress) -> None:
    """Send the stream in stretches of `learn_every`, learning after each."""
    loop = asyncio.get_running_loop()
    main = asyncio.current_task()
    assert main is not None  # noqa: S101 - a coroutine always runs in a task
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        loop.add_signal_handler(number, main.cancel)
    try:
        async with openai.AsyncOpenAI(
            base_url=target.base_url, api_key=target.api_key, max_retries=0
        ) as client:
            sender = Sender(client, target.model, target.task, plan.system_prompt)
            with progress:
                await _send_all(sender, target, plan, run, progress)
    except asyncio.CancelledError:
        run.interrupted = True
    finally:
        for number, handler in before.items():
            loop.remove_signal_handler(number)
            signal.signal(number, handler)


async def _send_all(sender: Sender, target: Target, plan: Replay, run: _Run, progress: Progress) -> None:
    def count(outcome: Outcome) -> None:
        run.outcomes.append(outcome)
        run.task = run.task or outcome.task
        progress.add(outcome)
        if outcome.choices is None and target.own_stack is not None:
            target.own_stack.check()

    def note(outcome: Outcome) -> None:
        run.task = run.task or outcome.task
        if outcome.error is not None:
            raise UnderstudyError(f"a row of the seed file failed: {outcome.error}")

    lesson: asyncio.Task[None] | None = None
    try:
        if plan.seed_rows:
            await sender.send(plan.seed_rows, concurrency=plan.concurrency, report=note)
            if plan.learn_every:
                await _learn(target, run, progress, after=0)
        stretch = plan.learn_every or len(plan.rows)
        for start in range(0, len(plan.rows), stretch):
            await sender.send(plan.rows[start : start + stretch], concurrency=plan.concurrency, report=count)
            sent = min(start + stretch, len(plan.rows))
            if not plan.learn_every or sent == len(plan.rows):
                continue
            if lesson is not None and not lesson.done():
                continue  # the last one isn't over yet; two at once would fight over the release
            lesson = asyncio.create_task(_learn(target, run, progress, after=sent))
            if plan.wait:
                await lesson
        if lesson is not None:
            await lesson
    finally:
        if lesson is not None:
            lesson.cancel()


async def _learn(target: Target, run: _Run, progress: Progress, *, after: int) -> None:
    """Run one lesson, and return when the gateway serves what came of it."""
    if target.config is None or run.state_dir is None:
        return
    await asyncio.to_thread(_settled, run)
    progress.learning(f"learning from {after:,} requests")
    lesson = await learn(target.config, run.task, after=after, own_stack=target.own_stack is not None)
    run.lessons.append(lesson)
    release = None
    if run.task is not None and lesson.error is None:
        live = ReleaseStore(run.state_dir).live(run.task)
        release = live.release if live is not None else None
    if release is not None:
        await asyncio.to_thread(_wait_for_release, target.base_url, run.task, release)
    said = lesson.error or (f"live release {release}" if release else _unreleased(lesson))
    progress.learning(f"after {after:,} requests, {lesson.seconds:.1f} s: {said}")


def _unreleased(lesson: Lesson) -> str:
    """Say of every task what `learn` came to, where nothing is live or no task was named."""
    tasks = (lesson.report or {}).get("tasks") or []
    said = [f"{one['task']}: {_OUTCOMES.get(one['outcome'], one['outcome'])}" for one in tasks]
    return ", ".join(said) or "nothing to learn"


def _settled(run: _Run) -> list[Exchange]:
    """Return the task's log once no audit of it is pending, or as it is after ten seconds."""
    if run.task is None or run.state_dir is None:
        return []
    reader = LogReader(run.state_dir)
    deadline = time.monotonic() + _SETTLE_S
    while True:
        exchanges = reader.exchanges(run.task).exchanges
        if time.monotonic() > deadline or not any(exchange.audit_owed for exchange in exchanges):
            return exchanges
        time.sleep(0.2)


def _wait_for_release(base_url: str, task: str | None, release: str) -> None:
    """Return when the gateway's metrics show the release, or after ten seconds."""
    deadline = time.monotonic() + _SETTLE_S
    while time.monotonic() < deadline:
        with contextlib.suppress(URLError, OSError):
            for labels, value in _samples(base_url, "understudy_release_info"):
                if value and (labels.get("task"), labels.get("release")) == (task, release):
                    return
        time.sleep(0.1)


def _audits(base_url: str) -> int | None:
    """Return how many audits the gateway has counted so far; None when it doesn't say."""
    try:
        return int(sum(value for _, value in _samples(base_url, "understudy_audits_total")))
    except (URLError, OSError, ValueError):
        return None


def _samples(base_url: str, name: str) -> Iterator[tuple[dict[str, str], float]]:
    url = f"{base_url.rstrip('/').removesuffix('/v1')}/metrics"
    with urllib.request.urlopen(url, timeout=5.0) as response:  # noqa: S310 - the gateway's own URL
        text = response.read().decode()
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name == name:
                yield sample.labels, sample.value
