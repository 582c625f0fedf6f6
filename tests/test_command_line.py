"""What the command line shows to people: in a terminal of 80 columns nothing is cut off, and names are known."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

Make = Callable[..., Any]
ROOT = Path(__file__).parents[1]


def understudy(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "understudy", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "80"},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_every_command_is_described_whole(tmp_path: Path) -> None:
    commands = understudy(tmp_path, "--help").stdout.partition("Commands:")[2]
    assert "doctor" in commands
    assert "..." not in commands


def test_the_tasks_fit_into_a_terminal(tmp_path: Path, write_log: Make, exchanges: Make) -> None:
    write_log(exchanges([(f"where is {number}", "lost") for number in range(3)]), "auto-0123456789ab")
    shown = understudy(tmp_path, "tasks").stdout
    assert "…" not in shown
    row = next(line for line in shown.splitlines() if line.startswith("auto-"))
    assert row.split() == ["auto-0123456789ab", "3", "0%", "1", "$0.0030", "$0.001000", "–", "message"]
    assert "\n  auto-0123456789ab: too early: 3 labels; the first look needs 138\n" in shown


def test_answers_without_a_price_are_told(tmp_path: Path, write_log: Make, exchanges: Make) -> None:
    priced, other = exchanges([("a", "x"), ("b", "x")])
    teacher = dataclasses.replace(other.teacher, cost_usd=None)
    write_log([priced, dataclasses.replace(other, teacher=teacher, cost_usd=None)])
    assert "intents: 1 answers of the teacher have no price: set teacher.price" in (
        understudy(tmp_path, "tasks").stdout
    )


def test_a_task_that_isnt_there_is_told_from_one_without_releases(
    tmp_path: Path, write_log: Make, exchanges: Make
) -> None:
    write_log(exchanges([("a", "x")]), "parcels")
    for arguments in (("promote", "parcls", "r0001"), ("rollback", "parcls")):
        done = understudy(tmp_path, *arguments)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr == "understudy: there is no task parcls under state; there are: parcels\n"
    assert understudy(tmp_path, "promote", "parcels", "r0001").stderr == (
        "understudy: task parcels has no release 'r0001'; it has: none yet\n"
    )
    assert not (tmp_path / "state/tasks/parcls").exists()
