"""`understudy learn`: from the log, and nothing but the log, to the next release.

log → dataset → is a look due? → fit, cross-fit, test → release → live. Gateways notice the new `live` by themselves.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from distillation.candidate import Candidate, CandidateFile
from distillation.dataset import Dataset, Row
from distillation.due import not_due, too_noisy
from distillation.journal import LearningElsewhere, LookJournal
from distillation.kind import Kind, LinearKind, StudentSilent
from distillation.learning_cost import LearningCost, core_seconds
from distillation.named_answers import never_given
from distillation.outlook import after, labels_per_hour
from distillation.past import Past
from distillation.stakes import stakes_of
from distillation.training_process import clear_training
from distillation.watching import came_after, withdrawal_line
from routers.foresight_fit import Stakes
from routers.looks import labels_needed, next_look
from serving.engines import Engines
from serving.errors import ConfigError, DamagedRelease, UnknownTask, WithdrawnMeanwhile
from serving.exchange import Json
from serving.log import LogReader
from serving.releases import ReleaseStore
from serving.settings import Settings
from serving.student_answers import ErasedMeanwhile, ErasureStamp
from serving.task_settings import RESERVED_TASKS, TaskSettings

if TYPE_CHECKING:
    from distillation.embedder import SentenceEncoder
    from distillation.gate import Look  # scikit-learn: imported only where something is fitted

CARD_SCHEMA = 1
_REMEMBERED = 100_000
"""So many texts' embeddings are kept while a task is learned: each release and each fold asks for them again."""

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Lesson:
    """What learning one task came to.

    `outcome` is `released` (live now), `held` (no level passed, or no look could be taken), `not_due` or `declined`;
    `message` says it to a person. `look` is the report of the look, if one was taken.
    """

    task: str
    outcome: str
    message: str
    labels: int
    needed: int | None = None
    release: str | None = None
    look: Json | None = None

    def to_json(self) -> Json:
        """The lesson as `--json` prints it."""
        return {
            "task": self.task,
            "outcome": self.outcome,
            "message": self.message,
            "labels": self.labels,
            "needed": self.needed,
            "release": self.release,
            "look": self.look,
        }


def learn(
    settings: Settings,
    task: str | None = None,
    *,
    progress: Progress = lambda _: None,
    unattended: bool = False,
) -> list[Lesson]:
    """Learn one task, or every task that has a log. `unattended`: what took long and failed isn't tried again soon.

    Raises UnknownTask for a task without a log, LearningElsewhere for one that is being learned, and OSError as the
    disk does.
    """
    reader = LogReader(settings.state_dir)
    logged = [name for name in reader.tasks() if name not in RESERVED_TASKS]
    if task is None:
        return [_learn_if_free(settings, reader, name, progress, unattended) for name in logged]
    if task not in logged:
        known = ", ".join(logged) or "none yet"
        raise UnknownTask(
            f"there is no log of task {task!r} under {settings.state_dir}; tasks with one: {known}"
        )
    return [_learn_task(settings, reader, task, progress, unattended)]


def _learn_if_free(
    settings: Settings, reader: LogReader, task: str, progress: Progress, unattended: bool
) -> Lesson:
    """One of all tasks: that it is being learned elsewhere doesn't keep the others waiting."""
    try:
        return _learn_task(settings, reader, task, progress, unattended)
    except LearningElsewhere as error:
        return Lesson(task, "not_due", str(error), 0)


def _learn_task(
    settings: Settings, reader: LogReader, task: str, progress: Progress, unattended: bool
) -> Lesson:
    journal = LookJournal(settings.state_dir, task)
    with journal.alone(), ExitStack() as stack:
        policy = settings.for_task(task)
        engines = Engines(onnx=settings.student.onnx, remember=_REMEMBERED)
        try:
            kind = _kind(settings, policy, engines, unattended)
        except ConfigError as error:  # of one task: the others are learned all the same
            return Lesson(task, "held", f"no look was taken: {error}", 0)
        stack.callback(kind.close)
        clear_training(settings.state_dir, task)
        began_s = core_seconds()
        progress(f"{task}: reading the log")
        erasures = ErasureStamp(settings.state_dir, task)
        read_at = time.time()  # a withdrawal from now on is one that these labels know nothing of
        try:
            live = ReleaseStore(settings.state_dir).live(task)
        except DamagedRelease as error:  # what it said of withdrawals is lost: a person has to look
            return Lesson(task, "held", f"no look was taken: {error}", 0)
        fence = live.fence if live is not None else 0.0
        exchanges = came_after(reader.exchanges(task).exchanges, fence)
        dataset = kind.dataset(exchanges)
        # Labels of another teacher are none, so that looks begin as they do after a withdrawal.
        fence = max(fence, dataset.teacher_since)
        candidates = CandidateFile(settings.state_dir, task, engines=engines)
        betting = policy.admission == "e-process"
        try:
            candidate = candidates.read(policy) if betting else None
        except ConfigError as error:  # what its student runs on isn't there
            return Lesson(task, "held", f"its candidate can't be tested: {error}", len(dataset.rows))
        noisy = too_noisy(dataset, policy) is not None
        if candidate is not None and candidate.after > fence and not noisy:
            lesson = _bet(settings, task, candidate, candidates, dataset, journal, policy, fence, erasures)
            if lesson.release is not None or not candidate.exhausted(len(dataset.rows)):
                return lesson
        waiting = not_due(dataset, journal.past(), policy, fence=fence)
        past: Mapping[str, Past] = {}
        if waiting is None:
            try:
                past, dataset = kind.prepare(
                    dataset,
                    exchanges,
                    progress,
                    lambda left: not_due(left, journal.past(), policy, fence=fence) is None,
                )
            except (StudentSilent, ErasedMeanwhile, ConfigError) as error:
                return Lesson(task, "held", f"no look was taken: {error}", len(dataset.rows))
            waiting = not_due(dataset, journal.past(), policy, fence=fence)  # less may be left
        if waiting is not None:
            labels = len(dataset.rows)
            when = _waiting_time(dataset.rows, waiting.needed or 0)
            outcome = "declined" if waiting.declined else "not_due"
            message = waiting.message + when
            if live is not None and live.release is None and live.withdrawals:
                message += f". {withdrawal_line(live.withdrawals[-1])}; only labels from then on count"
            elif dataset.teacher_since:
                day = time.strftime("%Y-%m-%d", time.gmtime(dataset.teacher_since))
                message += f". The teacher has changed on {day}: only labels from then on count"
            return Lesson(task, outcome, message, labels, waiting.needed)
        if isinstance(kind, LinearKind) and betting:
            last = max(one.created for one in exchanges)
            return _freeze(
                settings,
                kind,
                candidates,
                dataset,
                past,
                journal,
                policy,
                last,
                read_at,
                began_s,
                erasures,
                progress,
            )
        stakes = stakes_of(exchanges, kind.given(exchanges), settings.student, policy.student)
        return _look(
            settings,
            task,
            kind,
            dataset,
            past,
            journal,
            policy,
            stakes,
            fence,
            read_at,
            began_s,
            erasures,
            progress,
        )


def _kind(settings: Settings, policy: TaskSettings, engines: Engines, unattended: bool) -> Kind:
    """What learns the kind of student that the task is to have. `engines` is what it shares with its releases."""
    store = ReleaseStore(settings.state_dir)
    if policy.student.base is not None:
        from distillation.encoder_kind import EncoderKind
        from distillation.encoder_tuning import FineTuning

        tuning = FineTuning(settings, policy, engines, unattended=unattended)
        return EncoderKind(store, policy, tuning, ErasureStamp(settings.state_dir, policy.name), engines)
    if not policy.student.served:
        embedder = policy.student.embedder
        load = None if embedder is None else partial(_load_encoder, settings, embedder, engines, unattended)
        return LinearKind(store, policy, engines, load)
    from distillation.served_kind import ServedKind  # the HTTP client: imported only where a student is asked

    return ServedKind(settings, store, policy, engines)


def _load_encoder(
    settings: Settings, folder: Path, engines: Engines, unattended: bool, progress: Progress
) -> SentenceEncoder:
    from distillation.embedder import read_embedder

    return read_embedder(folder, settings, engines, progress, unattended=unattended)


def _look(
    settings: Settings,
    task: str,
    kind: Kind,
    dataset: Dataset,
    past: Mapping[str, Past],
    journal: LookJournal,
    policy: TaskSettings,
    stakes: Stakes | None,
    fence: float,
    read_at: float,
    began_s: float,
    erasures: ErasureStamp,
    progress: Progress,
) -> Lesson:
    from distillation.report import report_card  # scikit-learn: imported only once a look is due

    store = ReleaseStore(settings.state_dir)
    labels, number = len(dataset.rows), next_look(journal.past())
    serial = journal.begin(number, labels, read_at=read_at, until=_newest(dataset.rows))
    look = kind.look(
        dataset,
        past,
        number=number,
        seed=serial,
        stakes=stakes,
        progress=lambda step: progress(f"{task}: {step} ({labels} labels)"),
    )
    card = report_card(look, dataset, policy, releases_so_far=len(store.list(task)))
    card |= kind.remarks(dataset, look)
    cost = LearningCost.of(core_seconds() - began_s, kind.asked, settings.student, policy.student)
    card["learning"] = cost.to_json()
    journal.spent(serial, number, labels, cost.to_json())
    release, outcome, too_late = _publish(settings, task, look, card, fence, erasures)
    journal.end(
        serial, number, labels, {"outcome": outcome, "release": release, "coverage": card["coverage"]}
    )
    needed = labels_needed(journal.past(), policy.max_disagreement, policy.certainty, fence=fence)
    message = too_late or _message(outcome, release, card, policy) + _waiting_time(dataset.rows, needed)
    message = ". ".join([message, *never_given(policy, dataset.answers)])
    return Lesson(task, outcome, message, labels, needed, release, card)


def _publish(
    settings: Settings, task: str, look: Look[Past], card: Json, fence: float, erasures: ErasureStamp
) -> tuple[str | None, str, str | None]:
    """Make the look's candidate a release and live, if it has one: its name, the outcome, and what came between."""
    if look.candidate is None:
        return None, "held", None
    store = ReleaseStore(settings.state_dir)
    # Also where it answers less than what is live: keeping the widest would keep the luckiest, since what it
    # answers is hardly labelled any more (docs/lab-notes.md).
    card_on_disk = {
        "schema": CARD_SCHEMA,
        "created": time.time(),
        "redact": sorted(settings.log.redact),
        "labels_since": fence or None,
        **card,
    }
    try:
        with erasures.held():
            release = store.write(task, look.candidate.files(), card_on_disk)
        store.set_live(task, release, fence=fence)
    except (ErasedMeanwhile, WithdrawnMeanwhile) as error:
        return None, "held", str(error)
    return release, "released", None


def _freeze(
    settings: Settings,
    kind: LinearKind,
    candidates: CandidateFile,
    dataset: Dataset,
    past: Mapping[str, Past],
    journal: LookJournal,
    policy: TaskSettings,
    last: float,
    read_at: float,
    began_s: float,
    erasures: ErasureStamp,
    progress: Progress,
) -> Lesson:
    """Fix a candidate by what the log held up to `last`. What it may spend is spent with that."""
    from distillation.betting import freeze  # scikit-learn: imported only where something is fitted

    task = policy.name
    labels, number = len(dataset.rows), next_look(journal.past())
    serial = journal.begin(number, labels, read_at=read_at, until=_newest(dataset.rows))

    def told(step: str) -> None:
        progress(f"{task}: {step} ({labels} labels)")

    candidate = freeze(
        dataset,
        past,
        policy,
        number=number,
        serial=serial,
        after=last,
        features_of=kind.features_of(told),
        progress=told,
    )
    try:
        with erasures.held():
            candidates.write(candidate, policy)
    except ErasedMeanwhile as error:
        return Lesson(task, "held", str(error), labels)
    cost = LearningCost.of(core_seconds() - began_s, (), settings.student, policy.student)
    journal.spent(serial, number, labels, cost.to_json())
    message = f"candidate {number} is fixed, by {labels} labels; those that come from now on test it"
    return Lesson(task, "held", message, labels, labels + 1)


def _bet(
    settings: Settings,
    task: str,
    candidate: Candidate,
    candidates: CandidateFile,
    dataset: Dataset,
    journal: LookJournal,
    policy: TaskSettings,
    fence: float,
    erasures: ErasureStamp,
) -> Lesson:
    """What the labels since say of the candidate; a level that passed goes live."""
    from distillation.betting import peek
    from distillation.report import report_card

    look = peek(candidate, dataset, policy)
    card = report_card(
        look, dataset, policy, releases_so_far=len(ReleaseStore(settings.state_dir).list(task))
    )
    release, outcome, too_late = _publish(settings, task, look, card, fence, erasures)
    if look.candidate is not None and release is not None:
        with suppress(ErasedMeanwhile), erasures.held():  # then it is gone, as it should
            candidates.write(replace(candidate, served=look.candidate.router), policy)
        result = {"outcome": outcome, "release": release, "coverage": card["coverage"]}
        journal.end(candidate.serial, candidate.number, candidate.labels, result)
    message = too_late or _message(outcome, release, card, policy)
    if outcome == "held" and look.verdict.passed and too_late is None:
        message = "what has passed is out already; the next level hasn't yet"
    message += f" ({look.labels} labels since candidate {candidate.number} was fixed)"
    labels = len(dataset.rows)
    return Lesson(task, outcome, message, labels, labels + 1, release, card)


def _message(outcome: str, release: str | None, card: Json, policy: TaskSettings) -> str:
    promise = f"at most {policy.max_disagreement:.1%} disagreement, {policy.certainty:.0%} certain"
    if outcome == "released":
        skipping = card["skipping"]
        left_out = f"; doesn't show its student {skipping['skipped']:.0%}" if skipping["on"] else ""
        return f"{release} is live: answers about {card['coverage']:.0%} with {promise}{left_out}"
    tested = [level for level in card["levels"] if level["p_value"] is not None]
    if not tested:
        return f"no level has enough labels yet for {promise}; more labels are needed"
    last = tested[-1]
    if not last["accepted"]:
        return f"not yet: each of the surest answers disagrees more than promised by itself; {promise} is asked for"
    share = last["disagreements"] / last["accepted"]
    return (
        f"not yet: at {last['coverage']:.0%} coverage {share:.1%} of {last['accepted']} labels disagree, "
        f"p = {last['p_value']:.3f} where {card['delta']:.4f} is needed for {promise}"
    )


def _newest(rows: Sequence[Row]) -> float | None:
    return max((row.created for row in rows), default=None)


def _waiting_time(rows: Sequence[Row], needed: int) -> str:
    """When `needed` labels will be there at the rate they come in now; empty if that can't be told."""
    labels, per_hour = len(rows), labels_per_hour(rows)
    if labels >= needed or per_hour is None:
        return ""
    when = after((needed - labels) / per_hour * 3600.0)
    return f"; at this rate the {needed} labels of the next look are there {when}"
