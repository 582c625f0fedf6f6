"""What must happen once, however many workers there are: sealing, retention, audits, unloading, the watch, learning.

Every worker runs a keeper; the one that holds `flock(state_dir/keeper.lock)` works, the others wait for it
to die. That is simpler than a process of its own: nothing has to be supervised, one worker is enough for
everything, and the kernel hands the lock over when a worker ends, however it ends. What costs CPU
(learning) is a child process anyway.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

from gateway.audits import Audits
from gateway.metrics import Metrics
from gateway.tasks import OVERFLOW
from gateway.watcher import Watcher
from serving.adapter_tidying import AdapterTidying
from serving.audit_index import AuditIndex
from serving.exchange import Exchange
from serving.log import LogReader, seal_abandoned
from serving.retention import remove_expired
from serving.task_settings import TaskPolicy

log = logging.getLogger("understudy.keeper")

LOCK = "keeper.lock"
_TRY_AGAIN_S = 1.0
_LOOK_EVERY_S = 30.0
_WATCH_EVERY_S = 2.0
_BUSY_SHARE = 0.05
_NICENESS = 10
_STOP_WITHIN_S = 5.0


class Keeper:
    """Runs in every worker, works in one.

    An audit counts as left over when it is older than `deadline_s`: then no process can still be at it.
    `interval_s`: how often to see whether there is something new to learn; 0: never. `retention_days`: how long the
    log is kept; None: for ever.
    """

    def __init__(
        self,
        state_dir: Path,
        audits: Audits,
        metrics: Metrics,
        *,
        deadline_s: float,
        interval_s: float,
        config_path: Path | None,
        watcher: Watcher,
        retention_days: float | None = None,
        look_every_s: float = _LOOK_EVERY_S,
    ) -> None:
        self._state_dir = state_dir
        self._watcher = watcher
        self._audits = audits
        self._metrics = metrics
        self._reader = LogReader(state_dir)
        self._index = AuditIndex(state_dir)
        self._deadline_s = deadline_s
        self._interval_s = interval_s
        self._config_path = config_path
        self._retention_days = retention_days
        self._look_every_s = look_every_s
        self._adapters = AdapterTidying(state_dir)
        self._learned: dict[str, int] = {}
        self._looked: dict[str, int] = {}
        self._may_be_pending: set[str] = set()
        self._interval_changed = asyncio.Event()

    def adopt(
        self,
        audits: Audits,
        *,
        policy: Callable[[str], TaskPolicy],
        deadline_s: float,
        interval_s: float,
        retention_days: float | None,
    ) -> None:
        """Go on by a reloaded configuration. A child that is learning isn't disturbed: its look is spent."""
        self._audits = audits
        self._watcher.adopt(policy)
        self._deadline_s = deadline_s
        self._retention_days = retention_days
        if interval_s != self._interval_s:
            self._interval_s = interval_s
            self._interval_changed.set()

    async def run(self) -> None:
        """Wait for the lock, then work until cancelled; the child is ended and the lock given back."""
        with (self._state_dir / LOCK).open("w") as lock:
            while not _try_lock(lock):  # noqa: ASYNC110 - a lock of the kernel's, no event tells when it is free
                await asyncio.sleep(_TRY_AGAIN_S)
            log.info("this process (%d) is the keeper", os.getpid())
            async with asyncio.TaskGroup() as group:
                group.create_task(self._keep_house())
                group.create_task(self._keep_watch())
                group.create_task(self._keep_learning())
                group.create_task(self._keep_adapters())

    async def _keep_house(self) -> None:
        while True:
            began = time.monotonic()
            try:
                sealed = await asyncio.to_thread(seal_abandoned, self._state_dir)
                if sealed:
                    log.info("sealed %d segments of processes that are gone", sealed)
                await self._remove_expired()
                taken = self._audits.take_up(await asyncio.to_thread(self.leftovers))
                if taken:
                    log.info("took up %d audits that were left over", taken)
                self._metrics.record_keeper_round()
            except Exception:
                log.exception("keeping house failed; trying again")
            # A long log takes long to read: look less often then.
            await asyncio.sleep(max(self._look_every_s, (time.monotonic() - began) / _BUSY_SHARE))

    async def _keep_watch(self) -> None:
        while True:
            began = time.monotonic()
            try:
                await asyncio.to_thread(self._watcher.look)
            except Exception:
                log.exception("watching the live releases failed; trying again")
            await asyncio.sleep(max(_WATCH_EVERY_S, (time.monotonic() - began) / _BUSY_SHARE))

    async def _keep_adapters(self) -> None:
        """Beside the rest: a server that is away keeps whoever tells it something waiting."""
        while True:
            try:
                await self._adapters.look()
            except Exception:
                log.exception("looking for adapters that nobody needs failed; trying again")
            await asyncio.sleep(self._look_every_s)

    async def _keep_learning(self) -> None:
        while True:
            await self._until_due()
            try:
                sizes = await asyncio.to_thread(self._sizes)
                # What was removed from the log isn't news, and mustn't hide what comes after it.
                self._learned = {task: min(size, self._learned.get(task, 0)) for task, size in sizes.items()}
                if any(size > self._learned.get(task, 0) for task, size in sizes.items() if task != OVERFLOW):
                    self._learned = sizes
                    log.info("the log has grown: learning")
                    await self._learn()
            except Exception:
                log.exception("learning failed; trying again")

    async def _until_due(self) -> None:
        """Sleep for the interval there is at the moment; another one begins anew."""
        while True:
            self._interval_changed.clear()
            try:
                async with asyncio.timeout(self._interval_s or None):
                    await self._interval_changed.wait()
            except TimeoutError:
                return

    async def _remove_expired(self) -> None:
        if self._retention_days is not None:
            removed = await asyncio.to_thread(
                remove_expired, self._state_dir, self._retention_days, now=time.time()
            )
            if removed:
                log.info(
                    "removed %d segments older than %g days (log.retention_days)",
                    removed,
                    self._retention_days,
                )

    def leftovers(self) -> list[Exchange]:
        """Find the pending audits that nobody is at any more. Reads only logs that may hold some."""
        due = time.time() - self._deadline_s
        found = []
        for task, size in self._sizes().items():
            if self._looked.get(task) == size and task not in self._may_be_pending:
                continue
            self._looked[task] = size
            pending = self._index.owed(task)
            # One that is too young now will be due without the log having grown.
            self._may_be_pending.discard(task)
            if pending:
                self._may_be_pending.add(task)
            found += [exchange for exchange in pending if exchange.created < due]
        return found

    def _sizes(self) -> dict[str, int]:
        return {task: self._reader.newest(task) for task in self._reader.tasks()}

    async def _learn(self) -> None:
        """Run `understudy learn --unattended` as a child of low priority, to its end; its output goes into our log."""
        command = [sys.executable, "-m", "understudy", "learn", "--quiet", "--unattended"]
        if self._config_path is not None:
            command += ["--config", str(self._config_path)]
        child = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": _import_path()},
        )
        with contextlib.suppress(ProcessLookupError):
            os.setpriority(os.PRIO_PROCESS, child.pid, _NICENESS)
        try:
            if child.stdout is not None:
                await _pass_on(child.stdout)
            code = await child.wait()
        finally:
            await _end(child)
        self._metrics.record_learning("ended" if code == 0 else "failed")
        if code != 0:
            log.error("`understudy learn` ended with code %d; trying again when the log has grown", code)


async def _pass_on(output: asyncio.StreamReader) -> None:
    """Write what a child says into our log, to its end."""
    while True:
        try:
            line = await output.readline()
        except ValueError:
            continue  # longer than the reader's buffer: what doesn't fit is left out
        if not line:
            return
        log.info("learn: %s", line.decode("utf-8", "replace").rstrip())


async def _end(child: asyncio.subprocess.Process) -> None:
    """End a child: politely, then not."""
    if child.returncode is not None:
        return
    child.terminate()
    try:
        async with asyncio.timeout(_STOP_WITHIN_S):
            await child.wait()
    except TimeoutError:
        child.kill()
        await child.wait()


def _try_lock(lock: IO[str]) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _import_path() -> str:
    """Where `understudy` lies, for a child whose working directory may be another."""
    root = str(Path(__file__).resolve().parents[1])
    known = os.environ.get("PYTHONPATH")
    return f"{root}{os.pathsep}{known}" if known else root
