"""What learning and its commands print: for people a table or a line, for programs one JSON object."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import orjson
from rich.console import Console
from rich.table import Table

from distillation.economics import TaskSummary
from distillation.learning import Lesson
from serving.exchange import Json
from serving.releases import Live


@contextmanager
def progress_line(quiet: bool) -> Iterator[Callable[[str], None]]:
    """A status line on stderr that says what is under way; nothing when `quiet` or without a terminal."""
    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        yield lambda _: None
        return
    with console.status("learning …") as status:
        yield lambda step: status.update(f"{step} …")


def print_json(value: Json) -> None:
    """One JSON object on stdout."""
    sys.stdout.write(orjson.dumps(value).decode() + "\n")


def print_lessons(lessons: list[Lesson]) -> None:
    """One line a task."""
    for lesson in lessons:
        print(f"{lesson.task}: {lesson.outcome.replace('_', ' ')}: {lesson.message}")
    if not lessons:
        print("nothing to learn: no task has a log yet")


def print_live(task: str, live: Live, json: bool) -> None:
    """What is live now, after a promotion or a rollback."""
    if json:
        print_json({"task": task, "release": live.release, "generation": live.generation})
    else:
        print(f"{task}: {live.release or 'the teacher alone'} is live (generation {live.generation})")


def print_tasks(summaries: list[TaskSummary]) -> None:
    """The tasks as a table."""
    if not summaries:
        print("no tasks yet: send requests through the gateway first")
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("task", no_wrap=True)
    for name in ("requests", "by student", "answers", "spent", "per teacher call"):
        table.add_column(name, justify="right")
    table.add_column("live")
    table.add_column("sees")
    table.add_column("worth a student?")
    for summary in summaries:
        by_student = summary.routes.get("student", 0)
        each = summary.teacher_cost_usd
        table.add_row(
            summary.task,
            f"{summary.exchanges:,}",
            f"{by_student / summary.exchanges:.0%}" if summary.exchanges else "–",
            f"{summary.distinct_answers:,}",
            f"${summary.cost_usd:,.4f}",
            f"${each:.6f}" if each is not None else "no price",
            summary.release or "–",
            summary.sees,
            summary.outlook,
        )
    Console().print(table)
    damaged = sum(summary.damaged_lines for summary in summaries)
    if damaged:
        print(f"{damaged} damaged lines in the log were skipped")
