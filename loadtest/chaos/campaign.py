"""`make chaos`: every fault in turn against a gateway under load, and a table of what came of it."""

from __future__ import annotations

import argparse
import asyncio
import os
import platform
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from loadtest.chaos.evidence import Finding, added, errors, logged, lost, recovery
from loadtest.chaos.faults import FAULTS, Fault
from loadtest.chaos.stage import Stage, staged
from loadtest.chaos.traffic import Receipt, Traffic, recorded
from loadtest.kills import Campaign, Victim, run_campaign
from loadtest.stack import stoppable
from serving.errors import UnderstudyError
from serving.exchange import Exchange

_MESSAGES = 60_000
_RATE = 60.0
_CALM_S = 2.5
_AFTER_S = 2.0
_PATIENCE_S = 15.0
_STEADY_S = 2.0

_VICTIMS: tuple[Victim, ...] = (
    *("worker", "worker", "keeper", "worker", "worker") * 2,
    *("worker", "supervisor"),
    *("worker", "worker", "keeper", "worker", "worker") * 2,
    *("worker", "everything"),
)
"""Who is killed in turn: starting a whole gateway again takes seconds, so it is done seldom."""

COLUMNS = ("fault", "requests", "failed", "wrong", "lost", "added p50", "added p99", "recovery")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the campaign; exit code 1 when anything was wrong or lost, 2 when it can't run."""
    parser = argparse.ArgumentParser(prog="python -m loadtest.chaos", description=__doc__)
    parser.add_argument("--only", metavar="TEXT", help="only the faults whose name holds this")
    parser.add_argument(
        "--rate", type=float, default=_RATE, help="requests per second (default: %(default)s)"
    )
    parser.add_argument(
        "--kills",
        type=int,
        default=200,
        metavar="N",
        help="processes to kill at the end (default: %(default)s)",
    )
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="leave logs and state there")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    options = parser.parse_args(arguments)
    faults = [fault for fault in FAULTS if not options.only or options.only.lower() in fault.name.lower()]
    with_kills = options.kills > 0 and not options.only
    if not faults:
        print(f"no fault's name holds {options.only!r}", file=sys.stderr)
        return 2
    console = Console()
    try:
        with stoppable(), tempfile.TemporaryDirectory(prefix="understudy-chaos-") as folder:
            work = options.keep or Path(folder)
            found = asyncio.run(campaign(work, faults, options.rate, console))
            if with_kills:
                print_table(found, console, markdown=options.markdown)  # the kills take minutes
                found.append(killed(work / "kills", options.kills, console))
    except KeyboardInterrupt:
        print("chaos: stopped", file=sys.stderr)
        return 130
    except (UnderstudyError, OSError) as error:
        print(f"chaos: {error}", file=sys.stderr)
        return 2
    print_table(found, console, markdown=options.markdown)
    for finding in found:
        if finding.note:
            console.print(f"{finding.fault}: clients saw {finding.note}", soft_wrap=True)
    console.print(
        f"{os.cpu_count()} cores, Python {platform.python_version()}, {options.rate:g} requests/s, 2 workers, "
        "a third of them repeats, two in five streamed",
        soft_wrap=True,
    )
    return 1 if any(finding.wrong or finding.unnoticed for finding in found) else 0


async def campaign(folder: Path, faults: Sequence[Fault], rate: float, console: Console) -> list[Finding]:
    """Run the faults one after another on one stage."""
    messages = recorded(_MESSAGES)
    measured = []
    async with staged(folder, messages) as stage:
        traffic = Traffic(stage.base_url, iter(messages))
        with Progress(console=console, transient=True) as progress:
            bar = progress.add_task("warming up", total=len(faults))
            await traffic.flow(rate, _CALM_S)
            for fault in faults:
                progress.update(bar, description=fault.name)
                measured.append(await suffer(stage, traffic, fault, fault.rate or rate))
                progress.advance(bar)
        await traffic.aclose()
    found = logged(stage.state_dir)
    return [judged(one, found) for one in measured]


def killed(folder: Path, kills: int, console: Console) -> Finding:
    """Kill workers, keeper, supervisor and all at once, at random moments; hold the log against the clients' ledger."""
    folder.mkdir()
    plan = Campaign(kills=kills, workers=4, pause_s=(0.05, 0.4), answers_between=8, victims=_VICTIMS)
    came = run_campaign(plan, folder, console)
    return Finding(
        fault=f"{kills} × SIGKILL: workers, keeper, supervisor, all",
        requests=came.asked,
        failed=came.failed,
        wrong=came.different,
        lost=came.lost + came.twice + came.damaged,
        added_p50_s=None,
        added_p99_s=None,
        recovery_s=max(seconds for victim in came.recovery_s.values() for seconds in victim),
        note=f"{came.failed} broken off",
    )


@dataclass(frozen=True, slots=True)
class Suffered:
    """What the clients saw before, during and after one fault; times are of the monotonic clock."""

    fault: Fault
    before: list[Receipt]
    during: list[Receipt]
    after: list[Receipt]
    ended: float
    back: float | None
    counted_lost: int


async def suffer(stage: Stage, traffic: Traffic, fault: Fault, rate: float) -> Suffered:
    """Send calm traffic, break something, mend it, and go on until everything is as it was."""
    await traffic.settle()
    traffic.receipts.clear()
    counted_before = await asyncio.to_thread(stage.counted_lost)
    began = time.monotonic()
    await traffic.flow(rate, _CALM_S)
    broken = time.monotonic()
    async with fault.breaking(stage, traffic):
        await traffic.flow(rate, fault.seconds)
    mended = time.monotonic()
    await traffic.flow(rate, _AFTER_S)
    while not _is_back(fault, traffic.receipts, mended) and time.monotonic() - mended < _PATIENCE_S:
        await traffic.flow(rate, 0.5)
    await traffic.settle()
    receipts = sorted(traffic.receipts, key=lambda receipt: receipt.began)
    return Suffered(
        fault,
        before=[receipt for receipt in receipts if began <= receipt.began < broken],
        during=[receipt for receipt in receipts if broken <= receipt.began < mended],
        after=[receipt for receipt in receipts if receipt.began >= mended],
        ended=mended,
        back=_back_after(fault, receipts, mended),
        counted_lost=await asyncio.to_thread(stage.counted_lost) - counted_before,
    )


def judged(suffered: Suffered, found: dict[str, list[Exchange]]) -> Finding:
    """Hold what the clients saw against the log."""
    everything = [*suffered.before, *suffered.during, *suffered.after]
    p50, p99 = added(suffered.before, suffered.during)
    return Finding(
        fault=suffered.fault.name,
        requests=len(everything),
        failed=sum(receipt.failed for receipt in everything),
        wrong=sum(receipt.wrong for receipt in everything),
        lost=lost(everything, found),
        counted=suffered.counted_lost,
        added_p50_s=p50,
        added_p99_s=p99,
        recovery_s=suffered.back,
        note=errors(everything),
    )


def _is_back(fault: Fault, receipts: Sequence[Receipt], mended: float) -> bool:
    """Say whether all has been well for a while: each worker finds out for itself that a fault is over."""
    back = _back_after(fault, receipts, mended)
    return back is not None and time.monotonic() - mended - back >= _STEADY_S


def _back_after(fault: Fault, receipts: Sequence[Receipt], mended: float) -> float | None:
    """Return when the last failure was over and the awaited route answered again, in seconds; None: not yet."""
    after = [receipt for receipt in receipts if receipt.began >= mended]
    last_failure = recovery(after, mended)
    answered = [
        receipt.ended - mended
        for receipt in after
        if receipt.content is not None and fault.awaited in ("", receipt.route)
    ]
    if not answered or not any(at >= last_failure for at in answered):
        return None
    return max(last_failure, min(answered) if fault.awaited else 0.0)


def print_table(found: Sequence[Finding], console: Console, *, markdown: bool) -> None:
    """Print the campaign's table."""
    console.print(written(found) if markdown else render(found), soft_wrap=True)


def render(found: Sequence[Finding]) -> Table:
    """Return the campaign's table for a terminal."""
    table = Table(title="What a fault does", title_justify="left", title_style="bold")
    for name in COLUMNS:
        table.add_column(name, justify="left" if name == "fault" else "right")
    for finding in found:
        cells = row(finding)
        bad = finding.wrong or finding.unnoticed
        table.add_row(*cells, style="red" if bad else None)
    return table


def written(found: Sequence[Finding]) -> str:
    """Return the campaign's table as it stands in the README."""
    lines = [f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS)]
    return "\n".join([*lines, *(f"| {' | '.join(row(finding))} |" for finding in found)])


def row(finding: Finding) -> list[str]:
    """Write a finding as the cells of its row."""
    return [
        finding.fault,
        f"{finding.requests:,}",
        f"{finding.failed:,}",
        f"{finding.wrong:,}",
        f"{finding.lost:,}" if not finding.lost or finding.unnoticed else f"{finding.lost:,}, all counted",
        _milliseconds(finding.added_p50_s),
        _milliseconds(finding.added_p99_s),
        "never" if finding.recovery_s is None else f"{finding.recovery_s:.1f} s",
    ]


def _milliseconds(seconds: float | None) -> str:
    return "–" if seconds is None else f"{seconds * 1000:+.1f} ms"
