"""A student alone on one core, as a child process: `python -m loadtest.students.probe JOB` with a file made by `Job`.

Prints one JSON object: how long it took from the release's files to the first answer, what memory that added, its
latency one by one, its answers a second when many are asked for, and every answer.
"""

from __future__ import annotations

import asyncio
import dataclasses
import math
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import orjson

from loadtest.processes import resident_bytes
from loadtest.stack import command, environment
from loadtest.students.split import TASK
from routers.meter import TokenMeter
from serving.engines import Engines
from serving.errors import UnderstudyError
from serving.exchange import Json
from serving.releases import ReleaseStore
from serving.student import Student
from serving.students import load_student

AT_ONCE = 16
_ALONE, _ALONE_S = 300, 10.0
_LIMIT_S = 1800.0


class ProbeFailed(UnderstudyError):
    """The child process ended without a result; says with which words."""


@dataclass(frozen=True, slots=True)
class Job:
    """Which release to probe with which requests: on `core`, for about `seconds` at saturation.

    `pinned` is False for a student whose own process has the core: the probe is its client then.
    """

    state_dir: str
    release: str
    core: int
    pinned: bool
    seconds: float
    requests: list[Json]


@dataclass(frozen=True, slots=True)
class Said:
    """One answer: its choices, and what is known of how sure the student is. A score of null was no finite number."""

    choices: list[Json]
    score: float | None
    signals: dict[str, float | None]


@dataclass(frozen=True, slots=True)
class Probed:
    """What came of it. Times in seconds."""

    start_s: float
    memory_bytes: int
    latencies_s: list[float]
    per_s: float
    answers: list[Said]


def probe(job: Job, work: Path) -> Probed:
    """Run the probe as a child process. Raises ProbeFailed."""
    path = work / "job.json"
    path.write_bytes(orjson.dumps(job))
    done = subprocess.run(  # noqa: S603 - our own module
        command(str(path), module="loadtest.students.probe"),
        env=environment(),
        capture_output=True,
        timeout=_LIMIT_S,
    )
    if done.returncode != 0:
        raise ProbeFailed(f"the student alone failed: {done.stderr.decode(errors='replace').strip()[-500:]}")
    read = orjson.loads(done.stdout)
    return Probed(**{**read, "answers": [Said(**answer) for answer in read["answers"]]})


async def _probe(job: Job) -> Probed:
    before = resident_bytes(os.getpid())
    began = time.perf_counter()
    student = _loaded(job)
    await student.prepare()
    await student.answer(job.requests[0])
    start_s = time.perf_counter() - began
    added = resident_bytes(os.getpid()) - before
    try:
        latencies = await _one_by_one(student, job.requests)
        per_s = await _saturated(student, job.requests, job.seconds)
        answers = await _all(student, job.requests)
    finally:
        await student.aclose()
    return Probed(start_s, added, latencies, per_s, answers)


def _loaded(job: Job) -> Student:
    """The student. What its release holds is let go with this, as a gateway does."""
    release = ReleaseStore(Path(job.state_dir)).read(TASK, job.release)
    return load_student(release, TokenMeter, Engines())


async def _one_by_one(student: Student, requests: Sequence[Json]) -> list[float]:
    taken: list[float] = []
    end = time.perf_counter() + _ALONE_S
    while len(taken) < _ALONE and time.perf_counter() < end:
        began = time.perf_counter()
        await student.answer(requests[len(taken) % len(requests)])
        taken.append(time.perf_counter() - began)
    return taken


async def _saturated(student: Student, requests: Sequence[Json], seconds: float) -> float:
    answered = 0
    began = time.perf_counter()

    async def work(place: int) -> None:
        nonlocal answered
        while time.perf_counter() - began < seconds:
            await student.answer(requests[place % len(requests)])
            place += AT_ONCE
            answered += 1
            await asyncio.sleep(0)  # one that answers inline would keep the others from asking

    await asyncio.gather(*(work(place) for place in range(AT_ONCE)))
    return answered / (time.perf_counter() - began)


async def _all(student: Student, requests: Sequence[Json]) -> list[Said]:
    said: list[Said | None] = [None] * len(requests)
    waiting = iter(range(len(requests)))

    async def work() -> None:
        for number in waiting:
            answer = await student.answer(requests[number])
            signals = {name: _finite(value) for name, value in answer.signals.items()}
            said[number] = Said(answer.choices, _finite(answer.score), signals)

    await asyncio.gather(*(work() for _ in range(AT_ONCE)))
    return [answer for answer in said if answer is not None]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def main() -> int:
    """Probe what the job says."""
    job = Job(**orjson.loads(Path(sys.argv[1]).read_bytes()))
    if job.pinned:
        os.sched_setaffinity(0, {job.core})
    else:
        os.sched_setaffinity(0, os.sched_getaffinity(0) - {job.core})
    probed = asyncio.run(_probe(job))
    sys.stdout.buffer.write(orjson.dumps(dataclasses.asdict(probed)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
