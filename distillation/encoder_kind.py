"""Learning the student `encoder`: fine-tuned on one part of the exchanges, judged by the other.

Cross-fitting would fine-tune it five times over, minutes or hours each. So a hash of its id says of every exchange, for
ever, whether it may train or judge (distillation/split.py): the released model has seen none of the rows it is judged
on, and is itself what is judged, by the very files that go live and the code that serves them.

Every look fine-tunes anew. Looks are due when the labels have grown by a quarter, and what trains has grown by as much
then: a model kept from the last look would hardly ever be recent enough to save anything.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from distillation.dataset import Dataset, Row, build_dataset, dataset_of, known_answers, token_estimate
from distillation.kind import Progress, StillDue, StudentSilent, always
from distillation.past import Past, read_past, redoable
from distillation.scored import Scored
from distillation.split import Split
from routers.foresight_fit import Stakes
from serving.agreement import comparison
from serving.closed_answers import AnswerSpace, ClosedStudent, Prediction, TextTooLong
from serving.engines import Engines
from serving.exchange import Exchange, Json, StudentAnswer
from serving.releases import ReleaseStore
from serving.student_answers import ErasureStamp
from serving.task_settings import TaskSettings

if TYPE_CHECKING:
    from distillation.gate import Look  # scikit-learn: imported only once a look is due

Ints = NDArray[np.int64]

_SAY_EVERY_S = 2.0


class Tuning(Protocol):
    """What makes a student of texts and their answers."""

    def __call__(
        self, texts: Sequence[str], answers: Ints, space: AnswerSpace, *, progress: Progress
    ) -> ClosedStudent:
        """A student that knows `space`, of n texts whose answers are `space.answers[answers[i]]`, int[n].

        Raises StudentSilent where none can be made, saying why and what to do.
        """
        ...


class EncoderKind:
    """The student `encoder` of one task. Make it before the log is read: what is erased from then on is noticed."""

    def __init__(
        self,
        store: ReleaseStore,
        policy: TaskSettings,
        tuning: Tuning,
        erasures: ErasureStamp,
        engines: Engines | None = None,
    ) -> None:
        self._store = store
        self._policy = policy
        self._tuning = tuning
        self._erasures = erasures
        self._engines = engines or Engines()
        self._student: ClosedStudent | None = None
        self._predicted: dict[str, Prediction] = {}
        self._given: list[StudentAnswer] = []
        self._taught: frozenset[str] = frozenset()

    def dataset(self, exchanges: Sequence[Exchange]) -> Dataset:
        """Rows and traffic of the part that judges."""
        return dataset_of(exchanges, self._policy, self._split(exchanges).judges)

    def prepare(
        self, dataset: Dataset, exchanges: Sequence[Exchange], progress: Progress, due: StillDue = always
    ) -> tuple[Mapping[str, Past], Dataset]:
        """Read the releases the traffic met, fine-tune, and have the student answer what judges it."""
        said = partial(_say, self._policy.name, progress)
        read = partial(read_past, self._store, self._policy.name, engines=self._engines)
        past, dataset = redoable(read, self._policy.name, dataset, progress)
        if not due(dataset):
            return past, dataset
        rows = self._training_rows(exchanges)
        space = AnswerSpace(known_answers(rows), token_estimate(rows), self._policy.student.sees)
        place = {answer.key: index for index, answer in enumerate(space.answers)}
        taught = [row for row in rows if row.answer in place]
        if len(place) < 2:
            raise StudentSilent(
                f"the {len(rows):,} labels that may train it hold {len(place)} different answers a student could "
                "give, and it takes two to learn to choose"
            )
        answers = np.array([place[row.answer or ""] for row in taught], dtype=np.int64)
        said(f"fine-tuning on {len(taught):,} texts")
        student = self._tuning([row.text for row in taught], answers, space, progress=said)
        self._student, self._taught = student, frozenset(row.id for row in taught)
        self._answer(student, space, dataset.rows, said)
        self._erasures.check()
        return past, dataset

    def given(self, exchanges: Sequence[Exchange]) -> list[StudentAnswer]:
        """Its answers to the rows, one text at a time."""
        return self._given

    @property
    def asked(self) -> Sequence[StudentAnswer]:
        """None: it is computed here."""
        return ()

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
        """Test what `prepare` has made."""
        from distillation.gate import closed_release, judge

        if self._student is None:
            raise RuntimeError("what is to be looked at is made by prepare")
        return judge(
            dataset,
            Scored.of(dataset.rows, self._predicted, self._student.answers),
            partial(closed_release, self._student, taught=self._taught),
            past,
            self._policy,
            number=number,
            seed=seed,
            stakes=stakes,
            progress=progress,
        )

    def remarks(self, dataset: Dataset, look: Look[Past]) -> Json:
        """What it was made of, on how much, what it can't read, and what of a conversation it sees."""
        choice = self._policy.student
        return {
            "sees": choice.sees,
            "base": None if choice.base is None else choice.base.name,
            "precision": choice.precision,
            "train_share": choice.train_share,
            "trained_on": len(self._taught),
            "refused": sum(row.id not in self._predicted for row in dataset.rows),
        }

    def close(self) -> None:
        """Nothing was taken."""

    def _split(self, exchanges: Sequence[Exchange]) -> Split:
        return Split.of(self._policy, self._store, exchanges)

    def _training_rows(self, exchanges: Sequence[Exchange]) -> list[Row]:
        """What of the log may train it: labels as they are, however they came about."""
        comparing = comparison(self._policy.agreement)
        trains = self._split(exchanges).trains
        return build_dataset(exchanges, comparing, self._policy.student.sees, judges=trains).rows

    def _answer(
        self, student: ClosedStudent, space: AnswerSpace, rows: Sequence[Row], said: Callable[[str], None]
    ) -> None:
        """Have it answer every row, as it would a request; what it can't read stays without an answer."""
        shown = time.monotonic()
        read: set[str] = set()
        for number, row in enumerate(rows):
            began = time.perf_counter()
            try:
                prediction = self._predicted[row.id] = student.predict(row.text)
            except TextTooLong:
                continue
            took = time.perf_counter() - began
            if row.text in read:
                continue  # remembered: that takes no time, and says nothing of what an answer takes
            read.add(row.text)
            request = row.request or {}
            self._given.append(
                space.answer(request, prediction, model="encoder", latency_s=took, device_s=took)
            )
            if time.monotonic() - shown > _SAY_EVERY_S:
                shown = time.monotonic()
                said(f"answering what judges it, {number + 1:,} of {len(rows):,}")


def _say(task: str, progress: Progress, step: str) -> None:
    progress(f"{task}: {step}")
