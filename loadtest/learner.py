"""Learning during a replay: the real command `understudy learn` as a child process."""

from __future__ import annotations

import asyncio
import time
from asyncio.subprocess import PIPE
from dataclasses import dataclass
from pathlib import Path

import orjson

from loadtest.stack import command, environment
from serving.exchange import Json


@dataclass(frozen=True, slots=True)
class Lesson:
    """One run of `understudy learn`.

    `after` is the number of requests sent before it. `report` is what it printed as JSON, None if it failed;
    `error` is then its last line.
    """

    after: int
    seconds: float
    report: Json | None
    error: str | None


async def learn(config: Path, task: str | None, *, after: int, own_stack: bool) -> Lesson:
    """Run `understudy learn` and return what it said. Cancelling this ends the process.

    With `own_stack` the child gets the stack's environment (without our settings), else this process's own.
    """
    arguments = ["learn", "--config", str(config), "--json", *(["--task", task] if task else [])]
    began = time.monotonic()
    process = await asyncio.create_subprocess_exec(
        *command(*arguments),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=PIPE,
        stderr=PIPE,
        env=environment(bare=own_stack),
        start_new_session=True,
    )
    try:
        output, errors = await process.communicate()
    except asyncio.CancelledError:
        process.terminate()
        await process.wait()
        raise
    seconds = time.monotonic() - began
    report, error = None, None
    if process.returncode == 0:
        try:
            report = orjson.loads(output)
        except orjson.JSONDecodeError:
            error = "understudy learn printed no JSON"
    else:
        said = [line for line in errors.decode(errors="replace").splitlines() if line.strip()]
        error = said[-1].strip() if said else f"understudy learn ended with exit code {process.returncode}"
    return Lesson(after, seconds, report if isinstance(report, dict) else None, error)
