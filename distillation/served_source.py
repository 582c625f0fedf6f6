"""Labels for a release whose student is served elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from distillation.dataset import Dataset
from distillation.journal import LookJournal
from distillation.past import Past
from distillation.served_kind import ServedKind
from serving.errors import UnderstudyError
from serving.exchange import Exchange
from serving.releases import ReleaseStore
from serving.settings import Settings


class ServedSource:
    """What `samples.LabelSource` is to such a student. Raises DamagedRelease for a release of another one.

    Answers that it hasn't given yet are asked for and kept, as learning does: without those that were given up or
    skipped it would look better than it is.
    """

    def __init__(self, settings: Settings, store: ReleaseStore, task: str, name: str) -> None:
        policy = settings.for_task(task)
        if not policy.student.served:
            raise UnderstudyError(
                f"the student of {name} is served elsewhere, and the configuration of task {task} says "
                f"{policy.student.kind!r}: set student as it was when {name} was made"
            )
        self._kind = ServedKind(settings, store, policy)
        self._journal = LookJournal(settings.state_dir, task)
        self._name = name
        self._kind.own(name)  # before anybody is asked anything

    def dataset(self, exchanges: Sequence[Exchange]) -> Dataset:
        """What of the log this release can be judged on."""
        return self._kind.dataset(exchanges)

    def redo(
        self, dataset: Dataset, exchanges: Sequence[Exchange], note: Callable[[str], None]
    ) -> tuple[Past, Mapping[str, Past]]:
        """The release and those that the traffic met.

        Raises LearningElsewhere while the task is learned, and StudentSilent when the student can't be had.
        """
        with self._journal.alone():  # both keep what the student answers
            try:
                met, _ = self._kind.prepare(dataset, exchanges, note)
            finally:
                self._kind.close()
        return self._kind.release(self._name), met
