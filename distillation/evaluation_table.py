"""An evaluation in a terminal: tables of 80 columns."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from distillation.evaluation import Evaluation
from distillation.evaluation_words import (
    costs,
    day,
    measures,
    plain,
    printable,
    promise_in_words,
    releases_in_words,
    rules,
    samples,
    spent_in_words,
    verdict,
    with_interval,
)
from distillation.judgement import Judgement


def print_evaluation(evaluation: Evaluation) -> None:
    """Print everything but the curves, which `--json` and `--html` have."""
    console = Console(highlight=False)
    state = "live" if evaluation.live else "not live"
    console.print(
        f"[bold]{evaluation.task} {evaluation.release}[/bold] ({state}), "
        f"student {escape(printable(evaluation.student))}, made {day(evaluation.created)}"
    )
    console.print(f"promise: {promise_in_words(evaluation)}")
    console.print(f"audits: {verdict(evaluation)}")
    console.print(spent_in_words(evaluation))
    console.print(f"{releases_in_words(evaluation)}\n")
    console.print(_measures(evaluation))
    console.print(_costs(evaluation))
    for name, _, judgement in samples(evaluation):
        if judgement.worst_answers and name in ("log", "recording"):
            table = _table(f"\nAnswers that disagree most, among those served ({name})", "answer")
            for column in ("served", "disagree"):
                table.add_column(column, justify="right")
            for one in judgement.worst_answers[:5]:
                table.add_row(escape(plain(one.key)), f"{one.risk.count:,}", with_interval(one.risk))
            console.print(table)
    for what, answers in rules(evaluation):
        console.print(f"{what}: {escape(', '.join(answers))}")
    for note in evaluation.notes:
        console.print(f"note: {escape(printable(note))}")


def _measures(evaluation: Evaluation) -> Table:
    named = samples(evaluation)
    table = _table("", "")
    for name, _, _ in named:
        table.add_column(name, justify="right", no_wrap=True)
    rows: dict[str, dict[str, str]] = {}
    for name, _, judgement in named:
        for what, value in measures(judgement):
            rows.setdefault(what, {})[name] = value
    # Accuracy stands after agreement, though only one of the samples may have it.
    order = [what for what, _ in measures(max((one[2] for one in named), key=_has_truth))] if named else []
    for what in [*order, *(what for what in rows if what not in order)]:
        table.add_row(what, *(rows.get(what, {}).get(name, "–") for name, _, _ in named))
    if not named:
        table.add_row("no labels to judge by")
    return table


def _has_truth(judgement: Judgement) -> bool:
    return judgement.accuracy is not None


def _costs(evaluation: Evaluation) -> Table:
    table = _table("\nCost of 1,000 requests", "")
    table.add_column("USD", justify="right")
    for what, value in costs(evaluation):
        table.add_row(what, value)
    return table


def _table(title: str, first: str) -> Table:
    table = Table(
        box=None, padding=(0, 1, 0, 0), header_style="bold", title=title or None, title_justify="left"
    )
    table.add_column(first)
    return table
