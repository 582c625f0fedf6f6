"""The event log: appending that survives `kill -9` and a loss of power, and reading that survives damage."""

from __future__ import annotations

import asyncio
import errno
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from serving.disk import Disk
from serving.errors import UnknownTask
from serving.events import Fold, decode, encode
from serving.exchange import Exchange, Json
from serving.forgotten import Stamp, forgotten_stamp, read_forgotten
from serving.layout import is_task_name, task_directory, task_names
from serving.log_settings import LogSettings
from serving.retention import oldest_open_s
from serving.segments import (
    OPEN_SUFFIX,
    SegmentWriter,
    events_directory,
    seal_abandoned,
    segment_lines,
    segment_paths,
)

__all__ = ["EventLog", "LogReader", "ReadResult", "seal_abandoned"]

log = logging.getLogger("understudy.log")

_LOOK_EVERY_S = 0.5


Over = Callable[[OSError | None], None]
"""What is told how writing an event has ended: None, it is durable; an error, it isn't in the log."""


@dataclass(slots=True)
class _Batch:
    """The lines of one task that wait for the same fsync, and who is to be told of each."""

    lines: list[bytes] = field(default_factory=list)
    size: int = 0
    told: list[Over] = field(default_factory=list)
    done: asyncio.Event = field(default_factory=asyncio.Event)

    def end(self, error: OSError | None) -> None:
        """Tell everyone, whatever one of them makes of it.

        One error object can't be raised by many: each raise adds to its traceback.
        """
        self.done.set()
        for over in self.told:
            try:
                over(None if error is None else _again(error))
            except Exception:
                log.exception("the end of writing an event was told to somebody who failed over it")


class EventLog:
    """Appends events; one per process, used from one event loop.

    Group commit: while one batch is being synced in a thread, the next one gathers, so that the number of
    fsyncs follows the disk and not the traffic. Many tasks may be written; a bounded number of files is open,
    and a bounded number of bytes waits for a disk that is too slow.
    """

    def __init__(self, state_dir: Path, settings: LogSettings, *, disk: Disk | None = None) -> None:
        self._state_dir = state_dir
        self._segments = SegmentWriter(
            state_dir,
            segment_bytes=settings.segment_bytes,
            durable=settings.durability == "fsync",
            disk=disk or Disk(),
        )
        # One thread: the writer belongs to it, and two fsyncs at once would only slow each other down.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="event-log")
        self._gathering: dict[str, _Batch] = {}
        self._max_waiting_bytes = settings.max_waiting_bytes
        self._waiting_bytes = 0
        self._writing: _Batch | None = None
        self._flusher: asyncio.Task[None] | None = None
        self._oldest_open_s = oldest_open_s(settings.retention_days)
        self._watch: asyncio.Task[None] | None = None
        self._forgotten_stamp: Stamp | None = None
        self._forgotten: frozenset[str] = frozenset()
        self._closed = False

    def adopt(self, *, retention_days: float | None) -> None:
        """Seal segments from now on early enough for another `log.retention_days`."""
        self._oldest_open_s = oldest_open_s(retention_days)

    async def append(self, task: str, event: Json) -> None:
        """As `add`, and return when the event is durable. A cancelled append is still written."""
        waiter = asyncio.get_running_loop().create_future()

        def over(error: OSError | None) -> None:
            if waiter.done():
                return  # nobody waits any more
            if error is None:
                waiter.set_result(None)
            else:
                waiter.set_exception(error)

        self.add(task, event, over)
        await waiter

    def add(self, task: str, event: Json, over: Over) -> None:
        """Take an event in, and call `over` when it is durable: synced, or with "relaxed" durability written.

        It is encoded before this returns. Raises OSError for what can't be taken in (too much waiting for a slow
        disk, no JSON, no name of a task, log closed), and gives one to `over` for what can't be written (disk full,
        read-only): then the event is not in the log, and the next one tries afresh.
        """
        if self._closed:
            raise OSError(errno.EBADF, "the event log is closed")
        if self._watch is None:
            self._forgotten_stamp = forgotten_stamp(self._state_dir)
            self._forgotten = frozenset(read_forgotten(self._state_dir))
            self._watch = asyncio.create_task(self._keep_watch(), name="event-log watch")
        if event.get("id") in self._forgotten:
            over(None)  # somebody asked for it to be erased: nothing more is written about it
            return
        try:
            if not is_task_name(task):
                task_directory(self._state_dir, task)  # says why not; making a path costs as much as the rest
            line = encode(event)
        except (UnknownTask, ValueError) as error:
            raise OSError(errno.EINVAL, str(error)) from error
        if self._waiting_bytes and self._waiting_bytes + len(line) > self._max_waiting_bytes:
            raise OSError(
                errno.ENOBUFS,
                f"the disk is too slow: {self._waiting_bytes} bytes wait for it already (log.max_waiting_bytes)",
            )
        batch = self._gathering.get(task)
        if batch is None:
            batch = self._gathering[task] = _Batch()
        batch.lines.append(line)
        batch.size += len(line)
        batch.told.append(over)
        self._waiting_bytes += len(line)
        if self._flusher is None:
            self._flusher = asyncio.create_task(self._flush(), name="event-log flush")

    async def settled(self) -> None:
        """Return when writing has ended, one way or the other, of all that was taken in until now."""
        batches = [*self._gathering.values(), *([] if self._writing is None else [self._writing])]
        for batch in batches:
            await batch.done.wait()

    async def aclose(self) -> None:
        """Write what was appended, seal the segments, stop the thread. May be called twice."""
        if self._closed:
            return
        self._closed = True
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.wait([self._watch])
        if self._flusher is not None:
            await asyncio.wait([self._flusher])
        await asyncio.get_running_loop().run_in_executor(self._thread, self._segments.close)
        self._thread.shutdown()

    async def _keep_watch(self) -> None:
        """Seal what has been open for too long, or holds what is to be forgotten: only sealed segments change."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(_LOOK_EVERY_S)
            stamp = await loop.run_in_executor(self._thread, forgotten_stamp, self._state_dir)
            if stamp != self._forgotten_stamp:
                forgotten = await loop.run_in_executor(self._thread, read_forgotten, self._state_dir)
                self._forgotten_stamp, self._forgotten = stamp, frozenset(forgotten)
                # What was gathered before goes into the segments that are sealed now.
                for batch in list(self._gathering.values()):
                    await batch.done.wait()
                await loop.run_in_executor(self._thread, self._segments.close)
            await loop.run_in_executor(self._thread, self._segments.seal_older_than, self._oldest_open_s)

    async def _flush(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            while self._gathering:
                task = next(iter(self._gathering))  # the one that has waited longest
                batch = self._writing = self._gathering.pop(task)
                error = None
                try:
                    await loop.run_in_executor(
                        self._thread, self._segments.append, task, b"".join(batch.lines)
                    )
                except OSError as failure:
                    error = failure
                self._ended(batch, error)
        except BaseException as error:
            # Cancelled with the loop, or a bug: nobody may wait forever for an fsync that won't come.
            for waiting in (self._writing, *self._gathering.values()):
                if waiting is not None and not waiting.done.is_set():
                    self._ended(waiting, OSError(errno.ECANCELED, f"the event log stopped: {error!r}"))
            self._gathering.clear()
            raise
        finally:
            self._writing = None
            self._flusher = None

    def _ended(self, batch: _Batch, error: OSError | None) -> None:
        self._waiting_bytes -= batch.size
        batch.end(error)


def _again(error: OSError) -> OSError:
    """The same error as a new object (of the same subclass: OSError chooses it by its number)."""
    if error.filename is None:
        return OSError(error.errno, error.strerror or str(error))
    return OSError(error.errno, error.strerror, str(error.filename))


@dataclass(frozen=True, slots=True)
class ReadResult:
    """What a task's log holds.

    `exchanges` are ordered by (created, id). `damaged` counts lines that were skipped (torn, foreign, wrong
    checksum, wrong types) and files that couldn't be read; `unknown` counts intact events of another
    version; `segments` the files. `unanswered_usd` is what requests cost whose clients left before the
    teacher's answer was whole (an estimate); they are no exchanges.
    """

    exchanges: list[Exchange]
    damaged: int
    segments: int
    unknown: int = 0
    unanswered_usd: float = 0.0


class LogReader:
    """Reads the log while others write it. Damage is counted, never raised."""

    def __init__(self, state_dir: Path) -> None:
        self._state_dir = state_dir

    def tasks(self) -> list[str]:
        """The tasks that have a log, sorted."""
        return [
            task for task in task_names(self._state_dir) if events_directory(self._state_dir, task).is_dir()
        ]

    def exchanges(self, task: str) -> ReadResult:
        """The exchanges of a task; none for a task without a log.

        Raises UnknownTask for what can't be a task's name.
        """
        fold = Fold()
        damaged = unknown = segments = 0
        for path in segment_paths(self._state_dir, task):
            segments += 1
            try:
                for line in segment_lines(path):
                    event = decode(line)
                    outcome = "damaged" if event is None else fold.add(event)
                    damaged += outcome == "damaged"
                    unknown += outcome == "unknown"
            except FileNotFoundError:
                segments -= 1  # removed while we read
            except OSError:
                damaged += 1
        exchanges = sorted(fold.exchanges().values(), key=lambda exchange: (exchange.created, exchange.id))
        return ReadResult(exchanges, damaged, segments, unknown, fold.unanswered_usd)

    def newest(self, task: str) -> int:
        """Bytes of a task's log on disk: grows with every event, a cheap way to see whether there is news."""
        size = 0
        for path in segment_paths(self._state_dir, task):
            for name in (path, path.with_name(path.name + OPEN_SUFFIX)):
                try:
                    size += name.stat().st_size
                    break
                except OSError:
                    continue
        return size
