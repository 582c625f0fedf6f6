"""The releases that are live in this process: loaded off the request path and swapped in one assignment.

`state/tasks/<task>/live` is the one truth; it is looked at every 200 ms (one stat a task). A release that
can't be loaded changes nothing: the one before keeps answering, and the error is logged.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gateway.metrics import Metrics
from gateway.tasks import Tasks
from routers.drift import Drift, Spread
from routers.foresight import Foresight, read_foresight
from routers.meter import TokenMeter
from routers.router import Router
from serving.adapter_shelf import AdapterShelf
from serving.agreement import Comparison
from serving.audit_index import AuditIndex
from serving.engines import Engines
from serving.guarded_student import GuardedStudent
from serving.releases import Release, ReleaseStore
from serving.student import Student
from serving.students import load_student

log = logging.getLogger("understudy.live")

POLL_S = 0.2
_RETIRE_AFTER_S = 30.0
"""A student that was replaced may still be answering; after this long it is closed, once it is through."""
_PREPARED_WITHIN_S = 0.5
_TRY_AGAIN_S = 5.0
"""How long a release that couldn't be loaded is left alone before it is tried again."""


@dataclass(slots=True)
class LiveRelease:
    """One release that answers. Only `accepted_audits` and `drift` ever change.

    `drift` follows its confidence; None where it isn't known from the test, or isn't that of all requests.
    `checksum` is its card's: names and generations are counted anew in every state directory. `kind` is its student's.
    """

    task: str
    name: str
    generation: int
    checksum: str
    kind: str
    student: Student
    router: Router
    comparison: Comparison
    foresight: Foresight | None
    threshold: float | None
    accepted_audits: int
    drift: Drift | None = None

    def note_confidence(self, confidence: float) -> float | None:
        """Take in a request's confidence. Return how far requests have drifted now, if that is followed."""
        if self.drift is None:
            return None
        self.drift.observe(confidence)
        return self.drift.distance


class LiveReleases:
    """What is live, by task."""

    def __init__(
        self,
        state_dir: Path,
        tasks: Tasks,
        metrics: Metrics,
        *,
        redact: Sequence[str] = (),
        engines: Engines | None = None,
    ) -> None:
        self._redact = sorted(redact)
        self._tasks_dir = state_dir / "tasks"
        self._store = ReleaseStore(state_dir)
        self._engines = engines or Engines(adapters=AdapterShelf(state_dir))
        self._audits = AuditIndex(state_dir)
        self._tasks = tasks
        self._metrics = metrics
        self._live: dict[str, LiveRelease] = {}
        self._seen: dict[str, tuple[int, int]] = {}
        self._failed_at: dict[str, float] = {}
        self._retired: list[tuple[float, Student]] = []
        self._preparing: dict[str, asyncio.Task[None]] = {}

    def get(self, task: str) -> LiveRelease | None:
        """Return what is live for a task. Costs a dictionary look-up."""
        return self._live.get(task)

    def names(self) -> dict[str, str]:
        """Return the live release of every task that has one."""
        return {task: live.name for task, live in sorted(self._live.items())}

    def adopt(self, tasks: Tasks, *, redact: Sequence[str]) -> None:
        """Compare answers from now on as a reloaded configuration says. Requests under way keep theirs."""
        self._tasks = tasks
        self._redact = sorted(redact)
        for name, live in self._live.items():
            self._live[name] = dataclasses.replace(live, comparison=tasks.comparison(name))

    async def run(self) -> None:
        """Watch for changes until cancelled. Whatever goes wrong is logged and tried again."""
        while True:
            await asyncio.sleep(POLL_S)
            try:
                await self.refresh()
            except Exception:
                log.exception("looking for new releases failed; trying again")

    async def refresh(self) -> None:
        """Take in every change since the last look."""
        for task, stamp in await asyncio.to_thread(self._changed):
            await self._leave_unprepared(task)
            try:
                loaded = await asyncio.to_thread(self._load, task)
            except Exception as error:
                self._failed(task, error)
            else:
                self._failed_at.pop(task, None)
                preparing = asyncio.create_task(self._prepare(task, loaded))
                self._preparing[task] = preparing
                # Most need nothing. A server that takes its time holds up neither the others nor the start.
                await asyncio.wait([preparing], timeout=_PREPARED_WITHIN_S)
            self._seen[task] = stamp
        await self._close_retired()

    async def _prepare(self, task: str, loaded: LiveRelease | None) -> None:
        """Put a release in its place once it can answer; until then, and if it can't, the one before answers."""
        try:
            if loaded is not None:
                await loaded.student.prepare()
        except Exception as error:
            if loaded is not None:
                await loaded.student.aclose()
            self._failed(task, error)
        except asyncio.CancelledError:
            if loaded is not None:
                await loaded.student.aclose()
            raise
        else:
            self._swap(task, loaded)
        finally:
            self._preparing.pop(task, None)

    async def _leave_unprepared(self, task: str) -> None:
        """Give up what isn't in its place yet."""
        preparing = self._preparing.get(task)
        if preparing is not None:
            preparing.cancel()
            await asyncio.wait([preparing])

    def _failed(self, task: str, error: Exception) -> None:
        # Somebody may put its files back, and a worker that was out of file descriptors has them again: no worker may
        # be left behind for good.
        self._failed_at[task] = time.monotonic()
        log.error("task %s: the release that is live can't be loaded: %s", task, error)

    async def aclose(self) -> None:
        """Close every student."""
        for task in list(self._preparing):
            await self._leave_unprepared(task)
        students = [live.student for live in self._live.values()] + [student for _, student in self._retired]
        self._live, self._retired = {}, []
        for student in students:
            await student.aclose()

    def _changed(self) -> list[tuple[str, tuple[int, int]]]:
        """Return the tasks whose `live` file isn't the one last seen or couldn't be loaded, with its stamp."""
        try:
            folders = [entry for entry in self._tasks_dir.iterdir() if entry.is_dir()]
        except FileNotFoundError:
            return []
        changed = []
        due = time.monotonic() - _TRY_AGAIN_S
        for folder in folders:
            try:
                found = (folder / "live").stat()
            except OSError:
                continue  # none, or a folder that isn't ours to read (lost+found): the other tasks go on
            # Replaced by rename: two changes within the clock's tick still differ in their inode.
            stamp = (found.st_mtime_ns, found.st_ino)
            if self._seen.get(folder.name) != stamp or self._failed_at.get(folder.name, due) < due:
                changed.append((folder.name, stamp))
        return changed

    def _load(self, task: str) -> LiveRelease | None:
        live = self._store.live(task)
        if live is None or live.release is None:
            return None
        release = self._store.read(task, live.release)
        if release.card.get("redact", []) != self._redact:
            log.warning(
                "task %s: release %s was trained and tested on requests redacted by another log.redact than this one; "
                "what it promises was shown for those. The next release learns from the log as it is now",
                task,
                release.name,
            )
        router = Router.load(release.files["router.json"])
        foresight = read_foresight(release.files)
        return LiveRelease(
            task=task,
            name=release.name,
            generation=live.generation,
            checksum=release.card["checksum"],
            kind=release.card["student"],
            student=GuardedStudent(load_student(release, TokenMeter, self._engines)),
            router=router,
            comparison=self._tasks.comparison(task),
            foresight=foresight,
            threshold=router.threshold,
            # Those that the log knows already: after a restart or a rollback.
            accepted_audits=self._audits.accepted(task, release.name),
            drift=_drift(release, foresight),
        )

    def _swap(self, task: str, loaded: LiveRelease | None) -> None:
        before = self._live.get(task)
        if loaded is None:
            self._live.pop(task, None)
        else:
            self._live[task] = loaded
        if before is not None:
            self._retired.append((time.monotonic(), before.student))
        name = loaded.name if loaded else None
        self._metrics.record_live(
            task, name, before.name if before else None, loaded.threshold if loaded else None
        )
        if loaded is not None:
            self._metrics.record_promise(task, self._tasks.policy(task).max_disagreement)
        if loaded is None:
            log.info("task %s: no release is live; the teacher answers", task)
        else:
            log.info("task %s: release %s is live (generation %d)", task, loaded.name, loaded.generation)

    async def _close_retired(self) -> None:
        now = time.monotonic()
        due = [student for at, student in self._retired if now - at >= _RETIRE_AFTER_S and not student.busy]
        self._retired = [(at, student) for at, student in self._retired if student not in due]
        for student in due:
            await student.aclose()


def _drift(release: Release, foresight: Foresight | None) -> Drift | None:
    """What follows a release's confidence.

    Not where requests are kept from the student, which have none; nor for a student whose answers are judged at another
    place when they stream.
    """
    spread = Spread.from_json(release.card.get("confidence_spread"))
    if spread is None or foresight is not None or release.card.get("student") == "lm":
        return None
    return Drift(spread)
