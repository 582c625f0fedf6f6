"""`python -m loadtest.routing`: one command that prints every table, or those asked for."""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from rich.console import Console, RenderableType

from loadtest.routing import cost, over_http, planted, ranking, stream, validity, watches
from loadtest.routing.runner import Runner
from serving.errors import UnderstudyError

QUICK = 0.02
"""The scale of `--quick`: a look at whether everything runs, no evidence."""

Tables = Callable[[Runner], Iterator[RenderableType]]

TABLES: dict[str, Tables] = {
    "validity": validity.tables,
    "planted": planted.tables,
    "ranking": ranking.tables,
    "watch": watches.tables,
    "stream": stream.tables,
    "http": over_http.tables,
    "cost": cost.tables,
}


def main() -> int:
    """Run what was asked for and print it. Returns the exit code: 2 when a recording can't be read."""
    parser = argparse.ArgumentParser(prog="python -m loadtest.routing", description=__doc__)
    parser.add_argument(
        "data", type=Path, help="the folder with the recordings frugalml_shop and banking77_gpt4"
    )
    parser.add_argument("--only", nargs="+", choices=TABLES, help="these tables only, of: %(choices)s")
    parser.add_argument("--quick", action="store_true", help="a fiftieth of the lives: runs, proves nothing")
    parser.add_argument("--scale", type=float, default=1.0, help="the share of lives to run (default: 1)")
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: one a core)"
    )
    options = parser.parse_args()
    runner = Runner(options.data, options.jobs, QUICK if options.quick else options.scale)
    console = Console(width=None if os.isatty(1) else 130)
    for name in options.only or TABLES:
        began = time.monotonic()
        try:
            for table in TABLES[name](runner):
                console.print(table)
        except UnderstudyError as error:
            Console(stderr=True).print(f"{name}: {error}", markup=False)
            return 2
        console.print(
            f"{name}: {time.monotonic() - began:.0f} s; Python {platform.python_version()}, NumPy {np.__version__}, "
            f"{os.cpu_count()} cores\n",
            highlight=False,
        )
    return 0
