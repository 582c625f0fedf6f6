"""The promise on a recorded stream, many times over.

Each seed shuffles the recording and plays it from a cold start through the simulator, which decides and learns by the
gateway's own code. The first seeds also get the floor: one threshold chosen by hindsight for the same student.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.table import Table

from distillation.simulated import SimulatedLearner, oracle
from loadtest.routing.runner import Runner
from loadtest.routing.verdict import chance_of, is_kept
from routers.simulator import Kept, Message, simulate
from serving.recording import read_recording
from serving.task_settings import TaskPolicy

ALPHA, CERTAINTY = 0.1, 0.9
SEEDS, FLOOR_SEEDS = 200, 5


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
        title=f"The stream: BANKING77, α = {max_disagreement:.0%}, δ = {delta:.0%}, {len(seeds)} seeds",
        title_justify="left",
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
        p_value = chance_of(broken, len(releases), delta)
        verdict = "kept" if is_kept(broken, len(releases), delta) else "BROKEN"
        count = f"{broken} of {len(releases)}"
        table.add_row("releases that broke the promise", f"{broken / len(releases):.2%}", count)
        table.add_row(f"  p of “at most {delta:.0%} are broken”", f"{p_value:.3f}", verdict)
    return table


def tables(runner: Runner) -> Iterator[Table]:
    """Play every seed and give the table."""
    path = runner.data / "banking77_gpt4" / "stream.csv"
    read_recording(path)  # says what is wrong with it, before processes are started
    seeds = runner.scaled(SEEDS)
    floors = min(FLOOR_SEEDS, seeds)
    given = [(path, seed, ALPHA, CERTAINTY, seed < floors) for seed in range(seeds)]
    yield table_of([seed for _, seed in runner.each("stream", play, given)], ALPHA, CERTAINTY)
