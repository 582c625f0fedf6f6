"""`understudy evaluate`: what a release is worth, by the log's labels and by a recording.

No label judges a release it had a hand in: where the release was fitted on an exchange, the rank that cross-fitting
gave it counts (`held_out.json`), else the release's own. Labels weigh 1/propensity, pooled as in learning.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from distillation.audit_record import audit_record
from distillation.dataset import Dataset
from distillation.due import noise_line
from distillation.evaluation import Admitted, Evaluation, JudgedAnswer, OneRelease, PromiseMade, Rules
from distillation.judgement import judge
from distillation.past import Past, PastRelease
from distillation.release_costs import release_costs
from distillation.samples import ClosedSource, Labelled, LabelSource, judge_recording, sample_of, weigh
from distillation.watching import came_after, live_of, withdrawal_line
from routers.coin import audit_rate
from serving.agreement import comparison
from serving.engines import Engines
from serving.errors import DamagedRelease, UnderstudyError, UnknownRelease, UnknownTask
from serving.exchange import Json
from serving.log import LogReader
from serving.recording import Recording
from serving.releases import Release, ReleaseStore
from serving.settings import Settings
from serving.sight import seen_text
from serving.task_settings import RESERVED_TASKS, TaskSettings

Progress = Callable[[str], None]


def evaluate(
    settings: Settings,
    task: str,
    release: str | None = None,
    recording: Recording | None = None,
    *,
    progress: Progress = lambda _: None,
) -> Evaluation:
    """Evaluate a release of a task, the live one if `release` is None, on the log and on `recording`.

    Raises UnknownTask or UnknownRelease for what isn't there, DamagedRelease for what can't be read, UnderstudyError
    for an agreement or a recording that can't be judged by, and OSError as the disk does.
    """
    store = ReleaseStore(settings.state_dir)
    name, is_live = _which(store, task, release)
    policy = settings.for_task(task)
    comparing = comparison(policy.agreement)
    read_release = store.read(task, name)
    card = read_release.card
    source = _source(settings, store, policy, read_release)
    progress("reading the log")
    read = LogReader(settings.state_dir).exchanges(task)
    created = _number(card.get("created"))
    live = live_of(settings, task)
    fence = live.fence if live is not None and (created or 0.0) > live.fence else 0.0
    exchanges = came_after(read.exchanges, fence)
    notes: list[str] = []

    def note(line: str) -> None:
        notes.append(line)
        progress(line)

    dataset = source.dataset(exchanges)
    progress(f"redoing {name}'s decisions on {len(dataset.rows):,} labels")
    past, met = source.redo(dataset, read.exchanges, note)
    labelled = weigh(dataset, past, met)
    log = judge(sample_of(labelled.redone, labelled.weights))
    since = None
    if created is not None and any(row.id not in past.held_out for row in labelled.rows):
        after = weigh(source.dataset(came_after(exchanges, created)), past, met)
        since = judge(sample_of(after.redone, after.weights))
    on_file, seen = None, 0
    if recording is not None:
        progress(f"answering {len(recording):,} recorded messages")
        if not isinstance(past, PastRelease):
            raise UnderstudyError(
                f"a recording can be judged by a student that lies in its release; that of {name} is "
                f"{card['student']!r}: replay the recording through the gateway instead"
            )
        fitted_on = {row.text for row in dataset.rows if row.id in past.held_out}
        fitted_on |= {
            seen_text(exchange.request, past.student.sees)
            for exchange in read.exchanges
            if exchange.id in past.taught
        }
        on_file, seen = judge_recording(recording, past, comparing, fitted_on, notes)
    promise = PromiseMade(
        _number(card.get("max_disagreement")) or policy.max_disagreement,
        _number(card.get("certainty")) or policy.certainty,
    )
    audits = audit_record(
        read.exchanges,
        name,
        max_disagreement=promise.max_disagreement,
        certainty=promise.certainty,
        since=live.since if live is not None and is_live else 0.0,
    )
    withdrawals = live.withdrawals if live is not None else []
    notes += [withdrawal_line(taken) for taken in withdrawals if taken.release == name]
    notes += _remarks(labelled, past, card, policy, read.damaged, dataset)
    if len(exchanges) < len(read.exchanges):
        notes.append(
            f"{len(read.exchanges) - len(exchanges):,} exchanges came before a withdrawal, and don't count any more"
        )
    releases = [_one_release(known, name if is_live else None) for known in store.list(task)]
    certainties = [_number(known.get("certainty")) or policy.certainty for known in store.list(task)]
    return Evaluation(
        task=task,
        release=name,
        live=is_live,
        student=_student(card),
        created=created,
        threshold=past.router.threshold,
        promise=promise,
        admitted=_admitted(card),
        answers=_answers(card),
        log=log,
        since=since,
        recording=on_file,
        seen=seen,
        audits=audits,
        costs=release_costs(
            read.exchanges,
            name,
            labelled.rows,
            np.array([redone.decision.accepted for redone in labelled.redone], dtype=np.bool_),
            labelled.weights,
            audit_rate(audits.audits, policy.audit_rate),
        ),
        rules=Rules(
            always_escalate=sorted(past.router.always_escalate),
            vetoed=sorted(past.router.vetoed),
            unproven=sorted(past.router.unproven),
            proven=sorted(past.router.proven),
        ),
        releases=releases,
        expected_broken=sum(1.0 - certainty for certainty in certainties),
        left_out=dict(dataset.left_out),
        notes=notes,
    )


def _student(card: Json) -> str:
    """The kind of student, and what a `linear` one was fitted to if that isn't the usual."""
    over = " over embeddings" if card.get("features") == "embedding" else ""
    return f"{card.get('student')}{over}"


def _source(settings: Settings, store: ReleaseStore, policy: TaskSettings, release: Release) -> LabelSource:
    """What the labels of this release are read and redone by."""
    task, name = policy.name, release.name
    if release.card.get("student") != "linear":
        # With the HTTP client: imported only where a student may have to be asked.
        from distillation.served_source import ServedSource
        from serving.served import is_served

        if is_served(release):
            return ServedSource(settings, store, task, name)
    if policy.agreement.kind == "numeric":
        raise UnderstudyError(
            f"answers of task {task} are compared by numeric, which has no normal form: {name} can't be evaluated by it"
        )
    engines = Engines(onnx=settings.student.onnx)
    return ClosedSource(store, task, name, comparison(policy.agreement), engines)


def _which(store: ReleaseStore, task: str, release: str | None) -> tuple[str, bool]:
    """The release to evaluate, and whether it is live."""
    if task in RESERVED_TASKS:
        raise UnknownTask(f"{task} is the overflow of server.max_tasks: it never has a release")
    try:
        live = store.live(task)
    except DamagedRelease:
        if release is None:
            raise
        live = None
    name = release or (live.release if live is not None else None)
    if name is None:
        there = ", ".join(store.names(task))
        if not there:
            raise store.unknown(
                task,
                f"task {task} has no release to evaluate; `understudy learn --task {task}` says what a look would find",
            )
        raise UnknownRelease(f"no release of task {task} is live; name one with --release: {there}")
    return name, live is not None and live.release == name


def _remarks(
    labelled: Labelled, past: Past, card: Json, policy: TaskSettings, damaged: int, dataset: Dataset
) -> list[str]:
    """What a person should know before reading the figures."""
    remarks = []
    fitted = sum(row.id in past.held_out for row in labelled.rows)
    if fitted:
        remarks.append(
            f"{fitted:,} of the {len(labelled.rows):,} labels were there when the release was chosen. Each is judged "
            "by a student that hadn't seen it, but the threshold was chosen with them: figures on them flatter a little"
        )
    kind = card.get("agreement_kind")
    if kind is not None and kind != policy.agreement.kind:
        remarks.append(
            f"the release was tested with agreement {kind!r}; the configuration now says {policy.agreement.kind!r}, "
            "and that is what is counted here"
        )
    if dataset.noise.asked:
        remarks.append(noise_line(dataset.noise))
    missing = sum(row.answer is None for row in labelled.rows)
    if missing:
        remarks.append(f"{missing:,} audits got no answer of the teacher's: they count as disagreements")
    if dataset.left_out:
        why = ", ".join(f"{count:,} {reason}" for reason, count in dataset.left_out.most_common())
        remarks.append(f"exchanges of the log that aren't used: {why}")
    if damaged:
        remarks.append(f"{damaged:,} damaged lines in the log were skipped")
    return remarks


def _admitted(card: Json) -> Admitted:
    look, labels = card.get("look"), card.get("labels")
    return Admitted(
        look=look if type(look) is int else None,
        labels=labels if type(labels) is int else None,
        delta=_number(card.get("delta")),
        coverage=_number(card.get("coverage")),
        admission="e-process" if card.get("admission") == "e-process" else "looks",
    )


def _answers(card: Json) -> list[JudgedAnswer]:
    """The card's slices; none where an old card has none."""
    found = []
    for one in card.get("slices", []):
        match one:
            case {
                "answer": str(answer),
                "labels": int(labels),
                "disagreements": int(disagreements),
                "estimate": float(estimate),
                "standing": str(standing),
            }:
                found.append(JudgedAnswer(answer, labels, disagreements, estimate, standing))
    return found


def _one_release(card: Json, live: str | None) -> OneRelease:
    name = str(card["release"])
    return OneRelease(name, _number(card.get("created")), _number(card.get("coverage")), name == live)


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
