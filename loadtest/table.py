"""The results of a replay as a table for people."""

from __future__ import annotations

from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.table import Table

from loadtest.results import Results


def render(results: Results) -> RenderableType:
    """Return what is printed at the end of a replay."""
    return Group(_routes(results), _quality(results), _releases(results), *_notes(results))


def show(results: Results, console: Console) -> None:
    """Print the results."""
    console.print(render(results))


def _routes(results: Results) -> Table:
    table = _table("Where requests went", "route", "reason", "requests", "share", "p50 of route", "p99")
    shown: set[str] = set()
    for entry in results.routes:
        latency = None if entry.route in shown else results.latency.get(entry.route)
        shown.add(entry.route)
        table.add_row(
            entry.route,
            entry.reason,
            f"{entry.requests:,}",
            percent(entry.share),
            "" if latency is None else f"{latency.p50_s * 1000:.1f} ms",
            "" if latency is None else f"{latency.p99_s * 1000:.1f} ms",
        )
    if results.failed:
        table.add_row(
            "[red]failed[/red]", "", f"{results.failed:,}", percent(results.failed / results.requests)
        )
    return table


def _quality(results: Results) -> Table:
    table = _table("What it was worth", "", "all", "student's own", "teacher alone")
    table.add_row(
        "agreement with the teacher", percent(results.agreement), percent(results.student_agreement), "–"
    )
    table.add_row(
        "right, by the gold answers",
        percent(results.accuracy),
        percent(results.student_accuracy),
        percent(results.teacher_accuracy),
    )
    table.add_row("calls to the teacher", percent(results.teacher_share), "", "100.0 %")
    answered = max(results.requests - results.failed, 1)
    table.add_row("  of which audits", "?" if results.audits is None else percent(results.audits / answered))
    if results.oracle_share is not None:
        table.add_row("  the floor, by hindsight", percent(results.oracle_share), "", "")
    table.add_row(
        "cost of 1,000 requests",
        _dollars(results.usd_per_request),
        "",
        _dollars(results.teacher_usd_per_request),
    )
    return table


def _releases(results: Results) -> Table:
    table = _table(
        "Releases, on the traffic that came after them", "release", "served", "disagreed", "disagreement"
    )
    for entry in results.releases:
        table.add_row(entry.release, f"{entry.served:,}", f"{entry.disagreed:,}", percent(entry.disagreement))
    if not results.releases:
        table.add_row("none", "0", "", "")
    return table


def _notes(results: Results) -> list[str]:
    notes = [f"{results.requests:,} requests in {results.seconds:.1f} s"]
    if results.lessons:
        notes[0] += f", learned {len(results.lessons)} times"
    for error, count in list(results.failures.items())[:5]:
        notes.append(f"failed {count} ×: {escape(error)}")
    wrong = [lesson for lesson in results.lessons if lesson.error]
    if wrong:
        notes.append(f"learning failed {len(wrong)} ×, last: {escape(wrong[-1].error or '')}")
    if results.interrupted:
        notes.append("interrupted: this is what had come by then")
    return notes


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    for number, name in enumerate(columns):
        table.add_column(name, justify="left" if number < 1 or name == "reason" else "right")
    return table


def percent(share: float | None) -> str:
    """Write a share for people."""
    return "–" if share is None else f"{share * 100:.1f} %"


def _dollars(usd_per_request: float | None) -> str:
    return "–" if usd_per_request is None else f"${usd_per_request * 1000:.4f}"
