"""A stand-in and a gateway as child processes on loopback, from a recording: what replay and demo run on.

They are the real commands (`understudy stand-in`, `understudy serve`), started from this very installation,
with a configuration written for them. Settings from the environment (`UNDERSTUDY_…`) are kept away, so that
runs repeat.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from serving.errors import UnderstudyError

KEY_VARIABLE = "STAND_IN_API_KEY"
"""Holds the gateway's key for the stand-in: with one of its own it doesn't forward its clients'."""

_ROOT = Path(__file__).resolve().parents[1]
_START_S = 30.0
_STOP_S = 10.0


class StackError(UnderstudyError):
    """A process of the stack did not start, or died; the message holds its last lines."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What the stack is made of.

    `recording` is what the stand-in answers from, `work` the folder for configuration, logs and state. `task`
    is the one configured task, which takes all requests for `model`, the stand-in's name. `price` is USD per
    million tokens of input and of output. `latency_ms` is the stand-in's median; None: as recorded. `port` 0
    takes a free one.
    """

    recording: Path
    work: Path
    task: str
    max_disagreement: float
    certainty: float
    price: tuple[float, float]
    latency_ms: float | None = 0.0
    port: int = 0
    learn_interval_s: float = 0.0
    model: str = "stand-in"
    stand_in_options: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Stack:
    """A running stack. URLs end in `/v1`."""

    base_url: str
    stand_in_url: str
    config: Path
    state_dir: Path
    children: list[Child] = field(default_factory=list)

    def check(self) -> None:
        """Raise StackError if one of the processes has ended."""
        for child in self.children:
            child.check()

    def wait(self) -> None:
        """Return when one of the processes has ended."""
        while all(child.alive for child in self.children):
            time.sleep(0.2)


class Child:
    """One child process whose output goes to a file.

    It is in a session of its own, so that a Ctrl-C in the terminal reaches us alone, and we stop in order. `checkout`
    is the folder whose code it runs; None: ours.
    """

    def __init__(
        self,
        name: str,
        arguments: Sequence[str],
        log: Path,
        *,
        module: str = "understudy",
        checkout: Path | None = None,
    ) -> None:
        self.name = name
        self.log = log
        with log.open("wb") as output:
            self._process = subprocess.Popen(  # noqa: S603 - our own command
                command(*arguments, module=module),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment(checkout=checkout),
                start_new_session=True,
            )

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self._process.poll() is None

    @property
    def pid(self) -> int:
        """The process's id, which is also that of its session."""
        return self._process.pid

    def kill(self, *, whole_session: bool = False) -> None:
        """End the process as a power cut would, with all it has started if `whole_session`."""
        with contextlib.suppress(ProcessLookupError):
            if whole_session:
                os.killpg(self.pid, signal.SIGKILL)
            else:
                self._process.kill()
        self._process.wait()

    def check(self) -> None:
        """Raise StackError if the process has ended."""
        if not self.alive:
            raise StackError(self._epitaph(f"ended with exit code {self._process.returncode}"))

    def wait_for(self, found: str) -> str:
        """Return the first line of the output that holds `found`; raise StackError if none comes."""
        deadline = time.monotonic() + _START_S
        while time.monotonic() < deadline:
            lines = self.log.read_text(errors="replace").splitlines(keepends=True)
            for line in lines:
                if found in line and line.endswith("\n"):
                    return line.strip()
            self.check()
            time.sleep(0.02)
        raise StackError(self._epitaph(f"did not start within {_START_S:.0f} s"))

    def wait_until_ready(self, url: str) -> None:
        """Return when `url` answers 200; raise StackError if the process ends or takes too long."""
        deadline = time.monotonic() + _START_S
        while time.monotonic() < deadline:
            with (
                contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError),
                urllib.request.urlopen(url, timeout=1.0),  # noqa: S310 - our own http URL
            ):
                return
            self.check()
            time.sleep(0.05)
        raise StackError(self._epitaph(f"was not ready within {_START_S:.0f} s"))

    def stop(self) -> None:
        """End the process and wait for it: SIGTERM, and SIGKILL if that doesn't do."""
        if not self.alive:
            return
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _epitaph(self, what: str) -> str:
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        said = " | ".join(line.strip() for line in lines[-5:]) or "nothing"
        return f"the {self.name} {what}; it said: {said}"


@contextlib.contextmanager
def running(plan: Plan) -> Iterator[Stack]:
    """Run a stack while the context lasts. Raises StackError, with the last words of what can't start."""
    plan.work.mkdir(parents=True, exist_ok=True)
    children: list[Child] = []
    with stoppable(), _stopped(children):
        options = ["--model", plan.model, *plan.stand_in_options]
        if plan.latency_ms is not None:
            options += ["--latency-ms", str(plan.latency_ms)]
        stand_in, stand_in_url = start_stand_in(plan.recording, plan.work / "stand-in.log", *options)
        children.append(stand_in)
        state_dir = plan.work / "state"
        config = plan.work / "understudy.toml"
        config.write_text(configuration(plan, stand_in_url, state_dir), encoding="utf-8")
        gateway, base_url = start_gateway(config, plan.work / "gateway.log")
        children.append(gateway)
        yield Stack(base_url, stand_in_url, config, state_dir, children)


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Have a SIGTERM become a KeyboardInterrupt (in the main thread), so that no child process is left behind."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _stopped(children: list[Child]) -> Iterator[None]:
    try:
        yield
    finally:
        for child in reversed(children):  # the gateway first: it may still owe audits to its teacher
            child.stop()


def start_stand_in(recording: Path, log: Path, *options: str) -> tuple[Child, str]:
    """Start a stand-in on a free port; gives it and its URL, which ends in `/v1`, once it answers.

    Raises StackError, with its last words and nothing left behind, if it doesn't start.
    """
    child = Child("stand-in", ["stand-in", str(recording), "--port", "0", *options], log)
    with _ended_if_it_fails(child):
        return child, child.wait_for("answers on http").rpartition(" ")[2]


def start_gateway(config: Path, log: Path, *options: str, checkout: Path | None = None) -> tuple[Child, str]:
    """Start a gateway; gives it and its base URL, which ends in `/v1`, once it is ready.

    `checkout` is the folder whose code it runs; None: ours. Raises StackError, with its last words and nothing left
    behind, if it doesn't start.
    """
    child = Child("gateway", ["serve", "--config", str(config), *options], log, checkout=checkout)
    with _ended_if_it_fails(child):
        address = child.wait_for("listens on http").partition("listens on ")[2].split()[0]
        child.wait_until_ready(f"{address}/readyz")
        return child, f"{address}/v1"


@contextlib.contextmanager
def _ended_if_it_fails(child: Child) -> Iterator[None]:
    try:
        yield
    except BaseException:
        child.kill(whole_session=True)
        raise


def configuration(plan: Plan, stand_in_url: str, state_dir: Path) -> str:
    """Return the gateway's configuration as TOML."""

    def text(value: object) -> str:
        return json.dumps(str(value), ensure_ascii=False)

    return f"""\
state_dir = {text(state_dir)}

[server]
port = {plan.port}

[teacher]
base_url = {text(stand_in_url)}
api_key_env = {text(KEY_VARIABLE)}
trainable = true
price = {{ input = {plan.price[0]}, output = {plan.price[1]} }}

[learning]
interval_s = {plan.learn_interval_s}

[[task]]
name = {text(plan.task)}
max_disagreement = {plan.max_disagreement}
certainty = {plan.certainty}
noise_rate = 0  # calls to the teacher are counted by what was asked
match = {{ model = {text(plan.model)} }}
"""


def command(*arguments: str, module: str = "understudy") -> list[str]:
    """Return the command line of one of our own commands, in this very installation."""
    return [sys.executable, "-P", "-m", module, *arguments]


def environment(*, bare: bool = True, checkout: Path | None = None) -> dict[str, str]:
    """Return the environment of child processes: ours; with `bare` less what would change a configuration.

    Imports come from `checkout` first; None: from where ours do.
    """
    kept = {
        name: value
        for name, value in os.environ.items()
        if not (bare and name.upper().startswith("UNDERSTUDY_"))
    }
    path = os.pathsep.join(part for part in (str(checkout or _ROOT), kept.get("PYTHONPATH", "")) if part)
    return {**kept, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", KEY_VARIABLE: "stand-in"}
