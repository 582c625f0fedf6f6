"""The promise on a recorded stream, many times over: `make bench-routing`.

Each seed shuffles the recording and plays it from a cold start through the simulator, which decides and learns by the
gateway's own code. The first seeds also get the floor: one threshold chosen by hindsight for the same student.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from distillation.simulated import SimulatedLearner, oracle
from routers.promise import binomial_tail
from routers.simulator import Kept, Message, simulate
from serving.recording import read_recording
from serving.settings import TaskPolicy


@dataclass(frozen=True, slots=True)
class Seed:
    """One shuffled stream: shares of teacher calls, accuracy by gold, releases by hindsight, and the floor."""

    seed: int
    share: float
    last: float
    accuracy: float
    teacher_accuracy: float
    releases: list[Kept]
    looks: int
    floor: float | None
    floor_last: float | None
    floor_accuracy: float | None


def play(path: Path, seed: int, max_disagreement: float, certainty: float, floor: bool) -> Seed:
    """Simulate one seed; `floor` also computes the oracle's share."""
    messages = [Message(row.text, row.teacher or "", row.gold) for row in read_recording(path).rows]
    random.Random(seed).shuffle(messages)
    policy = TaskPolicy(max_disagreement=max_disagreement, certainty=certainty)
    learner = SimulatedLearner(policy, seed=1000 * seed)
    run = simulate(messages, learner, learn_every=50, seed=seed)
    best = oracle(messages, max_disagreement) if floor else None
    return Seed(
        seed=seed,
        share=run.teacher_share(),
        last=run.teacher_share(1000),
        accuracy=_accuracy([one.answer for one in run.served], messages),
        teacher_accuracy=_accuracy([message.teacher for message in messages], messages),
        releases=run.releases,
        looks=len(learner.looks),
        floor=best.teacher_share if best else None,
        floor_last=best.last_share if best else None,
        floor_accuracy=_accuracy(best.answers, messages) if best else None,
    )


def _accuracy(answers: Sequence[str], messages: Sequence[Message]) -> float:
    return sum(answer == message.gold for answer, message in zip(answers, messages, strict=True)) / len(
        messages
    )


def table_of(seeds: Sequence[Seed], max_disagreement: float, certainty: float) -> Table:
    """The figures of all seeds, as means, with the one-sided test of the promise."""
    floored = [seed for seed in seeds if seed.floor is not None]
    releases = [kept for seed in seeds for kept in seed.releases if kept.answered]
    broken = sum(kept.disagreement > max_disagreement for kept in releases)
    delta = 1.0 - certainty
    table = Table(
        title=f"α = {max_disagreement:.0%}, δ = {delta:.0%}, {len(seeds)} seeds", title_justify="left"
    )
    table.add_column("")
    table.add_column("mean", justify="right")
    table.add_column("5–95 % of seeds", justify="right")

    def row(name: str, values: Sequence[float]) -> None:
        if values:
            low, high = np.quantile(values, [0.05, 0.95])
            table.add_row(name, f"{statistics.fmean(values):.2%}", f"{low:.1%} – {high:.1%}")

    row("calls to the teacher, audits included", [seed.share for seed in seeds])
    row("  of the last 1,000 requests", [seed.last for seed in seeds])
    row(f"the floor, by hindsight ({len(floored)} seeds)", [seed.floor for seed in floored if seed.floor])
    row("  of the last 1,000 requests", [seed.floor_last for seed in floored if seed.floor_last])
    if floored:
        ratios = [seed.share / seed.floor for seed in floored if seed.floor]
        table.add_row("calls as a multiple of the floor, same seeds", f"{statistics.fmean(ratios):.2f} ×", "")
    row("right, by the gold answers", [seed.accuracy for seed in seeds])
    row("  the floor's", [seed.floor_accuracy for seed in floored if seed.floor_accuracy])
    row("  the teacher's own", [seed.teacher_accuracy for seed in seeds])
    table.add_section()
    table.add_row("releases a stream", f"{len(releases) / len(seeds):.1f}", "")
    table.add_row("looks a stream", f"{statistics.fmean(seed.looks for seed in seeds):.1f}", "")
    row("disagreement of a release on the rest", [kept.disagreement for kept in releases])
    if releases:
        # P(X ≥ broken) for X ~ Binomial(releases, δ): small would mean that the promise isn't kept.
        p_value = 1.0 - (binomial_tail(broken - 1, len(releases), delta) if broken else 0.0)
        verdict = "kept" if p_value > 0.05 else "BROKEN"
        count = f"{broken} of {len(releases)}"
        table.add_row("releases that broke the promise", f"{broken / len(releases):.2%}", count)
        table.add_row(f"  p of “at most {delta:.0%} are broken”", f"{p_value:.3f}", verdict)
    return table


def main() -> None:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(prog="python -m loadtest.routing_bench", description=__doc__)
    parser.add_argument("file", type=Path, help="a recording with columns text, teacher, gold")
    parser.add_argument("--seeds", type=int, default=200, help="how many shuffles (default: 200)")
    parser.add_argument(
        "--floor-seeds", type=int, default=5, help="how many of them get the floor (default: 5)"
    )
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: one a core)"
    )
    parser.add_argument("--max-disagreement", type=float, default=0.1, help="α (default: 0.1)")
    parser.add_argument("--certainty", type=float, default=0.9, help="1−δ (default: 0.9)")
    options = parser.parse_args()
    console = Console()
    began = time.monotonic()
    seeds: list[Seed] = []
    with ProcessPoolExecutor(options.jobs) as pool, Progress(console=Console(stderr=True)) as progress:
        bar = progress.add_task("simulating", total=options.seeds)
        futures = [
            pool.submit(
                play,
                options.file,
                seed,
                options.max_disagreement,
                options.certainty,
                seed < options.floor_seeds,
            )
            for seed in range(options.seeds)
        ]
        for future in as_completed(futures):
            seeds.append(seed := future.result())
            progress.advance(bar)
            if not sys.stderr.isatty():
                kept = " ".join(f"{release.disagreement:.3f}" for release in seed.releases)
                print(
                    f"seed {seed.seed}: {seed.share:.3f} of calls, releases disagree {kept}",
                    file=sys.stderr,
                    flush=True,
                )
    console.print(table_of(seeds, options.max_disagreement, options.certainty))
    console.print(
        f"{options.file.name}; Python {platform.python_version()}, NumPy {np.__version__}, {os.cpu_count()} cores; "
        f"{time.monotonic() - began:.0f} s"
    )


if __name__ == "__main__":
    main()
