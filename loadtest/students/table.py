"""What was measured, side by side: students across, each figure a mean over the seeds, with its ratio to the first."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from rich.table import Table

from loadtest.students.outcome import Outcome
from loadtest.table import percent

TEACHER_S = 1.0
"""How long the teacher is taken to need: the recording has no times."""

Value = Callable[[Outcome], float | None]
Say = Callable[[float], str]


@dataclass(frozen=True, slots=True)
class Measure:
    """A line of the table. `compared`: its ratio to the first student's is shown."""

    name: str
    value: Value
    say: Say
    compared: bool = True


def _share(value: float) -> str:
    return percent(value)


def _millis(seconds: float) -> str:
    return f"{seconds * 1000:.2f} ms" if seconds < 1 else f"{seconds:.1f} s"


def _megabytes(count: float) -> str:
    return f"{count / 1e6:,.1f} MB"


def _rate(per_s: float) -> str:
    return f"{per_s:,.0f}/s" if per_s >= 10 else f"{per_s:.1f}/s"


def _dollars(usd: float) -> str:
    return f"${usd:.6f}" if usd < 0.01 else f"${usd:.4f}"


def _ratio(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def _times(factor: float) -> str:
    return f"{factor:,.0f} ×"


def _whole_usd(one: Outcome) -> float | None:
    """USD per 1,000 answers at saturation, by the share of an hour that these take: the gateway's part is in it."""
    through = one.through
    if not through.device_s or not through.per_s:
        return None
    usd_per_1000_s = through.usd_per_1000 / through.device_s
    return usd_per_1000_s / through.per_s


def _times_cheaper(one: Outcome) -> float | None:
    usd = _whole_usd(one)
    return None if one.teacher_usd_per_1000 is None or not usd else one.teacher_usd_per_1000 / usd


MEASURES = (
    Measure("agrees with GPT-4", lambda one: one.quality.agreement, _share, compared=False),
    Measure("right, by the gold labels", lambda one: one.quality.accuracy, _share, compared=False),
    Measure("answered at 5 % disagreement, by hindsight", lambda one: one.quality.answered, _share, False),
    Measure("AURC (lower is better)", lambda one: one.quality.aurc, "{:.4f}".format, compared=False),
    Measure("ECE of its confidence", lambda one: one.quality.ece, _share, compared=False),
    Measure("size on disk", lambda one: float(one.disk_bytes), _megabytes),
    Measure("memory added", lambda one: float(one.alone.memory_bytes), _megabytes),
    Measure("from its files to the first answer", lambda one: one.alone.start_s, _millis),
    Measure("p50 alone", lambda one: one.alone.p50_s, _millis),
    Measure("p99 alone", lambda one: one.alone.p99_s, _millis),
    Measure("answers a second and core, alone", lambda one: one.alone.per_s, _rate),
    Measure("through a gateway on one core", lambda one: one.through.per_s, _rate),
    Measure("of those, not the student's", lambda one: one.through.others, _share, compared=False),
    Measure("of its core for an answer there", lambda one: one.through.device_s, _millis),
    Measure("USD per 1,000 answers, for that time", lambda one: one.through.usd_per_1000, _dollars),
    Measure("USD per 1,000 answers, with the gateway", _whole_usd, _dollars),
    Measure(
        "faster than a teacher of 1 s, by its p50", lambda one: TEACHER_S / one.alone.p50_s, _times, False
    ),
    Measure("cheaper than GPT-4, with the gateway", _times_cheaper, _times, compared=False),
    Measure("learning: seconds of a core", lambda one: one.learning_s, "{:,.0f} s".format),
)


def table_of(outcomes: Mapping[str, Sequence[Outcome]]) -> Table:
    """The table of students that were measured with at least one seed."""
    table = Table(
        title="Students on BANKING77 with GPT-4 as teacher, tested on half of its stream",
        title_justify="left",
    )
    table.add_column("")
    for name, measured in outcomes.items():
        table.add_column(f"{name}\n{len(measured)} seed{'s' if len(measured) > 1 else ''}", justify="right")
    first = next(iter(outcomes.values()), ())
    for measure in MEASURES:
        base = _mean(measure, first)
        cells = []
        for measured in outcomes.values():
            mean = _mean(measure, measured)
            cell = "–" if mean is None else measure.say(mean)
            if measure.compared and mean is not None and base and measured is not first:
                cell += f" ({_ratio(mean / base)} ×)"
            cells.append(cell)
        table.add_row(measure.name, *cells)
    return table


def teacher_line(outcomes: Sequence[Outcome]) -> str:
    """The teacher on the same messages."""
    accuracy = statistics.fmean(one.teacher_accuracy for one in outcomes)
    prices = [one.teacher_usd_per_1000 for one in outcomes if one.teacher_usd_per_1000 is not None]
    price = f"${statistics.fmean(prices):.2f} per 1,000" if prices else "no price is known"
    return (
        f"GPT-4 itself: right on {percent(accuracy)} of them, {price} "
        "(genai-prices; prompt and answer estimated at four characters a token)"
    )


def _mean(measure: Measure, measured: Sequence[Outcome]) -> float | None:
    values = [value for one in measured if (value := measure.value(one)) is not None]
    return statistics.fmean(values) if values else None
