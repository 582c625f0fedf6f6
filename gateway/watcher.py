"""Looks after the live releases: takes in their audits from the log, and withdraws what is broken (STATISTICS.md §5).

The keeper's work, done once however many workers there are. The log is all it goes by, so that it doesn't matter which
worker saw an audit, and when. Audits are taken in in the order of their requests, and none that came after one that is
still owed: else those that end quickly would count first.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from gateway.metrics import Metrics
from routers.watch import Watch
from serving.audit_index import AuditIndex
from serving.audit_trail import AGREED, SIGHTINGS, Audited
from serving.disk import Disk
from serving.errors import DamagedRelease, UnderstudyError
from serving.exchange import Json
from serving.layout import task_names
from serving.live import Cause, Live
from serving.releases import ReleaseStore
from serving.task_settings import TaskPolicy
from serving.watch_record import ANY, LATE_S, Names, WatchRecord, read_watch_record, write_watch_record

log = logging.getLogger("understudy.watch")

_MOST_ASKED_FOR = 200
"""Models asked for that are followed: a client may make them up."""


class Watcher:
    """Watches every task's live release. Blocking: for a thread, one at a time.

    `policy` says what a task promises where a release's card doesn't.
    """

    def __init__(self, state_dir: Path, metrics: Metrics, policy: Callable[[str], TaskPolicy]) -> None:
        self._state_dir = state_dir
        self._metrics = metrics
        self._policy = policy
        self._store = ReleaseStore(state_dir)
        self._index = AuditIndex(state_dir, trails=True)
        self._disk = Disk()
        self._records: dict[str, WatchRecord] = {}
        self._failing: set[str] = set()

    def adopt(self, policy: Callable[[str], TaskPolicy]) -> None:
        """Go on by a reloaded configuration."""
        self._policy = policy

    def look(self) -> None:
        """Take in what has come since the last look. What can't be watched is said once, and tried again."""
        for task in task_names(self._state_dir):
            try:
                self._look_at(task)
                self._failing.discard(task)
            except (OSError, UnderstudyError) as error:
                if task not in self._failing:
                    log.error("task %s: the live release can't be watched: %s; trying again", task, error)
                self._failing.add(task)

    def _look_at(self, task: str) -> None:
        try:
            live = self._store.live(task)
        except DamagedRelease:
            return  # who loads releases complains about it
        if live is None or live.release is None:
            if self._records.pop(task, None) is not None:
                self._metrics.record_unwatched(task)
            return
        before, watch = self._known(task, live)
        trail = self._index.trail(task, before.until - LATE_S)
        record = replace(
            before,
            models=_seen(before.models, trail.models),
            fingerprints=_seen(before.fingerprints, trail.fingerprints),
        )
        renamed = other_name(trail.models, record.models, record.since)
        if renamed is not None:
            self._withdraw(task, live, "teacher_changed", _said_of_teacher(*renamed, record))
            return
        fingerprint = other_name(trail.fingerprints, record.fingerprints, record.since)
        if fingerprint is not None:
            log.warning(
                "task %s: the teacher's system_fingerprint is %s now; the watch of %s begins anew (after %d audits, of "
                "which %d disagreed)",
                task,
                fingerprint[1],
                live.release,
                watch.audits,
                watch.disagreements,
            )
            watch = Watch(watch.max_disagreement, watch.certainty)
            record = replace(record, fingerprints=_seen({}, trail.fingerprints))
        record, fed = feed(watch, record, trail.audited.values(), time.time())
        if fed or fingerprint is not None or not before.watch:
            record = replace(record, watch=watch.to_json()).without_old()
            write_watch_record(self._state_dir, task, record, self._disk)
        self._records[task] = record
        self._metrics.record_evidence(task, watch.evidence, 1.0 / (1.0 - watch.certainty))
        if watch.alarmed:
            self._withdraw(task, live, "disagreement", _said_of_audits(watch, record))

    def _known(self, task: str, live: Live) -> tuple[WatchRecord, Watch]:
        """The record of a live release as it was left, and its watch; new ones for one that wasn't watched yet."""
        record = self._records.get(task) or read_watch_record(self._state_dir, task)
        if record is not None and (record.release, record.since) == (live.release, live.since):
            try:
                return record, Watch.from_json(record.watch)
            except ValueError:
                log.warning("task %s: watch.json is damaged: counting the audits in the log anew", task)
        release = str(live.release)
        card = self._store.read(task, release).card
        promised = {
            "max_disagreement": self._policy(task).max_disagreement,
            "certainty": self._policy(task).certainty,
        }
        alpha, certainty = (float(card.get(name, promised[name])) for name in promised)
        before = live.withdrawn(release)
        # Who makes it live although the teacher has another name takes the names there are for the same teacher.
        accepted = before is not None and before.cause == "teacher_changed"
        models = {} if accepted else _learned_from(card, live.since)
        watch = Watch(alpha, certainty)
        log.info("task %s: watching release %s: at most %.1f %% may disagree", task, release, 100 * alpha)
        self._metrics.record_watched(task)
        return WatchRecord(release, live.since, {}, models=models), watch

    def _withdraw(self, task: str, live: Live, cause: Cause, said: str) -> None:
        if self._store.withdraw(task, live, cause, said) is None:
            return  # somebody has made another one live meanwhile
        self._records.pop(task, None)
        self._metrics.record_withdrawal(task, cause)
        self._metrics.record_unwatched(task)
        log.error(
            "task %s: release %s is withdrawn: %s. The teacher answers everything until a release has proved itself on "
            "labels from now on; `understudy promote %s %s` makes it live all the same",
            task,
            live.release,
            said,
            task,
            live.release,
        )


def due(audits: Iterable[Audited], record: WatchRecord, now: float) -> list[Audited]:
    """The audits of a release that can be taken in, in the order in which their requests came.

    None that came after one that is still owed. One that is owed for longer than `LATE_S` is missing.
    """
    too_late = record.too_late
    mine = [
        one
        for one in audits
        if one.release == record.release and one.id not in record.counted and one.created >= too_late
    ]
    owed = (one.created for one in mine if one.outcome is None and one.created >= now - LATE_S)
    first_owed = min(owed, default=math.inf)
    return sorted((one for one in mine if one.created < first_owed), key=lambda one: (one.created, one.id))


def feed(watch: Watch, record: WatchRecord, audits: Iterable[Audited], now: float) -> tuple[WatchRecord, int]:
    """Let the watch see the audits that are due, up to an alarm. Returns the record after them, and how many they were.

    The record's own `watch` stays as it was.
    """
    counted, answers, fed = dict(record.counted), record.answers, 0
    for one in due(audits, record, now):
        if watch.alarmed:
            break
        watch.observe(one.outcome == AGREED)
        counted[one.id] = one.created
        answers += 1.0 / one.rate if one.rate > 0 else 1.0
        fed += 1
    return replace(record, counted=counted, answers=answers), fed


def other_name(
    sightings: Mapping[str, Mapping[str, Sequence[float]]],
    known: Mapping[str, Mapping[str, float]],
    since: float,
) -> tuple[str, str] | None:
    """A model that clients ask for and the name that answers it now, if it isn't one it is known by; else None."""
    for requested, names in sightings.items():
        name = _other_name(names, known.get(requested, {}), since)
        if name is not None:
            return requested, name
    return None


def _other_name(
    sightings: Mapping[str, Sequence[float]], known: Mapping[str, float], since: float
) -> str | None:
    """The same for one model that is asked for.

    Only after `SIGHTINGS` answers without a known one between them: a new version is often tried on a part of the
    traffic, and comes and goes. `known` says when it last answered under each.
    """
    last = max(known.values(), default=math.inf)
    new = [
        (at, name)
        for name, times in sightings.items()
        if name not in known
        for at in times
        if at > max(last, since)
    ]
    return max(new)[1] if len(new) >= SIGHTINGS else None


def _seen(known: Names, sightings: Mapping[str, Mapping[str, Sequence[float]]]) -> Names:
    """Known names with the times of their last sightings.

    Of a model for which none is known yet, all that were seen become it: a client that asks for another one changes no
    teacher.
    """
    asked_for = sightings.keys() if len(known) < _MOST_ASKED_FOR else known.keys() & sightings.keys()
    return known | {
        one: _seen_of(known.get(one) or known.get(ANY), sightings[one]) for one in asked_for if one != ANY
    }


def _seen_of(known: Mapping[str, float] | None, sightings: Mapping[str, Sequence[float]]) -> dict[str, float]:
    names = known or dict.fromkeys(sightings, 0.0)
    return {name: max(at, *sightings.get(name, ()), at) for name, at in names.items()}


def _learned_from(card: Json, since: float) -> Names:
    """The names of the teacher that a release was learned from; its card may be of before they were told apart."""
    by_request = card.get("teacher_models_by_request") or {ANY: card.get("teacher_models", {})}
    return {requested: dict.fromkeys(names, since) for requested, names in by_request.items() if names}


def _said_of_audits(watch: Watch, record: WatchRecord) -> str:
    since = (
        time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(record.since)) if record.since else "it was promoted"
    )
    limit = 1.0 / (1.0 - watch.certainty)
    return (
        f"{watch.disagreements} of {watch.audits} audits disagreed ({watch.disagreements / watch.audits:.1%}), and "
        f"at most {watch.max_disagreement:.1%} was promised; the evidence is {watch.evidence:.1f} where {limit:.1f} is "
        f"enough. About {record.answers:,.0f} of its answers went out since {since}"
    )


def _said_of_teacher(requested: str, renamed: str, record: WatchRecord) -> str:
    known = ", ".join(sorted(record.models[requested]))
    return (
        f"its teacher, asked for {requested}, answered as {known}, and now answers as {renamed}, "
        f"{SIGHTINGS} times in a row"
    )
