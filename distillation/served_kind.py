"""Learning about a student whose model is given, and served elsewhere, and saw none of the labels.

What is learned is when to trust it: the confidence, the threshold, the answers' rules, and which generations to give
up. That only holds for rows it wasn't trained on: what was logged until `student.trained_until` is left out, labels and
traffic alike.
"""

from __future__ import annotations

import asyncio
import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING

import numpy as np

from distillation.ahead import Ahead
from distillation.as_served import AsServed, Known, as_served, columns
from distillation.asking import ask
from distillation.dataset import Dataset, Row, dataset_of
from distillation.kind import Progress, StillDue, StudentSilent, always
from distillation.named_answers import answer_terms
from distillation.past import Past, read_past, redoable
from distillation.refused import Refused
from distillation.scored import Scored
from distillation.served_release import (
    Answered,
    ServedRelease,
    is_streamed,
    read_served_release,
    stopping,
    student_id,
)
from distillation.split import Split
from routers.foresight_fit import Stakes
from routers.meter import TokenMeter
from routers.router import Router
from serving.adapter import Adapter
from serving.adapter_loading import AdapterNotLoaded
from serving.adapter_shelf import AdapterShelf
from serving.adapter_tidying import tidy
from serving.agreement import comparison
from serving.beginning import may_become
from serving.classify import ClassifyStudent
from serving.classify_plan import ClassifyPlan
from serving.engines import Engines
from serving.errors import DamagedRelease, UnknownRelease, UpstreamError
from serving.exchange import Exchange, Json, StudentAnswer
from serving.guarded_student import StudentUnavailable
from serving.pool import Pool
from serving.redaction import Redactor
from serving.releases import Release, ReleaseStore
from serving.served import ServedPlan, is_served, plan_of, read_plan, served_student
from serving.settings import Settings
from serving.student import Student
from serving.student_answers import StudentAnswers
from serving.task_settings import TaskSettings

if TYPE_CHECKING:
    from distillation.gate import HeldOut, Look  # scikit-learn: imported only once a look is due


class ServedKind:
    """The student of one task: an `lm`, or an `encoder` behind a server. Make it before the log is read.

    `engines` is what its past releases of other kinds share. Raises ConfigError for an adapter that is none.
    """

    def __init__(
        self, settings: Settings, store: ReleaseStore, policy: TaskSettings, engines: Engines | None = None
    ) -> None:
        self._redact = sorted(settings.log.redact)
        self._redactor = Redactor(settings.log.redact) if settings.log.redact else None
        self._store = store
        self._policy = policy
        self._comparing = comparison(policy.agreement)
        self._state_dir = settings.state_dir
        self._shelf = AdapterShelf(settings.state_dir, seen_at=settings.student.adapters_at)
        given = policy.student.adapter
        self._adapter = None if given is None else Adapter.read(given)
        self._plan = plan_of(policy.student, None if self._adapter is None else self._adapter.name)
        self._kept = StudentAnswers(settings.state_dir, policy.name, student_id(self._plan, self._redact))
        self._answered: dict[str, Answered] = {}
        self._asked: list[StudentAnswer] = []
        self._vllm = settings.student.vllm
        self._engines = engines or Engines(onnx=settings.student.onnx)

    def dataset(self, exchanges: Sequence[Exchange]) -> Dataset:
        """Rows by what the student supports, after the time until which it was trained."""
        split = Split.of(self._policy, self._store, exchanges)
        return dataset_of(exchanges, self._policy, split.judges)

    def prepare(
        self, dataset: Dataset, exchanges: Sequence[Exchange], progress: Progress, due: StillDue = always
    ) -> tuple[Mapping[str, Past], Dataset]:
        """Read the releases, then have every row answered, by the log, by what was kept, or by asking.

        Traffic of a release with another student of this kind is left out: what that would make of the other rows
        isn't known.
        """
        self._kept.keep_only({exchange.id for exchange in exchanges})
        own = self._own_releases(dataset)
        self._answered = {}
        past, dataset = redoable(lambda name: self._read(name, own), self._policy.name, dataset, progress)
        if not due(dataset):
            return past, dataset
        answers = {**self._kept.read(), **_logged(exchanges, own)}
        missing = [row for row in dataset.rows if row.id not in answers]
        self._plan = self._tested_before(own)
        if missing:
            with self._shelf.in_use() if self._adapter is not None else nullcontext():
                asyncio.run(self._ask(missing, answers, progress))
        # The releases that were read hold this very mapping.
        self._answered.update(
            (row.id, self._compared(row, answers[row.id])) for row in dataset.rows if row.id in answers
        )
        if not any(math.isfinite(one.answer.score) for one in self._answered.values()):
            raise StudentSilent(
                f"{self._plan.model} gives no log-probabilities, and without them nothing tells "
                "how sure it is; use a server that gives them (logprobs), such as vLLM, or set student.samples"
            )
        return past, dataset

    def given(self, exchanges: Sequence[Exchange]) -> list[StudentAnswer]:
        """Its answers to the rows, whether it gave them then or was asked now."""
        return [one.answer for one in self._answered.values()]

    @property
    def asked(self) -> Sequence[StudentAnswer]:
        """Those that neither the log had nor what was kept."""
        return self._asked

    def look(
        self,
        dataset: Dataset,
        past: Mapping[str, Past],
        *,
        number: int,
        seed: int,
        stakes: Stakes | None,
        progress: Progress,
    ) -> Look[Past]:
        """Score every answer as it would be served, and test."""
        from distillation.gate import judge

        served = self._served(dataset)
        judged = [None if one is None else one.judged for one in served]
        scores, signals = columns(judged)
        always = answer_terms(self._policy).always_escalate
        never = np.array([one is None or _may_become_one_of(always, one) for one in served])
        fitted = Scored(
            # What the student refuses is never accepted, nor what has begun like an answer that is always escalated.
            scores=np.where(never, -np.inf, scores),
            signals=signals,
            predicted=[self._key(row, one) for row, one in zip(dataset.rows, served, strict=True)],
            agreed=np.array(
                [row.id in self._answered and self._answered[row.id].agreed for row in dataset.rows],
                dtype=np.bool_,
            ),
        )
        early = [
            columns([_at(one, tokens) for one in served])
            for tokens in self._plan.marks
            if tokens < self._plan.commit_tokens
        ]
        return judge(
            dataset,
            fitted,
            self._release,
            past,
            self._policy,
            number=number,
            seed=seed,
            early=early,
            stakes=stakes,
            progress=progress,
        )

    def remarks(self, dataset: Dataset, look: Look[Past]) -> Json:
        """Which model, what it refused, and what giving up hopeless generations saves."""
        until = self._policy.student.trained_until
        return {
            "model": self._plan.model,
            "sees": self._plan.sees if isinstance(self._plan, ClassifyPlan) else "request",
            "adapter": None if self._adapter is None else self._adapter.name,
            "adapter_of": None if self._adapter is None else self._adapter.base,
            "trained_until": None if until is None else until.isoformat(),
            "refused": sum(row.id not in self._answered for row in dataset.rows),
            "gives_up": self._saved(dataset, look),
        }

    def _saved(self, dataset: Dataset, look: Look[Past]) -> Json | None:
        """Of the labelled rows: the share given up, the share of tokens saved by it; `wrongly` as in `Hopeless`."""
        hopeless = look.hopeless
        if hopeless.below is None:
            return None
        made, saved = 0, 0
        for one, at in zip(self._served(dataset), hopeless.at, strict=True):
            if one is not None:
                made += one.judged.tokens
                saved += one.judged.tokens - one.early[at].tokens if at >= 0 else 0
        return {
            "below": hopeless.below,
            "share": float(np.mean(hopeless.given_up)),
            "wrongly": hopeless.wrongly,
            "tokens_saved": saved / made if made else 0.0,
        }

    def _served(self, dataset: Dataset) -> list[AsServed | None]:
        return [
            as_served(self._answered[row.id].answer, self._plan, streamed=is_streamed(row))
            if row.id in self._answered
            else None
            for row in dataset.rows
        ]

    def _key(self, row: Row, served: AsServed | None) -> str | None:
        """The answer's key, if it is known when the answer is judged."""
        return self._answered[row.id].key if served is not None and served.ended else None

    def _release(
        self, router: Router, held_out: HeldOut, below: float | None, ahead: Ahead, refused: Refused
    ) -> ServedRelease:
        plan = stopping(self._plan, below)
        adapter = {} if self._adapter is None else self._adapter.files()
        return ServedRelease(
            plan, router, held_out, self._answered, ahead=ahead, refused=refused, adapter=adapter
        )

    async def _ask(self, rows: Sequence[Row], answers: dict[str, StudentAnswer], progress: Progress) -> None:
        """Ask about rows, and keep what comes: as the log would, with what `log.redact` names replaced."""

        def keep(row: Row, answer: StudentAnswer) -> None:
            if self._redactor is not None:
                answer = dataclasses.replace(answer, choices=self._redactor.value(answer.choices))
            answers[row.id] = answer
            self._asked.append(answer)
            self._kept.append(row.id, row.created, answer)

        pool = Pool(self._state_dir, self._vllm)
        student = served_student(self._plan, TokenMeter, Engines(pool=pool, adapters=self._shelf))
        try:
            await self._prepare(student)
            await ask(student, rows, keep, progress=lambda said: progress(f"{self._policy.name}: {said}"))
            if isinstance(student, ClassifyStudent):
                self._plan = student.tested()
        finally:
            await student.aclose()
            await pool.aclose()

    async def _prepare(self, student: Student) -> None:
        """Have the adapter loaded: said at once if it can't be, instead of once for every row."""
        try:
            if self._adapter is not None:
                self._shelf.put(self._adapter)
            await student.prepare()
        except (AdapterNotLoaded, StudentUnavailable, UpstreamError, OSError) as error:
            raise StudentSilent(str(error)) from error

    def close(self) -> None:
        """Have the adapter unloaded if it was loaded for a look that led to no release."""
        if self._adapter is not None:
            asyncio.run(tidy(self._state_dir, self._shelf, [self._adapter.name]))

    def _compared(self, row: Row, answer: StudentAnswer) -> Answered:
        key = self._comparing.key(answer.choices)
        if key is not None:
            return Answered(answer, key, key == row.answer)
        # No normal form; where the row has one, it is that of an answer that was redacted.
        labelled = row.answer is None and row.choices is not None
        return Answered(answer, key, labelled and self._comparing.agree(answer.choices, row.choices or []))

    def _own_releases(self, dataset: Dataset) -> set[str]:
        """The releases whose answers are this very student's."""
        own = set()
        for name in [name for name in dataset.traffic if name is not None]:
            try:
                if self._is_own(self._store.read(self._policy.name, name)):
                    own.add(name)
            except (DamagedRelease, UnknownRelease):
                continue  # said when its traffic is left out
        return own

    def _tested_before(self, own: set[str]) -> ServedPlan:
        """The plan with what the newest of its own releases knows of the model: an answer that was kept tells no more.

        A model that answers otherwise now is another, and mustn't be judged by what this one has answered.
        """
        if not isinstance(self._plan, ClassifyPlan):
            return self._plan
        for name in sorted(own, reverse=True):
            found = read_plan(self._store.read(self._policy.name, name).files)
            if isinstance(found, ClassifyPlan) and found.classes is not None:
                return dataclasses.replace(self._plan, classes=found.classes, labels=found.labels)
        return self._plan

    def _is_own(self, release: Release) -> bool:
        if not is_served(release):
            return False
        seen_by = release.card.get("redact", [])
        return student_id(read_plan(release.files), seen_by) == self._kept.student

    def release(self, name: str) -> ServedRelease:
        """A release of this very student, by the answers that `prepare` has gathered. Raises as `own` does."""
        return read_served_release(self.own(name), self._answered)

    def own(self, name: str) -> Release:
        """A release of this very student, as it lies on disk.

        Raises UnknownRelease, and DamagedRelease for one of another.
        """
        release = self._store.read(self._policy.name, name)
        if not self._is_own(release):
            raise DamagedRelease(
                f"release {name} of task {self._policy.name}: its student is another, or asked otherwise, than student "
                "says today"
            )
        return release

    def _read(self, name: str, own: set[str]) -> Past:
        release = self._store.read(self._policy.name, name)
        if not is_served(release):
            return read_past(self._store, self._policy.name, name, self._engines)
        if name not in own:
            raise DamagedRelease("its student is another model, or asked otherwise, than student says today")
        return read_served_release(release, self._answered)


def _logged(exchanges: Sequence[Exchange], own: set[str]) -> dict[str, StudentAnswer]:
    """The whole answers that this student gave when the requests came."""
    return {
        exchange.id: exchange.student
        for exchange in exchanges
        if exchange.release in own and exchange.student is not None and exchange.student.complete
    }


def _may_become_one_of(keys: Collection[str], served: AsServed) -> bool:
    said = served.said
    return said is not None and any(may_become(said, key) for key in keys)


def _at(served: AsServed | None, tokens: int) -> Known | None:
    """What was known at this checkpoint, if the answer reached it."""
    early = () if served is None else served.early
    return next((known for known in early if known.tokens == tokens), None)
