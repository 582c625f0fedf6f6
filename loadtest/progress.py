"""A replay while it runs: a live table in a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import time
from collections import Counter
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.table import Table

from loadtest.table import percent
from loadtest.traffic import Outcome, recorded_choices
from serving.agreement import Comparison

_PLAIN_LINES = 12


class Progress:
    """Counts outcomes as they come and shows where the replay stands. A context manager."""

    def __init__(self, console: Console, total: int, compare: Comparison) -> None:
        self._compare = compare
        self._console = console
        self._total = total
        self._done = 0
        self._answered = 0
        self._failed = 0
        self._agreed = 0
        self._student_agreed = 0
        self._routes: Counter[str] = Counter()
        self._cost = 0.0
        self._teacher_cost = 0.0
        self._release: str | None = None
        self._learning = "not yet"
        self._began = time.monotonic()
        self._every = max(1, total // _PLAIN_LINES)
        self._live = Live(console=console, get_renderable=self._table, refresh_per_second=4, transient=True)

    def __enter__(self) -> Progress:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._console.is_terminal:
            self._live.stop()

    def add(self, outcome: Outcome) -> None:
        """Count one outcome."""
        self._done += 1
        if outcome.choices is None:
            self._failed += 1
        else:
            self._answered += 1
            route = outcome.route or "unknown"
            agreed = self._compare.agree(outcome.choices, recorded_choices(outcome.row))
            self._routes[route] += 1
            self._agreed += agreed
            self._student_agreed += agreed and route == "student"
            self._cost += outcome.cost_usd or 0.0
            if route == "teacher":
                self._teacher_cost += outcome.cost_usd or 0.0
            self._release = outcome.release
        if not self._console.is_terminal and self._done % self._every == 0:
            self._console.print(self._line(), highlight=False, soft_wrap=True)

    def learning(self, status: str) -> None:
        """Show what the learner is doing or has said last."""
        self._learning = status
        if not self._console.is_terminal:
            self._console.print(f"learn: {status}", highlight=False, markup=False, soft_wrap=True)

    def _line(self) -> str:
        routes = ", ".join(f"{route} {count}" for route, count in sorted(self._routes.items()))
        parts = [f"{self._done:,}/{self._total:,}", routes or "none answered"]
        parts.append(f"agreement {percent(self._share(self._agreed))}")
        parts.append(f"cost {self._saving()}")
        parts.append(f"release {self._release or 'none'}")
        if self._failed:
            parts.append(f"{self._failed} failed")
        return " · ".join(parts)

    def _table(self) -> Table:
        table = Table(show_header=False, box=None, padding=(0, 2))
        table.add_row("requests", _barred(f"{self._done:,} of {self._total:,}", self._done / self._total))
        for route, count in sorted(self._routes.items()):
            share = count / max(self._answered, 1)
            table.add_row(f"  {route}", _barred(f"{count:,} ({percent(share)})", share))
        students = self._routes["student"]
        own = f", the student's own {percent(self._student_agreed / students)}" if students else ""
        table.add_row("agreement with the teacher", f"{percent(self._share(self._agreed))}{own}")
        table.add_row("cost so far", self._saving())
        table.add_row("live release", self._release or "none: the teacher answers everything")
        table.add_row("learning", self._learning)
        if self._failed:
            table.add_row("failed", f"{self._failed:,}")
        table.add_row("elapsed", f"{time.monotonic() - self._began:.0f} s")
        return table

    def _share(self, count: int) -> float | None:
        return count / self._answered if self._answered else None

    def _saving(self) -> str:
        """Say what was spent beside what the teacher alone would have cost, at its mean price so far."""
        teachers = self._routes["teacher"]
        if not teachers:
            return f"${self._cost:.4f}"
        if not self._teacher_cost:
            return "unknown: the model has no price"
        alone = self._teacher_cost / teachers * self._answered
        return f"${self._cost:.4f} (the teacher alone: ${alone:.4f})"


def _barred(said: str, share: float, width: int = 24) -> str:
    """`said`, and a bar beside it; with the labels before it, it fits into 80 columns."""
    filled = round(min(share, 1.0) * width)
    return f"{said:<18}" + "█" * filled + "░" * (width - filled)
