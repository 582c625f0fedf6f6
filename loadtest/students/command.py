"""`python -m loadtest.students DATA`: every student on the same traffic, learned and measured as it is served.

What is measured is kept in a folder, so that a run that broke off goes on where it was. A student for which something
is missing says what, and the others go on.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import statistics
import subprocess
import tempfile
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from loadtest.processes import session_bytes
from loadtest.stack import stoppable
from loadtest.students.candidates import CANDIDATES, Means
from loadtest.students.lesson import learned
from loadtest.students.outcome import Alone, Kept, Outcome
from loadtest.students.probe import Job, probe
from loadtest.students.quality import quality_of
from loadtest.students.split import Split, read_split
from loadtest.students.table import table_of, teacher_line
from loadtest.students.through import through_a_gateway
from routers.router import Router
from serving.errors import UnderstudyError
from serving.pricing import PriceList

_CACHE = Path(".cache") / "bench-students"


def main() -> int:
    """Measure what was asked for and print it. Returns the exit code: 2 when the recording can't be read."""
    options = _parser().parse_args()
    cores = sorted(os.sched_getaffinity(0))
    console = Console(width=None if os.isatty(1) else 200)
    errors = Console(stderr=True)
    if len(cores) < 2:
        errors.print("it takes two cores: one for the student, one for its clients")
        return 2
    means = Means(
        python=options.python.absolute(),
        base=options.base,
        lm_model=options.lm_model,
        lm_usd_per_hour=options.lm_usd_per_hour,
        models=options.cache / "models",
        core=cores[0],
    )
    prices = PriceList(None, base_url="https://api.openai.com/v1")
    names = options.only or list(CANDIDATES)
    kept = Kept(
        options.cache,
        {
            "data": str(options.data.resolve()),
            "rows": options.rows,
            "seconds": options.seconds,
            "usd_per_hour": options.usd_per_hour,
            "lm_model": str(options.lm_model),
            "lm_usd_per_hour": options.lm_usd_per_hour,
            "base": str(options.base),
        },
    )
    measured: dict[str, list[Outcome]] = {name: [] for name in names}
    missing: dict[str, str] = {}
    before = 0
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with stoppable(), Progress(*columns, console=errors, transient=True) as bar:
        whole = bar.add_task("students", total=len(names) * options.seeds)
        for seed in range(1, options.seeds + 1):
            try:
                split = read_split(options.data, seed, rows=options.rows)
            except UnderstudyError as error:
                errors.print(str(error), markup=False)
                return 2
            for name in names:
                bar.update(whole, description=f"{name}, seed {seed}")
                outcome = None if options.again else kept.read(name, seed)
                before += outcome is not None
                if outcome is None and name not in missing:
                    try:
                        lesson = kept.lesson(name, seed)
                        outcome = _measure(name, split, means, prices, options, bar, lesson)
                        kept.write(outcome)
                    except (
                        UnderstudyError,
                        subprocess.TimeoutExpired,
                        TimeoutError,
                        ConnectionError,
                    ) as error:
                        missing[name] = str(error) or "it took more than a minute for a few answers"
                if outcome is not None:
                    measured[name].append(outcome)
                bar.advance(whole)
    _show({name: found for name, found in measured.items() if found}, missing, console)
    if before:
        console.print(
            f"{before} of {sum(map(len, measured.values()))} were measured before, whatever has changed since "
            f"(--again measures anew; without {options.cache} it also learns anew)",
            highlight=False,
        )
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m loadtest.students", description=__doc__)
    parser.add_argument("data", type=Path, help="the folder of the recording banking77_gpt4")
    parser.add_argument("--only", nargs="+", choices=CANDIDATES, help="these students only, of: %(choices)s")
    parser.add_argument("--seeds", type=int, default=3, help="how many splits to measure on")
    parser.add_argument(
        "--rows", type=int, help="learn from about so many rows, of a few answers: runs, proves nothing"
    )
    parser.add_argument("--seconds", type=float, default=5.0, help="how long one measurement of speed takes")
    parser.add_argument("--usd-per-hour", type=float, default=0.05, help="price of a core")
    parser.add_argument(
        "--python",
        type=Path,
        default=os.environ.get("UNDERSTUDY_VLLM_PYTHON") or Path(".venv-vllm/bin/python"),
        help="the Python that has torch and vLLM (default: UNDERSTUDY_VLLM_PYTHON, else .venv-vllm/bin/python)",
    )
    parser.add_argument("--base", type=Path, help="the folder of all-MiniLM-L6-v2 in Hugging Face's form")
    parser.add_argument("--lm-model", type=Path, help="the folder of a language model (default: a tiny one)")
    parser.add_argument(
        "--lm-usd-per-hour", type=float, help="price of what that runs on (default: as a core)"
    )
    parser.add_argument("--cache", type=Path, default=_CACHE, help="where results are kept")
    parser.add_argument(
        "--again", action="store_true", help="measure anew what was measured before; what was learned is kept"
    )
    return parser


def _measure(
    name: str,
    split: Split,
    means: Means,
    prices: PriceList,
    options: argparse.Namespace,
    bar: Progress,
    lesson: Path,
) -> Outcome:
    """Learn one student from one split, and measure it. What was learned is kept in the folder `lesson`."""
    step = bar.add_task(f"  {name}: learning", total=3)
    work = Path(tempfile.mkdtemp(prefix="understudy-students-"))
    try:
        with CANDIDATES[name](means, split, work) as ready:
            known = learned(split, ready.choice, means, work, prices, lesson)
            if ready.server is None and not lesson.is_dir():  # a served one's release knows its server's port
                unfinished = lesson.with_name(f".{lesson.name}")
                shutil.rmtree(unfinished, ignore_errors=True)  # of a run that was killed
                shutil.copytree(known.state_dir, unfinished)
                unfinished.rename(lesson)
            bar.update(step, advance=1, description=f"  {name}: alone")
            requests = [split.request(example.text) for example in split.test]
            probed = probe(
                Job(
                    state_dir=str(known.state_dir),
                    release=known.release.name,
                    core=means.core,
                    pinned=ready.server is None,
                    seconds=options.seconds,
                    requests=requests,
                ),
                work,
            )
            memory = probed.memory_bytes if ready.server is None else session_bytes(ready.server)
            bar.update(step, advance=1, description=f"  {name}: through a gateway")
            through = through_a_gateway(
                known,
                ready.choice,
                means,
                work,
                requests,
                expected_per_s=probed.per_s,
                seconds=options.seconds,
                usd_per_hour=ready.choice.get("usd_per_hour", options.usd_per_hour),
            )
            teacher_usd = [split.teacher_usd(prices, example) for example in split.test]
            latencies = sorted(probed.latencies_s)
            return Outcome(
                student=name,
                seed=split.seed,
                training=len(split.training),
                tested=len(split.test),
                quality=quality_of(
                    probed.answers, split.test, Router.load(known.release.files["router.json"])
                ),
                alone=Alone(
                    start_s=ready.start_s + probed.start_s,
                    memory_bytes=memory,
                    p50_s=statistics.median(latencies),
                    p99_s=latencies[min(len(latencies) - 1, int(0.99 * len(latencies)))],
                    per_s=probed.per_s,
                ),
                through=through,
                disk_bytes=known.bytes_on_disk + ready.model_bytes,
                learning_s=known.release.card["learning"]["core_s"],
                learning_usd=known.release.card["learning"]["usd"],
                teacher_accuracy=sum(one.teacher == one.gold for one in split.test) / len(split.test),
                teacher_usd_per_1000=None
                if None in teacher_usd
                else 1000 * sum(usd or 0.0 for usd in teacher_usd) / len(teacher_usd),
            )
    finally:
        shutil.rmtree(work, ignore_errors=True)
        bar.remove_task(step)


def _show(measured: dict[str, list[Outcome]], missing: dict[str, str], console: Console) -> None:
    every: Sequence[Outcome] = [one for found in measured.values() for one in found]
    if every:
        console.print(table_of(measured))
        console.print(teacher_line(every), markup=False, highlight=False)
        console.print(
            f"learned from {every[0].training:,} messages (an encoder and the tiny lm are trained on 70 % of them, and "
            f"judged by the rest), tested on {every[0].tested:,}; {platform.machine()}, "
            f"{os.cpu_count()} cores, Python {platform.python_version()}, NumPy {np.__version__}{_versions()}",
            highlight=False,
        )
    for name, why in missing.items():
        console.print(f"{name}: not measured: {why}", markup=False, highlight=False)


def _versions() -> str:
    said = ""
    for package in ("onnxruntime", "scikit-learn"):
        try:
            said += f", {package} {version(package)}"
        except PackageNotFoundError:
            continue
    return said
