"""What learning and its commands print: for people a table or a line, for programs one JSON object."""

from __future__ import annotations

import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType

import orjson
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from distillation.due import noise_line
from distillation.economics import TaskSummary
from distillation.learning import Lesson
from distillation.outlook import in_words
from distillation.templates import Template
from distillation.watching import withdrawal_line
from serving.exchange import Json
from serving.forgetting import Erasure
from serving.live import Live

_PRICE = "set teacher.price, and those to come will be in `spent`"


@contextmanager
def progress_line(quiet: bool, what: str = "learning") -> Iterator[Callable[[str], None]]:
    """A status line on stderr that says what is under way; nothing when `quiet` or without a terminal."""
    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        yield lambda _: None
        return
    with console.status(f"{what} …") as status:
        yield lambda step: status.update(f"{step} …")


def print_json(value: Json) -> None:
    """One JSON object on stdout."""
    sys.stdout.write(orjson.dumps(value).decode() + "\n")


def print_lessons(lessons: list[Lesson]) -> None:
    """One line a task, and one for each test of a look that didn't pass."""
    for lesson in lessons:
        print(f"{lesson.task}: {lesson.outcome.replace('_', ' ')}: {lesson.message}")
        for short in (lesson.look or {}).get("short", ()):
            print(f"  {in_words(short)}")
    if not lessons:
        print("nothing to learn: no task has a log yet")


def print_live(task: str, live: Live, json: bool) -> None:
    """What is live now, after a promotion or a rollback."""
    if json:
        print_json({"task": task, "release": live.release, "generation": live.generation})
    else:
        print(f"{task}: {live.release or 'the teacher alone'} is live (generation {live.generation})")
    withdrawn = live.withdrawn(live.release) if live.release is not None else None
    if withdrawn is not None:
        print(f"WARNING: {withdrawal_line(withdrawn)}. The watch begins anew", file=sys.stderr)


@contextmanager
def progress_bar(quiet: bool, what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr for bytes done of bytes to do; nothing when `quiet` or without a terminal."""
    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        yield lambda _done, _total: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def print_erasure(erasure: Erasure, *, dry_run: bool, cache_ttl_s: float) -> None:
    """What was erased, which releases were made since, and what may still hold some of it."""
    for task, erased in sorted(erasure.tasks.items()):
        when = f", {_day(erased.oldest)} to {_day(erased.newest)}" if erased.oldest is not None else ""
        print(f"{task}: {erased.exchanges:,} exchanges{when}{' would be erased' if dry_run else ' erased'}")
        if erased.damaged:
            print(f"{task}: {erased.damaged:,} damaged lines that may have been theirs, too")
        if erased.student_answers:
            print(f"{task}: {erased.student_answers:,} answers that a student gave to them for learning")
        for release, trained_on in erased.releases.items():
            known = (
                f"fitted on {trained_on:,} of them"
                if trained_on
                else "made since; not known to be fitted on them"
            )
            print(f"{task}: release {release}: {known}")
    if not erasure.tasks:
        print("nothing found")
    if erasure.unrecognisable:
        print(
            f"WARNING: in {erasure.unrecognisable:,} exchanges log.redact had replaced the end user's id: whether they "
            "are this user's can't be told, and they stay; erase them by tenant"
        )
    for line in erasure.left:
        print(f"NOT ERASED: {line}; run this again")
    if dry_run or not erasure.tasks:
        return
    if any(erased.releases for erased in erasure.tasks.values()):
        print(
            "A release keeps what it learned: words, and answers. Remove its folder, or roll back, and learn anew."
        )
    print(
        f"Not reached from here: the response cache (until {cache_ttl_s * 1.1:g} s are over), backups of the state"
    )
    print("directory, the teacher's provider, and what was written after this began.")


def _day(seconds: float | None) -> str:
    return "?" if seconds is None else time.strftime("%Y-%m-%d", time.gmtime(seconds))


def print_tasks(
    summaries: list[TaskSummary],
    templates: Sequence[Template] = (),
    named: Mapping[str, int] = MappingProxyType({}),
) -> None:
    """The tasks as a table, whether each is worth a student, and the templates with their rules.

    Tasks that hold nothing but a template are shown as its row. Those that hold only requests that a rule has named
    since (`named`, by task) are counted below.
    """
    if not summaries:
        print("no tasks yet: send requests through the gateway first")
        return
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="bold")  # it fits into 80 columns
    table.add_column("task", no_wrap=True)
    for name in ("requests", "by\nstudent", "answers", "spent", "teacher,\na call"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("live", no_wrap=True)
    table.add_column("sees", no_wrap=True)
    outlooks = []
    for template in templates:
        _add_template(table, template)
        outlooks.append((template.name, _outlook_of(template)))
    filled = Counter[str](named)
    for template in templates:
        filled.update(template.tasks)
    shown = [one for one in summaries if not one.exchanges or filled[one.task] < one.exchanges or one.release]
    for summary in shown:
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
        )
        outlooks.append((summary.task, summary.outlook))
        if summary.unpriced:
            outlooks.append(
                (summary.task, f"{summary.unpriced:,} answers of the teacher have no price: {_PRICE}")
            )
        outlooks += [(summary.task, line) for line in summary.unknown]
        if summary.noise is not None:
            outlooks.append((summary.task, noise_line(summary.noise)))
        if summary.spared is not None:
            spared = summary.spared
            outlooks.append(
                (
                    summary.task,
                    f"{spared.requests:,} requests skipped the student, whose escalation was foreseen: about "
                    f"{spared.seconds:,.1f} s of it spared, ${spared.usd:,.4f} (estimated)",
                )
            )
    Console().print(table)
    print("\nWorth a student?")
    for task, outlook in outlooks:
        print(f"  {task}: {outlook}")
    _print_costs(shown)
    _print_watch(shown)
    gone = [one for one in summaries if one not in shown and named.get(one.task)]
    if gone:
        requests = sum(named[one.task] for one in gone)
        print(f"{requests:,} requests of {len(gone):,} tasks, not shown, are from before a rule named them")
    for template in templates:
        _print_rule(template)
    damaged = sum(summary.damaged_lines for summary in summaries)
    if damaged:
        print(f"{damaged} damaged lines in the log were skipped")


def _print_costs(summaries: Sequence[TaskSummary]) -> None:
    """What students take and cost, next to the teacher."""
    lines = []
    for one in summaries:
        if one.student is not None:
            each = one.student
            line = f"an answer takes {_duration(each.seconds)} of what it runs on, {_per_thousand(each.usd)} per 1,000"
            if one.teacher_cost_usd is not None:
                line += f"; the teacher's {_per_thousand(one.teacher_cost_usd)}"
                if each.usd > 0:
                    line += f", {one.teacher_cost_usd / each.usd:,.0f} times as much"
            lines.append(f"  {one.task}: {line}")
        if one.learning is not None:
            spent = one.learning
            asked = f" and {_duration(spent.student_s)} of the student" if spent.student_s else ""
            lines.append(
                f"  {one.task}: {spent.looks:,} look{'s' if spent.looks != 1 else ''} took "
                f"{_duration(spent.core_s)} of a core{asked}, ${spent.usd:,.4f}"
            )
    if lines:
        print("\nWhat does a student cost?")
        print("\n".join(lines))


def _duration(seconds: float) -> str:
    return f"{seconds * 1000:,.3g} ms" if seconds < 1 else f"{seconds:,.1f} s"


def _per_thousand(usd: float) -> str:
    digits = 4 if usd <= 0 else max(4, 1 - math.floor(math.log10(usd * 1000)))
    return f"${usd * 1000:,.{digits}f}"


def _print_watch(summaries: Sequence[TaskSummary]) -> None:
    """How the live releases do, and which were withdrawn."""
    lines = []
    for one in summaries:
        if one.unusable is not None:
            lines.append(
                f"  {one.task}: {one.unusable}; meanwhile the teacher answers what no worker has it for"
            )
        elif one.watched is not None:
            lines.append(f"  {one.task}: {one.watched.line()}")
        if one.withdrawn is not None:
            lines.append(f"  {one.task}: {withdrawal_line(one.withdrawn)}")
    if lines:
        print("\nDo they keep their promises?")
        print("\n".join(lines))


def _add_template(table: Table, template: Template) -> None:
    each = template.cost_usd / template.requests if template.requests else 0.0
    table.add_row(
        template.name,
        f"{template.requests:,}",
        "–",
        "–",
        f"${template.cost_usd:,.4f}",
        f"${each:.6f}",
        "–",
        "–",
    )


def _outlook_of(template: Template) -> str:
    return f"no task: {template.prompts:,} prompts in {len(template.tasks):,} tasks look like one template, see below"


def _print_rule(template: Template) -> None:
    print(
        f"\n{template.name}: {template.prompts:,} prompts look like one template. In its slots stands, for instance:"
    )
    for slots in template.slots:
        print("  " + " | ".join(slots))
    if template.rule is None:
        print("No rule tells them from other prompts: name the task in x-understudy-task or in metadata.")
        return
    print(
        f"If they are one task, this makes them one, from now on ({template.requests:,} requests, "
        f"${template.cost_usd:,.4f} so far). Append it to the configuration:\n\n{template.rule}"
    )
