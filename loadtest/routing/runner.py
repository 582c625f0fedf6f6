"""A table's work, spread over a bounded number of processes, with progress on stderr."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import Progress

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Runner:
    """What the tables are run with.

    `data` is the folder of recordings, `processes` how many work at a time, `scale` the share of lives, splits and
    seeds to run (1: as the README has them).
    """

    data: Path
    processes: int
    scale: float = 1.0

    def scaled(self, count: int) -> int:
        """`count` at this runner's scale, and at least two."""
        return max(2, round(count * self.scale))

    def each(
        self, title: str, work: Callable[..., Result], given: Sequence[tuple[Any, ...]]
    ) -> Iterator[tuple[tuple[Any, ...], Result]]:
        """Call `work` with each tuple of arguments; gives them with what it returned, in the order given."""
        results: dict[int, Result] = {}
        with (
            ProcessPoolExecutor(self.processes, mp_context=get_context("spawn")) as pool,
            Progress(console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress,
        ):
            bar = progress.add_task(title, total=len(given))
            place = {pool.submit(work, *arguments): index for index, arguments in enumerate(given)}
            for done, future in enumerate(as_completed(place), start=1):
                results[place[future]] = future.result()
                progress.advance(bar)
                if not sys.stderr.isatty() and done * 10 // len(given) > (done - 1) * 10 // len(given):
                    print(f"{title}: {done} of {len(given)}", file=sys.stderr, flush=True)
        for index, arguments in enumerate(given):
            yield arguments, results[index]
