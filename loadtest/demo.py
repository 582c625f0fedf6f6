"""`understudy demo`: the main job on the example messages, from nothing to a student that answers.

A stand-in plays the teacher with its recorded answers and a human-like price, a gateway starts with an empty
state, the messages flow, and a student is learned from the log, released, and takes over what it is sure of.
Then the gateway goes on serving, for whoever wants to try it.
"""

from __future__ import annotations

import shutil
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import orjson
from rich.console import Console

from loadtest.replay import Replay, Target, order, replay
from loadtest.results import Results
from loadtest.stack import Plan, Stack, running
from loadtest.table import show
from serving.errors import ConfigError
from serving.log import LogReader
from serving.recording import Recorded, read_recording

MODEL = "stand-in"
TASK = "parcels"
PRICE = (2.5, 10.0)
"""USD per million tokens of input and output: what a large general model costs (GPT-4o's list price)."""

_MARKER = ".understudy-demo"
_LATENCY_MS = 30.0
_CONCURRENCY = 4
_LEARN_EVERY = 100
_MAX_DISAGREEMENT = 0.1
_CERTAINTY = 0.9


@dataclass(frozen=True, slots=True)
class Demo:
    """Where the demo runs: the gateway's port, and the folder for its state, which is emptied first."""

    port: int = 8080
    work: Path = Path("demo-state")
    seed: int = 1


def example(name: str) -> Path:
    """Return the path of an example file: beside this module where installed, else in the checkout."""
    here = Path(__file__).resolve().parent
    for folder in (here / "recordings", here.parent / "examples"):
        if (folder / name).is_file():
            return folder / name
    raise ConfigError(f"the example file {name} is missing; reinstall understudy, or run from a checkout")


def run_demo(demo: Demo, console: Console, *, stay: bool) -> Results:
    """Run the demo and return what it showed; with `stay`, go on serving until Ctrl-C.

    Raises ConfigError when the port is taken or the folder isn't a demo's, StackError when something died.
    """
    _check_port(demo.port)
    work = _emptied(demo.work)
    recording = read_recording(example("parcels.csv"))
    prompt = example("system_prompt.txt").read_text(encoding="utf-8").strip()
    stack_plan = Plan(
        recording=recording.path,
        work=work,
        task=TASK,
        max_disagreement=_MAX_DISAGREEMENT,
        certainty=_CERTAINTY,
        price=PRICE,
        latency_ms=_LATENCY_MS,
        port=demo.port,
        model=MODEL,
    )
    console.print(
        f"{len(recording):,} messages to a parcel company; a stand-in answers as the teacher. The promise: "
        f"at most {_MAX_DISAGREEMENT:.0%} of the student's answers disagree with it, "
        f"with {_CERTAINTY:.0%} certainty.",
        highlight=False,
    )
    with running(stack_plan) as stack:
        target = Target(stack.base_url, MODEL, "unused", TASK, stack.config, stack)
        rows = order(recording.rows, seed=demo.seed, limit=None)
        plan = Replay(
            rows=rows,
            system_prompt=prompt,
            concurrency=_CONCURRENCY,
            learn_every=_LEARN_EVERY,
            max_disagreement=_MAX_DISAGREEMENT,
        )
        results = replay(target, plan, console)
        show(results, console)
        if stay and not results.interrupted:
            _stay(stack, work, prompt, _typical_text(stack, rows), console)
    return results


def _check_port(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise ConfigError(
                f"port {port} can't be used ({error.strerror}); stop what listens there, or choose another: "
                f"understudy demo --port {port + 1 if port < 65535 else 8081}"
            ) from error


def _emptied(work: Path) -> Path:
    """Return the folder, empty but for its marker. Nothing is deleted that an earlier demo didn't make."""
    marker = work / _MARKER
    if work.exists():
        if not work.is_dir() or (any(work.iterdir()) and not marker.is_file()):
            raise ConfigError(
                f"{work} isn't the folder of an earlier demo; move it, or choose another: --state DIR"
            )
        shutil.rmtree(work)
    work.mkdir(parents=True)
    marker.write_text(
        "understudy demo made this folder, and empties it when it runs again.\n", encoding="utf-8"
    )
    return work


def _typical_text(stack: Stack, rows: Sequence[Recorded]) -> str:
    """Return the message that the student answered last, so that a first try shows it at work."""
    for exchange in reversed(LogReader(stack.state_dir).exchanges(TASK).exchanges):
        text = exchange.request["messages"][-1]["content"]
        if exchange.route == "student" and isinstance(text, str):
            return text
    return rows[-1].text


def _stay(stack: Stack, work: Path, prompt: str, text: str, console: Console) -> None:
    """Print how to talk to the gateway, and wait for Ctrl-C."""
    body = {
        "model": MODEL,
        "messages": [{"role": "system", "content": prompt}, {"role": "user", "content": text}],
    }
    request = work.resolve() / "request.json"
    request.write_bytes(orjson.dumps(body, option=orjson.OPT_INDENT_2))
    console.out("\nThe gateway goes on serving. In another terminal:\n")
    console.out(
        f"curl -i {stack.base_url}/chat/completions -H 'content-type: application/json' -d @{request}\n"
    )
    console.out("or, from Python:\n")
    console.out(_SNIPPET.format(base_url=stack.base_url, request=request))
    console.out(
        "Its teacher is the stand-in, which knows the recorded messages only. Ctrl-C stops everything."
    )
    try:
        stack.wait()
    except KeyboardInterrupt:
        return
    stack.check()


_SNIPPET = """\
import json
from openai import OpenAI

client = OpenAI(base_url="{base_url}", api_key="unused")
request = json.load(open("{request}"))
answer = client.chat.completions.with_raw_response.create(**request)
print(answer.parse().choices[0].message.content, answer.headers["x-understudy-route"])
"""
