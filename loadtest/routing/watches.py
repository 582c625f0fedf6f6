"""How soon a release that went bad is noticed, and how often a good one is accused: the watch and what others use.

Audits are a stream of agreements and disagreements. At the boundary they disagree with probability α for ever, and
every alarm is false. Then the release turns: audits that disagreed 3 % of the time disagree 10 %, under α = 5 %.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from loadtest.routing.runner import Runner
from loadtest.routing.verdict import is_kept
from routers.coin import LATER_RATE
from routers.watch import Watch

Bools = NDArray[np.bool_]
Detector = Callable[[Bools], int | None]
"""From audits, oldest first (True: disagreed), to how many it had seen at the alarm; None: no alarm."""

CERTAINTY = 0.9
ALPHA, GOOD, BAD = 0.05, 0.03, 0.10
HORIZON = 10_000
GOOD_AUDITS = (0, 1000, 5000)
STREAMS = 1000
WINDOW = 200


def watch(disagreed: Bools, max_disagreement: float = ALPHA) -> int | None:
    """The gateway's: bets from a recent mean."""
    watching = Watch(max_disagreement, CERTAINTY)
    for seen, one in enumerate(disagreed.tolist(), start=1):
        if watching.observe(not one):
            return seen
    return None


def likelihood_ratio(disagreed: Bools, steps: int = 60) -> int | None:
    """The plain mixture of likelihood ratios over all disagreements above α, from the first audit on; alarm at 1/δ.

    As valid as the watch (Ville's inequality), and the textbook's answer (Robbins, 1970).
    """
    count = np.cumsum(disagreed)
    agreed = np.arange(1, len(disagreed) + 1) - count
    wealth = np.zeros(len(disagreed))
    for step in range(steps):
        p = ALPHA + (step + 0.5) / steps * (1.0 - ALPHA)
        ratio = count * math.log(p / ALPHA) + agreed * math.log((1.0 - p) / (1.0 - ALPHA))
        wealth += np.exp(np.minimum(ratio, 700.0)) / steps
    return _first(wealth >= 1.0 / (1.0 - CERTAINTY))


def window(disagreed: Bools, limit: float = ALPHA) -> int | None:
    """What people use: the share among the last 200 audits lies above a limit."""
    if len(disagreed) < WINDOW:
        return None
    total = np.concatenate([[0], np.cumsum(disagreed)])
    inside = total[WINDOW:] - total[:-WINDOW]
    found = _first(inside > limit * WINDOW)
    return None if found is None else found + WINDOW - 1


def wide_window(disagreed: Bools) -> int | None:
    """The same window with the lowest limit that keeps false alarms below δ over 10,000 audits, by simulation."""
    return window(disagreed, WIDE_LIMIT)


WIDE_LIMIT = 0.1125
"""More than 22 of 200: 7 % false alarms over 10,000 audits at the boundary; with more than 21 it would be 16 %."""

DETECTORS: dict[str, Detector] = {
    "the watch": watch,
    "mixture of likelihood ratios": likelihood_ratio,
    "last 200 audits above α": window,
    "last 200 above 11 %, tuned": wide_window,
}


def false_alarms(name: str, seeds: Sequence[int]) -> int:
    """How many of the streams at the boundary set off an alarm within 10,000 audits."""
    return sum(
        DETECTORS[name](np.random.default_rng([seed, 0]).random(HORIZON) < ALPHA) is not None
        for seed in seeds
    )


def watch_false_alarms(max_disagreement: float, seeds: Sequence[int]) -> int:
    """The same for the watch, at another α."""
    return sum(
        watch(np.random.default_rng([seed, 1]).random(HORIZON) < max_disagreement, max_disagreement)
        is not None
        for seed in seeds
    )


def delays(name: str, good: int, seeds: Sequence[int]) -> list[float | None]:
    """Audits from the turn to the alarm, one a stream; ∞ if none came, None if it came before the turn."""
    found: list[float | None] = []
    for seed in seeds:
        rng = np.random.default_rng([seed, 2, good])
        stream = np.concatenate([rng.random(good) < GOOD, rng.random(HORIZON) < BAD])
        seen = DETECTORS[name](stream)
        found.append(math.inf if seen is None else None if seen <= good else float(seen - good))
    return found


def tables(runner: Runner) -> Iterator[Table]:
    """Run all streams and give both tables."""
    streams = runner.scaled(STREAMS)
    seeds = range(streams)
    alarms = {name: count for (name, _), count in runner.each("boundary", false_alarms, _each_with(seeds))}
    turned: dict[str, dict[int, list[float | None]]] = {name: {} for name in DETECTORS}
    given = [(name, good, seeds) for name in DETECTORS for good in GOOD_AUDITS]
    for (name, good, _), found in runner.each("turns", delays, given):
        turned[name][good] = found
    yield table_of(alarms, turned, streams)
    others = [(alpha, seeds) for alpha in (0.01, 0.03, 0.1)]
    at = {
        alpha: count for (alpha, _), count in runner.each("boundary at other α", watch_false_alarms, others)
    }
    yield boundary_table({**at, ALPHA: alarms["the watch"]}, streams)


def _each_with(seeds: Sequence[int]) -> list[tuple[str, Sequence[int]]]:
    return [(name, seeds) for name in DETECTORS]


def table_of(alarms: dict[str, int], turned: dict[str, dict[int, list[float | None]]], streams: int) -> Table:
    """False alarms and median delays, a row for each detector."""
    table = Table(
        title=f"The watch: agreement falls from {1 - GOOD:.0%} to {1 - BAD:.0%} under α = {ALPHA:.0%}, "
        f"δ = {1 - CERTAINTY:.0%}; {streams} streams",
        title_justify="left",
    )
    table.add_column("")
    table.add_column(f"false alarms in {HORIZON:,} audits at α", justify="right")
    for good in GOOD_AUDITS:
        table.add_column(f"delay after {good:,} good audits, median", justify="right")
    for name, found in turned.items():
        row = [name, f"{alarms[name] / streams:.1%}"]
        row += [_delay(found[good]) for good in GOOD_AUDITS]
        table.add_row(*row)
    return table


def boundary_table(alarms: dict[float, int], streams: int) -> Table:
    """The watch's false alarms at the boundary of several promises."""
    table = Table(title=f"The watch at the boundary: {HORIZON:,} audits at α, {streams} streams")
    table.title_justify = "left"
    for name in ("α", "false alarms", f"at most {1 - CERTAINTY:.0%}"):
        table.add_column(name, justify="right")
    for alpha, count in sorted(alarms.items()):
        verdict = "kept" if is_kept(count, streams, 1.0 - CERTAINTY) else "BROKEN"
        table.add_row(f"{alpha:.0%}", f"{count / streams:.1%}", verdict)
    return table


def _delay(found: Sequence[float | None]) -> str:
    """The median in audits and in answered requests, and how many streams were accused while they were good."""
    after = [delay for delay in found if delay is not None]
    early = len(found) - len(after)
    accused = f"; {early / len(found):.0%} accused before" if early else ""
    if not after:
        return "all accused before"
    median = statistics.median(after)
    if math.isinf(median):
        return f"> {HORIZON:,}{accused}"
    return f"{median:,.0f} audits, {median / LATER_RATE:,.0f} requests{accused}"


def _first(alarms: Bools) -> int | None:
    where = np.flatnonzero(alarms)
    return int(where[0]) + 1 if len(where) else None
