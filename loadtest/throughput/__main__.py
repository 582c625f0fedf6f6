"""How many requests a second a gateway on one core answers, by the way they take through it.

The gateway is pinned to one core; its load and its teacher, which answers at once, are on another. The CPU time a
request takes is read from /proc and holds on a busy machine too; `--against CHECKOUT` measures another version of the
gateway in turns with this one.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import statistics
import tempfile
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import uvloop
from rich.console import Console
from rich.table import Table

from loadtest.demo import example
from loadtest.processes import cpu_seconds
from loadtest.throughput.hammer import Volley, fire
from loadtest.throughput.scene import BARE, SCENARIOS, Running, Scenario, Script, bare, gateway, teacher
from serving.recording import read_recording

_CONNECTIONS = 64
_ALONE = 300
_WARM_UP = 300


@dataclass(slots=True)
class Row:
    """What was measured of one way through one server, a value a round."""

    server: Running
    scenario: Scenario
    per_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)
    alone: list[Volley] = field(default_factory=list)
    together: list[Volley] = field(default_factory=list)
    odd: int = 0


async def measure(rows: list[Row], script: Script, *, rounds: int, requests: int) -> None:
    """Measure every row in turns, after a few requests that aren't counted."""
    for row in rows:
        await _shoot(row, script, _WARM_UP, _CONNECTIONS)
    for _ in range(rounds):
        for row in rows:
            row.alone.append(await _shoot(row, script, _ALONE, 1))
            before = cpu_seconds(row.server.pid)
            volley = await _shoot(row, script, requests, _CONNECTIONS)
            row.cpu_s.append((cpu_seconds(row.server.pid) - before) / requests)
            row.per_s.append(requests / volley.seconds)
            row.together.append(volley)


async def _shoot(row: Row, script: Script, count: int, connections: int) -> Volley:
    port = row.server.port
    requests = script.requests(row.scenario, port, count)
    if row.scenario.cached:
        await fire(port, requests[:1], b" 200 ", connections=1)
    volley = await fire(port, requests, row.scenario.expected, connections=connections)
    row.odd += volley.odd
    return volley


def show(rows: list[Row], console: Console) -> None:
    """Print the medians of the rounds."""
    table = Table(
        title=f"One core, distinct requests of about 330 bytes, {_CONNECTIONS} connections unless said"
    )
    table.add_column("server")
    for column in ("way", "requests/s", "CPU ms a request", "p50", "p99", "p50 at 1", "p99 at 1", "odd"):
        table.add_column(column, justify="left" if column == "way" else "right")
    for row in rows:
        table.add_row(
            row.server.name,
            row.scenario.name,
            f"{statistics.median(row.per_s):,.0f}",
            f"{statistics.median(row.cpu_s) * 1000:.3f}",
            *(
                f"{statistics.median(volley.quantile(share) for volley in volleys) * 1000:.2f} ms"
                for volleys in (row.together, row.alone)
                for share in (0.5, 0.99)
            ),
            str(row.odd),
        )
    console.print(table)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(prog="python -m loadtest.throughput", description=__doc__)
    parser.add_argument(
        "--recording", type=Path, help="messages with a teacher's answers (default: the examples)"
    )
    parser.add_argument(
        "--against", type=Path, metavar="CHECKOUT", help="another checkout to measure in turns"
    )
    parser.add_argument("--requests", type=int, default=5000, help="how many a measurement takes")
    parser.add_argument("--rounds", type=int, default=3, help="how often everything is measured")
    parser.add_argument("--only", help="measure the ways whose name holds this")
    options = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        parser.error("it takes two cores: one for the gateway, one for the load")
    console = Console(width=150)
    rows = read_recording(options.recording or example("parcels.csv")).rows
    chosen = [scenario for scenario in SCENARIOS if options.only is None or options.only in scenario.name]
    with contextlib.ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="understudy-bench-")))
        core = cores[0]
        os.sched_setaffinity(0, {cores[1]})
        teacher_url = stack.enter_context(teacher())
        servers = []
        for name, checkout in (("this", None), ("the other", options.against)):
            if name == "this" or checkout is not None:
                (work / name).mkdir()
                running = gateway(name, work / name, teacher_url, rows, checkout=checkout, core=core)
                servers.append(stack.enter_context(running))
        measured = [Row(server, scenario) for scenario in chosen for server in servers]
        if options.only is None:
            measured.insert(0, Row(stack.enter_context(bare(work, core=core)), BARE))
        uvloop.run(measure(measured, Script(rows), rounds=options.rounds, requests=options.requests))
    console.print(
        f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, "
        f"uvicorn {version('uvicorn')}, uvloop {version('uvloop')}; {len(rows):,} messages; "
        f"{options.rounds} rounds of {options.requests:,} requests, medians"
    )
    show(measured, console)


if __name__ == "__main__":
    main()
