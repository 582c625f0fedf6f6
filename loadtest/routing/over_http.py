"""The recorded stream over HTTP: real gateway, log, `understudy learn` and hot reload, three seeds."""

from __future__ import annotations

import statistics
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import orjson
from rich.table import Table

from loadtest.routing.runner import Runner
from loadtest.routing.stream import ALPHA
from loadtest.stack import command, environment
from serving.errors import UnderstudyError
from serving.exchange import Json
from serving.recording import read_recording

SEEDS = (1, 2, 3)
MESSAGES = 3080
_LEARN_EVERY = 100


class ReplayFailed(UnderstudyError):
    """A replay ended with an error; the message holds its last line."""


@dataclass(frozen=True, slots=True)
class Replayed:
    """What one seed's replay showed; shares are 0 to 1, None where there was nothing to count.

    `live` are the releases in order, each with the disagreement of the answers it gave.
    """

    seed: int
    share: float | None
    audits: float | None
    floor: float | None
    right: float | None
    disagreement: float | None
    live: list[tuple[str, int, float]]
    failed: int

    @classmethod
    def read(cls, seed: int, results: Json) -> Replayed:
        """From what `understudy replay --json` printed."""
        audits, agreement = results["audits"], results["student_agreement"]
        return cls(
            seed=seed,
            share=results["teacher_share"],
            audits=None if audits is None else audits / results["requests"],
            floor=results["oracle_share"],
            right=results["accuracy"],
            disagreement=None if agreement is None else 1.0 - agreement,
            live=[(one["release"], one["served"], one["disagreement"]) for one in results["releases"]],
            failed=results["failed"],
        )


def replay(folder: Path, seed: int, limit: int) -> Replayed:
    """Run `understudy replay` as a user would. Raises ReplayFailed."""
    options = [
        "--seed",
        str(seed),
        "--limit",
        str(limit),
        "--learn-every",
        str(_LEARN_EVERY),
        "--task",
        "banking",
    ]
    options += ["--system-prompt", str(folder / "system_prompt.txt"), "--latency-ms", "0"]
    options += ["--max-disagreement", str(ALPHA), "--json"]
    done = subprocess.run(  # noqa: S603 - our own command
        command("replay", str(folder / "stream.csv"), *options), env=environment(), capture_output=True
    )
    if done.returncode != 0:
        said = done.stderr.decode(errors="replace").strip().splitlines() or ["nothing"]
        raise ReplayFailed(
            f"understudy replay, seed {seed}, ended with exit code {done.returncode}: {said[-1]}"
        )
    return Replayed.read(seed, orjson.loads(done.stdout))


def tables(runner: Runner) -> Iterator[Table]:
    """Replay every seed, one after the other, and give the table."""
    folder = runner.data / "banking77_gpt4"
    read_recording(folder / "stream.csv")  # says what is wrong with it, before anything is started
    limit = max(300, min(MESSAGES, runner.scaled(MESSAGES)))
    yield table_of([replay(folder, seed, limit) for seed in SEEDS], limit)


def table_of(found: Sequence[Replayed], messages: int) -> Table:
    """A row for each seed, and what its calls are as a multiple of the floor."""
    table = Table(
        title=f"The stream over HTTP: {messages:,} messages, α = {ALPHA:.0%}, learning every {_LEARN_EVERY}",
        title_justify="left",
    )
    for name in (
        "seed",
        "calls to the teacher",
        "of which audits",
        "the floor",
        "multiple",
        "right",
        "student's answers disagree",
        "failed",
    ):
        table.add_column(name, justify="right")
    for one in found:
        releases = ", ".join(f"{name} {share:.1%} of {served}" for name, served, share in one.live)
        table.add_row(
            str(one.seed),
            _percent(one.share),
            _percent(one.audits),
            _percent(one.floor),
            f"{one.share / one.floor:.2f} ×" if one.share is not None and one.floor else "–",
            _percent(one.right),
            _percent(one.disagreement) + (f" ({releases})" if releases else ""),
            str(one.failed),
        )
    multiples = [one.share / one.floor for one in found if one.share is not None and one.floor]
    if multiples:
        table.caption = f"calls as a multiple of the floor, mean: {statistics.fmean(multiples):.2f} ×"
    return table


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{share:.1%}"
