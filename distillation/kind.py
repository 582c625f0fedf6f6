"""How a kind of student is learned: what differs between one that is fitted here and one that is served elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Protocol

from distillation.dataset import Dataset, dataset_of
from distillation.features import FeaturesOf
from distillation.past import Past, read_past, redoable
from distillation.split import Split
from routers.foresight_fit import Stakes
from serving.embedded import MODEL as EMBEDDED
from serving.encoder_folder import UnfitEncoder
from serving.engines import Engines
from serving.errors import ConfigError, UnderstudyError
from serving.exchange import Exchange, Json, StudentAnswer
from serving.linear import MODEL as LINEAR
from serving.releases import ReleaseStore
from serving.task_settings import TaskSettings

if TYPE_CHECKING:
    from distillation.embedder import SentenceEncoder
    from distillation.gate import Look  # scikit-learn: imported only once a look is due

Progress = Callable[[str], None]
StillDue = Callable[[Dataset], bool]


def always(_: Dataset) -> bool:
    """Whatever is left, a look is taken."""
    return True


class StudentSilent(UnderstudyError):
    """The student could not be had answer everything, so that nothing can be said of it."""


class Kind(Protocol):
    """One task's student to be, from the log to a look. Made before the log is read."""

    def dataset(self, exchanges: Sequence[Exchange]) -> Dataset:
        """What of the log this student can be judged on."""
        ...

    def prepare(
        self, dataset: Dataset, exchanges: Sequence[Exchange], progress: Progress, due: StillDue = always
    ) -> tuple[Mapping[str, Past], Dataset]:
        """The releases the traffic met, and the dataset without what can't be used after all.

        What takes long is only begun if a look is still `due` with what is left: else it would be done in vain, again
        and again. Raises StudentSilent or ErasedMeanwhile: no look can be taken.
        """
        ...

    def given(self, exchanges: Sequence[Exchange]) -> list[StudentAnswer]:
        """The answers this student has given, as far as they are known once it is prepared: what it takes and costs."""
        ...

    @property
    def asked(self) -> Sequence[StudentAnswer]:
        """Those that it was asked for to be prepared, which cost what a student's answers do."""
        ...

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
        """Take look `number` at what `prepare` gave."""
        ...

    def remarks(self, dataset: Dataset, look: Look[Past]) -> Json:
        """What a report card says of this kind of student only."""
        ...

    def close(self) -> None:
        """Give back what was taken for a look, except what a release that is live by now needs."""
        ...


class LinearKind:
    """The student `linear`: fitted here, on the very rows it is judged on.

    `load_encoder` loads the sentence encoder of one over embeddings, and raises UnfitEncoder or ConfigError; None: it
    counts terms. `engines` is what it shares with the releases on disk.
    """

    def __init__(
        self,
        store: ReleaseStore,
        policy: TaskSettings,
        engines: Engines | None = None,
        load_encoder: Callable[[Progress], SentenceEncoder] | None = None,
    ) -> None:
        self._store = store
        self._policy = policy
        self._engines = engines or Engines()
        self._load_encoder = load_encoder
        self._encoder: SentenceEncoder | None = None

    def dataset(self, exchanges: Sequence[Exchange]) -> Dataset:
        """Rows by what the student sees."""
        split = Split.of(self._policy, self._store, exchanges)
        return dataset_of(exchanges, self._policy, split.judges)

    def prepare(
        self, dataset: Dataset, exchanges: Sequence[Exchange], progress: Progress, due: StillDue = always
    ) -> tuple[Mapping[str, Past], Dataset]:
        """The releases on disk; the traffic of those that can't be redone is left out."""
        read = partial(read_past, self._store, self._policy.name, engines=self._engines)
        past, dataset = redoable(read, self._policy.name, dataset, progress)
        if self._load_encoder is not None and due(dataset):
            try:
                self._encoder = self._load_encoder(lambda said: progress(f"{self._policy.name}: {said}"))
            except (UnfitEncoder, ConfigError) as error:
                raise StudentSilent(str(error)) from error
        return past, dataset

    def features_of(self, progress: Progress) -> FeaturesOf:
        """What makes of texts what students are fitted to; `progress` hears of it. Once it is prepared."""
        if self._encoder is None:
            from distillation.linear_training import TermCounts

            return TermCounts
        from distillation.embedding_training import Embeddings

        return partial(
            Embeddings, embedder=self._encoder.model, encoder=self._encoder.files, progress=progress
        )

    def given(self, exchanges: Sequence[Exchange]) -> list[StudentAnswer]:
        """By the log."""
        answers = [exchange.student for exchange in exchanges if not exchange.replayed]
        model = LINEAR if self._load_encoder is None else EMBEDDED
        return [one for one in answers if one is not None and one.model == model]

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
        """Fit, cross-fit, test."""
        from distillation.gate import take_look

        return take_look(
            dataset,
            past,
            self._policy,
            number=number,
            seed=seed,
            stakes=stakes,
            features_of=self.features_of(progress),
            progress=progress,
        )

    def remarks(self, dataset: Dataset, look: Look[Past]) -> Json:
        """What of a conversation it sees, and what it is fitted to."""
        embedder = self._policy.student.embedder
        return {
            "sees": self._policy.student.sees,
            "features": self._policy.student.features,
            "embedder": None if embedder is None else embedder.name,
        }

    def close(self) -> None:
        """Nothing was taken."""
