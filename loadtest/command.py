"""`understudy replay` from its options to its exit code: brings up a stack where none is given."""

from __future__ import annotations

import contextlib
import math
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import orjson
from rich.console import Console

from loadtest.replay import Replay, Target, order, replay
from loadtest.stack import Plan, running
from loadtest.table import show
from serving.configuration import load_settings
from serving.errors import ConfigError
from serving.recording import Answers, Recording, read_recording
from serving.task_settings import TaskPolicy


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayOptions:
    """The options of `understudy replay`, as given; its help says what they mean."""

    file: Path
    base_url: str | None = None
    config: Path | None = None
    task: str | None = None
    system_prompt: Path | None = None
    answers: str = "teacher"
    seed: int | None = None
    seed_file: Path | None = None
    limit: int | None = None
    concurrency: int = 4
    learn_every: int = 0
    wait: bool = True
    max_disagreement: float | None = None
    certainty: float | None = None
    price: str = "2.5,10"
    latency_ms: float | None = None
    model: str | None = None
    api_key_env: str = "OPENAI_API_KEY"
    work: Path | None = None


def run_replay(options: ReplayOptions, *, as_json: bool) -> int:
    """Run a replay and print its results to stdout; progress goes to stderr.

    Returns the exit code: 0, 1 when requests failed, 130 when it was interrupted. Raises UnderstudyError for
    bad input (exit code 2).
    """
    column: Answers = "gold" if options.answers == "gold" else "teacher"
    if options.answers not in ("teacher", "gold"):
        raise ConfigError(f"--answers must be teacher or gold, got {options.answers!r}")
    recording = read_recording(options.file, answers=column)
    seeds = read_recording(options.seed_file, answers="gold") if options.seed_file is not None else None
    policy = _policy(options)
    plan = Replay(
        rows=order(recording.rows, seed=options.seed, limit=options.limit),
        seed_rows=seeds.rows if seeds is not None else (),
        system_prompt=_read_prompt(options.system_prompt),
        concurrency=options.concurrency,
        learn_every=options.learn_every,
        wait=options.wait,
        max_disagreement=policy.max_disagreement,
    )
    rows = recording.rows + (seeds.rows if seeds is not None else ())
    with _target(options, Recording(recording.path, rows), policy) as target:
        results = replay(target, plan, Console(stderr=True))
    if as_json:
        print(orjson.dumps(results.to_json()).decode())
    else:
        show(results, Console())
    return 130 if results.interrupted else 1 if results.failed else 0


def _policy(options: ReplayOptions) -> TaskPolicy:
    """Return the promise: of the options, or of the gateway's configuration."""
    given = {
        name: value
        for name, value in (("max_disagreement", options.max_disagreement), ("certainty", options.certainty))
        if value is not None
    }
    for name, value in given.items():
        if not 0 < value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} must be between 0 and 1, got {value}")
    if options.base_url is not None and options.config is not None:
        return load_settings(options.config).for_task(options.task or "replay").model_copy(update=given)
    return TaskPolicy().model_copy(update=given)


@contextlib.contextmanager
def _target(options: ReplayOptions, recording: Recording, policy: TaskPolicy) -> Iterator[Target]:
    """Give the gateway at `--base-url`, or one of our own whose stand-in answers from `recording`."""
    model = options.model or recording.model or "stand-in"
    if options.base_url is not None:
        if not options.base_url.startswith(("http://", "https://")):
            raise ConfigError(f"--base-url must begin with http:// or https://, got {options.base_url!r}")
        of_our_own = {
            "--max-disagreement": options.max_disagreement,
            "--certainty": options.certainty,
            "--latency-ms": options.latency_ms,
            "--work": options.work,
        }
        useless = [name for name, value in of_our_own.items() if value is not None]
        if useless:
            raise ConfigError(
                f"{', '.join(useless)}: of the gateway and the teacher that a replay starts itself; those at "
                "--base-url go by their own configuration"
            )
        key = os.environ.get(options.api_key_env) or "unused"
        yield Target(options.base_url.rstrip("/"), model, key, options.task, options.config)
        return
    if options.config is not None:
        raise ConfigError("--config is of the gateway at --base-url; without one the replay starts its own")
    task = options.task or "replay"
    with contextlib.ExitStack() as stack:
        work = options.work
        if work is None:
            work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="understudy-replay-")))
        elif work.exists() and any(work.iterdir()):
            raise ConfigError(f"--work {work} isn't empty; a replay starts from nothing")
        work.mkdir(parents=True, exist_ok=True)
        answers = work / "recording.jsonl"
        recording.write(answers)
        own = stack.enter_context(
            running(
                Plan(
                    recording=answers,
                    work=work,
                    task=task,
                    max_disagreement=policy.max_disagreement,
                    certainty=policy.certainty,
                    price=_price(options.price),
                    latency_ms=options.latency_ms,
                    model=model,
                )
            )
        )
        yield Target(own.base_url, model, "unused", task, own.config, own)


def _price(text: str) -> tuple[float, float]:
    try:
        prices = [float(part) for part in text.split(",")]
    except ValueError:
        prices = []
    if len(prices) != 2 or not all(0 <= price < math.inf for price in prices):
        raise ConfigError(f"--price must be two numbers such as 2.5,10 (input,output), got {text!r}")
    return prices[0], prices[1]


def _read_prompt(path: Path | None) -> str | None:
    if path is None:
        return None
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--system-prompt {path} can't be read: {error}") from error
