"""vLLM as a child of `understudy serve --vllm`: started, watched, started again, ended.

    starting ── /health and /v1/models say so ──→ ready ── ends, hangs, or answers nothing ──→ waiting ──→ starting …
             ── ends, or isn't ready in time ───────────────────────────────────────────────↗

Once per gateway, in a thread of the process that was started as `serve` (with several workers, their supervisor): its
event loop has nothing to do with that of requests. It is held on a leash (serving/leash.py), so that it and its own
children end with us, however we end. Where it is, and with which key, stands in `state/vllm.json`
(serving/vllm_place.py). Nothing waits for it: as long as it isn't there, the teacher answers.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
import random
import secrets
import signal
import socket
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from gateway.reload import reloadable
from gateway.vllm_log import VllmLog
from gateway.vllm_probe import VllmProbe
from serving import leash
from serving.settings import Settings
from serving.student_settings import VllmSettings
from serving.vllm_command import (
    INSTALL_VLLM,
    command_of,
    environment_of,
    not_there,
    served_name,
    without_secrets,
)
from serving.vllm_place import Phase, VllmPlace, lock_file, remove_place, write_place

log = logging.getLogger("understudy.vllm")

_LOCK_EVERY_S = 1.0
_MOST_DOUBLINGS = 10
_LONGEST_PAUSE_S = 60.0
_EXIT_EVERY_S = 0.1
_NO_VLLM = "No module named 'vllm'"
_LEASH_S = 5.0
"""What the leash may take beyond the grace time."""


@dataclass(frozen=True, slots=True)
class Rhythm:
    """How it is watched, in seconds.

    It is started again after `misses` looks in a row that found it ill, or as many questions that weren't answered.
    What was ready for `settled_s` and then ends is started again at once; else after `first_pause_s`, then twice that,
    up to a minute.
    """

    starting_s: float = 0.5
    look_every_s: float = 5.0
    look_s: float = 10.0
    ask_every_s: float = 30.0
    patience_s: float = 30.0
    misses: int = 3
    settled_s: float = 60.0
    first_pause_s: float = 1.0
    grace_s: float = 10.0


class Vllm:
    """A vLLM as the settings want it, while the context lasts."""

    def __init__(self, settings: Settings, *, rhythm: Rhythm | None = None) -> None:
        self._settings = settings
        self._rhythm = rhythm or Rhythm()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._begun = threading.Event()
        self._thread = threading.Thread(target=self._work, name="vLLM")
        self._changed = asyncio.Event()
        self._ended = False
        self._restarts = 0

    def __enter__(self) -> Self:
        self._thread.start()
        self._begun.wait()
        return self

    def __exit__(self, *_: object) -> None:
        self._tell(self._settings, ended=True)
        self._thread.join()

    def adopt(self, settings: Settings) -> None:
        """Go on by a reloaded configuration: the child stays if its own settings are the same.

        What only a restart changes stays, whoever was told of it.
        """
        self._tell(reloadable(self._settings, settings)[0], ended=False)

    def _tell(self, settings: Settings, *, ended: bool) -> None:
        def take() -> None:
            news = ended or settings.student.vllm != self._settings.student.vllm
            self._settings, self._ended = settings, ended
            if news:
                self._changed.set()

        with contextlib.suppress(RuntimeError):  # the thread is through already
            if self._loop is not None:
                self._loop.call_soon_threadsafe(take)

    def _work(self) -> None:
        try:
            asyncio.run(self._run())
        except Exception:
            log.exception("vLLM isn't looked after any more; restart the gateway to have it back")
        finally:
            self._begun.set()

    async def _run(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._begun.set()
        state_dir = self._settings.state_dir
        told = False
        while not self._ended:
            lock = lock_file(state_dir)
            if lock is None:
                if not told:
                    log.warning("another process runs a vLLM for %s: that one is used", state_dir)
                    told = True
                await self._pause(_LOCK_EVERY_S)
                continue
            with lock:
                try:
                    await self._keep(state_dir)
                finally:
                    remove_place(state_dir)

    async def _keep(self, state_dir: Path) -> None:
        """Have one run until we end."""
        failures = 0
        while not self._ended:
            self._changed.clear()
            wanted = self._settings.student.vllm
            if wanted is None or wanted.model is None:
                remove_place(state_dir)
                await self._changed.wait()
                continue
            life = _Life(self._settings, wanted, self._rhythm, restarts=self._restarts)
            error = await life.live(self._changed)
            if error is None:  # it was ended, by us
                failures = 0
                continue
            self._restarts += 1
            failures = 0 if life.settled else failures + 1
            doubled_s = self._rhythm.first_pause_s * 2.0 ** min(failures - 1, _MOST_DOUBLINGS)
            pause_s = min(_LONGEST_PAUSE_S, doubled_s) * random.uniform(0.75, 1.25) if failures else 0.0
            log.error(
                "vLLM %s; it is started again in %.1f s, and the teacher answers meanwhile", error, pause_s
            )
            life.say("waiting", restarts=self._restarts, error=error)
            await self._pause(pause_s)

    async def _pause(self, seconds: float) -> None:
        """Wait, unless there is news."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._changed.wait()
        self._changed.clear()


class _Life:
    """One vLLM from its start to its end. `settled`: it was ready for long enough to be thought well."""

    def __init__(self, settings: Settings, vllm: VllmSettings, rhythm: Rhythm, *, restarts: int) -> None:
        self._settings = settings
        self._vllm = vllm
        self._rhythm = rhythm
        self._ready_at: float | None = None
        self._group: int | None = None
        key = secrets.token_urlsafe(32)
        self._log = VllmLog([key, *without_secrets(vllm.args)[1]], on_line=self._hear)
        self._place = VllmPlace("starting", "", key, served_name(vllm), restarts)

    @property
    def settled(self) -> bool:
        """Whether it was ready for a while."""
        return self._ready_at is not None and time.monotonic() - self._ready_at >= self._rhythm.settled_s

    def say(self, phase: Phase, *, restarts: int, error: str | None) -> None:
        """Write down how it is."""
        self._place = dataclasses.replace(self._place, phase=phase, restarts=restarts, error=error)
        try:
            write_place(self._settings.state_dir, self._place)
        except OSError as failure:
            log.error("where vLLM is can't be written to %s: %s", self._settings.state_dir, failure.strerror)

    async def live(self, changed: asyncio.Event) -> str | None:
        """Run it until it ends or something changes; return why it ended, None if that was our will."""
        missing = not_there(self._vllm)
        if missing is not None:
            return f"can't be started: {missing}"
        try:
            leash_, output = await self._started()
        except OSError as error:
            return f"can't be started: {error.strerror or error}"
        self.say("starting", restarts=self._place.restarts, error=None)
        watch = asyncio.ensure_future(self._watch())
        ended = asyncio.ensure_future(_exited(leash_))
        told = asyncio.ensure_future(changed.wait())
        reading = asyncio.ensure_future(self._log.follow(output))
        try:
            await asyncio.wait([watch, ended, told], return_when=asyncio.FIRST_COMPLETED)
            if ended.done():
                code = ended.result()
                if code < 0:
                    self._kill_group()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_LEASH_S):
                        await asyncio.shield(reading)
                when = "has ended" if self._ready_at else "ended before it was ready"
                return f"{when}, {self._cause(code)}"
            if watch.done():
                return watch.result()
            return None
        finally:
            for task in (watch, told):
                task.cancel()
            await asyncio.wait([watch, told])
            await self._end(leash_)
            reading.cancel()
            ended.cancel()
            await asyncio.wait([reading, ended])

    async def _started(self) -> tuple[asyncio.subprocess.Process, asyncio.StreamReader]:
        port = self._vllm.port or _free_port(self._vllm.host)
        self._place = dataclasses.replace(self._place, url=_root_url(self._vllm.host, port))
        command = command_of(self._vllm, port)
        log.info("vLLM starts: %s", " ".join(without_secrets(command)[0]))
        child = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-I", "-S", str(Path(leash.__file__))),
            str(self._rhythm.grace_s),
            *command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env=environment_of(self._settings, self._vllm, self._place.key),
            start_new_session=True,  # a Ctrl-C is for us: requests under way still need it
        )
        if child.stdout is None:
            raise RuntimeError("a pipe was asked for")
        return child, child.stdout

    async def _watch(self) -> str:
        """Say that it is ready once it is; return what is wrong with it from then on."""
        rhythm = self._rhythm
        probe = VllmProbe(self._place.url, self._place.key, self._place.model, self._vllm.runner)
        try:
            began = time.monotonic()
            while not (await probe.is_healthy(2.0) and await probe.names_model()):
                if time.monotonic() - began > self._vllm.ready_timeout_s:
                    return (
                        f"wasn't ready within {self._vllm.ready_timeout_s:g} s (student.vllm.ready_timeout_s); "
                        f"last it said: {self._log.why()}"
                    )
                await asyncio.sleep(rhythm.starting_s)
            self._ready_at = time.monotonic()
            log.info("vLLM is ready at %s after %.1f s", self._place.url, self._ready_at - began)
            self.say("ready", restarts=self._place.restarts, error=None)
            return await self._until_ill(probe)
        finally:
            await probe.aclose()

    async def _until_ill(self, probe: VllmProbe) -> str:
        rhythm = self._rhythm
        ill = silent = 0
        asked_at = time.monotonic()
        while True:
            await asyncio.sleep(rhythm.look_every_s)
            ill = 0 if await probe.is_healthy(rhythm.look_s) else ill + 1
            if ill >= rhythm.misses:
                return f"wasn't healthy {ill} times in a row (GET /health)"
            if ill == 0 and time.monotonic() - asked_at >= rhythm.ask_every_s:
                silent = 0 if await probe.answers(rhythm.patience_s) else silent + 1
                asked_at = time.monotonic()
                if silent >= rhythm.misses:
                    return f"is healthy by its own account and answered nothing, {silent} times {rhythm.patience_s:g} s"

    async def _end(self, child: asyncio.subprocess.Process) -> None:
        """Let go of the leash, which ends the whole group; should it fail to, end that ourselves."""
        if child.stdin is not None:
            child.stdin.close()
        try:
            async with asyncio.timeout(self._rhythm.grace_s + _LEASH_S):
                code = await _exited(child)
        except TimeoutError:
            child.kill()
            code = await _exited(child)
        if code < 0:
            self._kill_group()

    def _kill_group(self) -> None:
        """Do what a leash would have done that was killed."""
        if self._group is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._group, signal.SIGKILL)

    def _hear(self, line: str) -> bool:
        """Take the leash's own line: the group of the child."""
        word, _, pid = line.partition(" ")
        if word != "leash:" or self._group is not None or not pid.isdigit():
            return False
        self._group = int(pid)
        return True

    def _cause(self, code: int) -> str:
        by = code - 128 if code > 128 else -code
        if by > 0 and by in signal.Signals.__members__.values():
            name = signal.Signals(by).name
            hint = ": out of memory, perhaps" if name == "SIGKILL" else ""
            return f"by {name}{hint}; last it said: {self._log.why()}"
        why = self._log.why()
        return f"with exit code {code}: {why}{f'; {INSTALL_VLLM}' if _NO_VLLM in why else ''}"


async def _exited(child: asyncio.subprocess.Process) -> int:
    """Wait for the exit code. `child.wait` waits for the end of its output as well, which others may hold open."""
    while child.returncode is None:  # noqa: ASYNC110 - no event tells
        await asyncio.sleep(_EXIT_EVERY_S)
    return child.returncode


def _free_port(host: str) -> int:
    """A port nobody listens on now. Raises OSError for a host that isn't ours."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, 0), family=family) as free:
        port: int = free.getsockname()[1]
        return port


def _root_url(host: str, port: int) -> str:
    """Where to reach what listens there, from this machine."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - nothing is bound here
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
