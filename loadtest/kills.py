"""Kill a gateway again and again under load, and see whether its log holds what its clients were given.

The clients keep a ledger of their own: what they asked, and the answer once they had all of it (a stream: up to
`[DONE]`). Workers, the keeper, the supervisor, or everything at once get SIGKILL at random moments. Afterwards each
answer in the ledger has to be in the folded log: once, and the same. Every question is asked once, every answer is
unique, and nothing is repeated, so that nothing can make up for what is lost.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import random
import signal
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

import openai
from rich.console import Console
from rich.table import Table

from loadtest.processes import find_processes, is_running
from loadtest.stack import (
    KEY_VARIABLE,
    Child,
    Plan,
    StackError,
    configuration,
    start_gateway,
    start_stand_in,
    stoppable,
)
from serving.exchange import Exchange, Json
from serving.log import LogReader, seal_abandoned
from serving.recording import Recorded, Recording

Victim = Literal["worker", "keeper", "supervisor", "everything"]

_VICTIMS: dict[Victim, int] = {"worker": 6, "keeper": 2, "supervisor": 1, "everything": 1}
"""Who is killed how often, relatively."""

_MODEL = "stand-in"
_TASK = "kills"
_GONE_WITHIN_S = 60.0
_QUESTIONS_PER_S = 600


@dataclass(frozen=True, slots=True, kw_only=True)
class Campaign:
    """How to go about it.

    A kill comes `pause_s` seconds (at random, between the two) after the last one has been got over, and not before
    `answers_between` answers have come since: killing a gateway that does nothing shows nothing. `victims` are killed
    in turn; without them it is random who is.
    """

    kills: int
    seed: int = 1
    workers: int = 2
    clients: int = 12
    pause_s: tuple[float, float] = (0.2, 0.7)
    answers_between: int = 20
    victims: tuple[Victim, ...] = ()


@dataclass(slots=True)
class Casualties:
    """What came of it. `recovery_s` has for every kill the time until an answer to a question asked after it.

    `received` are complete answers. Of these, `lost` aren't in the log, `twice` are there more than once, and
    `different` say something else there. `damaged` are lines that can't be read once everything is sealed.
    """

    kills: Counter[str] = field(default_factory=Counter)
    asked: int = 0
    received: int = 0
    failed: int = 0
    logged: int = 0
    lost: int = 0
    twice: int = 0
    different: int = 0
    damaged: int = 0
    seconds: float = 0.0
    recovery_s: dict[str, list[float]] = field(default_factory=dict)

    @property
    def clean(self) -> bool:
        """Whether every answer that was received is in the log, once and readable."""
        return not (self.lost or self.twice or self.different or self.damaged)

    def to_json(self) -> Json:
        """The whole as plain JSON."""
        return {**asdict(self), "clean": self.clean}


class _Clients:
    """Clients that ask one question after the other, and the ledger they keep."""

    def __init__(self, base_url: str, questions: Iterator[int]) -> None:
        self.ledger: dict[int, str] = {}
        self.asked = 0
        self.failed = 0
        self.latest_asked_s = -math.inf
        """When the youngest question that has an answer was asked."""
        self._questions = questions
        self._client = openai.AsyncOpenAI(
            base_url=base_url,
            api_key="unused",
            max_retries=0,
            timeout=30.0,
            # A connection each, so that every worker gets its share.
            default_headers={"connection": "close"},
        )

    async def work(self) -> None:
        """Ask until cancelled. Raises StackError when the questions run out."""
        for number in self._questions:
            began = time.monotonic()
            self.asked += 1
            try:
                answer = await (self._streamed(number) if number % 2 else self._whole(number))
            except Exception:  # of whichever HTTP library the openai package uses
                answer = None  # killed in the middle of it
            if answer is None:
                self.failed += 1
                await asyncio.sleep(0.02)
            else:
                self.ledger[number] = answer
                self.latest_asked_s = max(self.latest_asked_s, began)
        raise StackError("the campaign took so long that it ran out of questions; ask for fewer kills")

    async def aclose(self) -> None:
        """Close what connections are left."""
        await self._client.close()

    async def _whole(self, number: int) -> str | None:
        completion = await self._client.chat.completions.create(
            model=_MODEL,
            messages=[{"role": "user", "content": _question(number)}],
            extra_headers={"x-request-id": _request_id(number)},
        )
        return completion.choices[0].message.content

    async def _streamed(self, number: int) -> str | None:
        """The text of a stream; None if it ended without `[DONE]`."""
        text = ""
        async with self._client.chat.completions.with_streaming_response.create(
            model=_MODEL,
            messages=[{"role": "user", "content": _question(number)}],
            stream=True,
            extra_headers={"x-request-id": _request_id(number)},
        ) as response:
            async for line in response.iter_lines():
                data = line.removeprefix("data: ")
                if data == "[DONE]":
                    return text
                if data:
                    for choice in json.loads(data).get("choices", ()):
                        text += choice["delta"].get("content") or ""
        return None


class _Gateway:
    """The gateway that is killed: always at the same address, started again when nobody is left."""

    def __init__(self, config: Path, state_dir: Path, work: Path, workers: int) -> None:
        self.state_dir = state_dir
        self._config = config
        self._work = work
        self._workers = workers
        self._starts = 0
        self._port = 0
        self.base_url = ""
        self._child = self._start()

    def kill(self, victim: Victim) -> Victim:
        """Kill, and start again what nobody else does; gives who was killed in the end."""
        found = find_processes(self._child.pid, self.state_dir)
        if victim == "keeper" and found.keeper is not None:
            _kill(found.keeper)
        elif victim == "everything":
            self._child.kill(whole_session=True)
            self._child = self._start()
        elif victim == "supervisor" or not found.workers:
            victim = "supervisor"
            self._child.kill()
            deadline = time.monotonic() + _GONE_WITHIN_S
            while any(is_running(pid) for pid in found.workers):
                if time.monotonic() > deadline:
                    raise StackError(f"workers outlived their supervisor by {_GONE_WITHIN_S:.0f} s")
                time.sleep(0.01)
            self._child = self._start()
        else:
            victim = "worker"
            _kill(random.choice([pid for pid in found.workers if pid != found.keeper] or found.workers))
        return victim

    def stop(self) -> None:
        self._child.stop()

    def destroy(self) -> None:
        """Leave nothing behind, whatever happened."""
        self._child.kill(whole_session=True)

    def _start(self) -> Child:
        self._starts += 1
        log = self._work / f"gateway-{self._starts}.log"
        child, self.base_url = start_gateway(
            self._config, log, "--workers", str(self._workers), "--port", str(self._port)
        )
        self._port = urlsplit(self.base_url).port or 0
        return child


def run_campaign(campaign: Campaign, work: Path, console: Console) -> Casualties:
    """Run it in the empty folder `work`, which keeps the log. Raises StackError when something won't start."""
    count = math.ceil(campaign.kills * (campaign.pause_s[1] + 2.0) * _QUESTIONS_PER_S) + 1000
    recording = work / "recording.jsonl"
    Recording(recording, tuple(Recorded(_question(n), _answer(n)) for n in range(count))).write(recording)
    options = ["--model", _MODEL, "--latency-ms", "20", "--api-key-env", KEY_VARIABLE]
    stand_in, stand_in_url = start_stand_in(recording, work / "stand-in.log", *options)
    try:
        plan = Plan(
            recording=recording,
            work=work,
            task=_TASK,
            max_disagreement=0.05,
            certainty=0.9,
            price=(1.0, 1.0),
            model=_MODEL,
        )
        state_dir, config = work / "state", work / "understudy.toml"
        config.write_text(configuration(plan, stand_in_url, state_dir), encoding="utf-8")
        gateway = _Gateway(config, state_dir, work, campaign.workers)
        try:
            casualties, ledger = asyncio.run(_kill_under_load(campaign, gateway, range(count), console))
            gateway.stop()
        finally:
            gateway.destroy()
    finally:
        stand_in.stop()
    seal_abandoned(state_dir)
    _compare(ledger, state_dir, casualties)
    return casualties


async def _kill_under_load(
    campaign: Campaign, gateway: _Gateway, questions: range, console: Console
) -> tuple[Casualties, dict[int, str]]:
    random.seed(campaign.seed)
    casualties = Casualties()
    clients = _Clients(gateway.base_url, iter(questions))
    began = time.monotonic()
    working = [asyncio.create_task(clients.work()) for _ in range(campaign.clients)]
    try:
        for number in range(1, campaign.kills + 1):
            await asyncio.sleep(random.uniform(*campaign.pause_s))
            await _answers(clients, len(clients.ledger) + campaign.answers_between, working)
            (victim,) = random.choices(list(_VICTIMS), list(_VICTIMS.values()))
            if campaign.victims:
                victim = campaign.victims[(number - 1) % len(campaign.victims)]
            killed_s = time.monotonic()
            # In a thread: the clients go on asking while nobody is there.
            killed = await asyncio.to_thread(gateway.kill, victim)
            casualties.kills[killed] += 1
            while clients.latest_asked_s < killed_s:
                await _answers(clients, len(clients.ledger) + 1, working)
            casualties.recovery_s.setdefault(killed, []).append(time.monotonic() - killed_s)
            if number % 10 == 0 or number == campaign.kills:
                console.print(
                    f"{number} kills, {len(clients.ledger):,} answers received, {clients.failed:,} broken off"
                )
    finally:
        for task in working:
            task.cancel()
        await asyncio.wait(working)
        await clients.aclose()
    casualties.asked, casualties.failed = clients.asked, clients.failed
    casualties.received = len(clients.ledger)
    casualties.seconds = time.monotonic() - began
    return casualties, clients.ledger


async def _answers(clients: _Clients, count: int, working: list[asyncio.Task[None]]) -> None:
    """Return once there are so many answers. Raises what ended a client, and StackError if none come."""
    deadline = time.monotonic() + _GONE_WITHIN_S
    while len(clients.ledger) < count:
        for task in working:
            if task.done():
                task.result()
        if time.monotonic() > deadline:
            raise StackError(f"no answers came for {_GONE_WITHIN_S:.0f} s after a kill")
        await asyncio.sleep(0.005)


def _compare(ledger: dict[int, str], state_dir: Path, casualties: Casualties) -> None:
    """Count what of the ledger the log doesn't hold."""
    result = LogReader(state_dir).exchanges(_TASK)
    found: dict[str, list[Exchange]] = {}
    for exchange in result.exchanges:
        found.setdefault(exchange.request_id, []).append(exchange)
    casualties.logged = len(result.exchanges)
    casualties.damaged = result.damaged + result.unknown
    for number, answer in ledger.items():
        exchanges = found.get(_request_id(number), [])
        casualties.lost += not exchanges
        casualties.twice += len(exchanges) > 1
        casualties.different += any(_text(exchange) != answer for exchange in exchanges)


def _text(exchange: Exchange) -> str | None:
    match exchange.teacher.choices if exchange.teacher is not None else None:
        case [{"message": {"content": str(text)}}]:
            return text
    return None


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def _question(number: int) -> str:
    return f"what is the answer to question {number}?"


def _answer(number: int) -> str:
    return f"the answer to {number} is {number * 7919 + 13}"


def _request_id(number: int) -> str:
    return f"kill-{number}"


def show(casualties: Casualties, console: Console) -> None:
    """Print what came of it as a table."""
    table = Table(title=f"{casualties.kills.total()} kills in {casualties.seconds:.0f} s")
    for column in ("killed", "times", "back after (median)", "at the most"):
        table.add_column(column, justify="left" if column == "killed" else "right")
    for victim, seconds in sorted(casualties.recovery_s.items()):
        table.add_row(
            victim,
            str(casualties.kills[victim]),
            f"{statistics.median(seconds):.2f} s",
            f"{max(seconds):.2f} s",
        )
    console.print(table)
    console.print(
        f"{casualties.received:,} answers received, {casualties.failed:,} broken off; of those received "
        f"{casualties.lost} lost, {casualties.twice} twice, {casualties.different} different in the log; "
        f"{casualties.damaged} damaged lines"
    )


def main() -> int:
    """Run the campaign; exit code 1 if the log isn't what the clients received."""
    parser = argparse.ArgumentParser(prog="python -m loadtest.kills", description=__doc__)
    parser.add_argument("--kills", type=int, default=200, help="how many processes to kill")
    parser.add_argument("--workers", type=int, default=2, help="workers of the gateway")
    parser.add_argument("--seed", type=int, default=1, help="who is killed, and when")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    campaign = Campaign(kills=options.kills, workers=options.workers, seed=options.seed)
    with stoppable(), tempfile.TemporaryDirectory(prefix="understudy-kills-") as work:
        casualties = run_campaign(campaign, Path(work), Console(stderr=True))
    if options.json:
        print(json.dumps(casualties.to_json()))
    else:
        show(casualties, Console())
    return 0 if casualties.clean else 1


if __name__ == "__main__":
    raise SystemExit(main())
