"""What stands before a release's student, with decisions that can be redone on the rows it was learned from."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass, field

import orjson

from distillation.dataset import Row
from routers.foresight import FORESIGHT_FILE, Foresight, last_text, read_foresight
from serving.errors import DamagedRelease
from serving.releases import SKIPPED_FILE


@dataclass(frozen=True, slots=True)
class Ahead:
    """The foresight of a release (None: its student is always asked), and which of the rows it would have skipped.

    `skipped` maps their ids to what models that hadn't seen them foresaw: the released foresight has, and would be too
    sure.
    """

    foresight: Foresight | None = None
    skipped: Mapping[str, float] = field(default_factory=dict)

    def skips(self, row: Row, fitted: Set[str]) -> bool:
        """Whether the student wouldn't have been asked about a row, had foresight not been fitted on it.

        `fitted` are the ids of the rows the release was fitted on.
        """
        if self.foresight is None or row.id in self.skipped or row.id in fitted:
            return self.foresight is not None and row.id in self.skipped
        return self.foresight.skips(foreseen_text(row))

    def files(self) -> dict[str, bytes]:
        """The whole as files of a release; none where there is no foresight."""
        if self.foresight is None:
            return {}
        return {FORESIGHT_FILE: self.foresight.dump(), SKIPPED_FILE: orjson.dumps(self.skipped)}

    @classmethod
    def read(cls, files: Mapping[str, bytes]) -> Ahead:
        """Read it from the files of a release. Raises DamagedRelease."""
        foresight = read_foresight(files)
        if foresight is None:
            return cls()
        try:
            skipped = {id: float(foreseen) for id, foreseen in orjson.loads(files[SKIPPED_FILE]).items()}
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise DamagedRelease(f"{SKIPPED_FILE} can't be read: {type(error).__name__}: {error}") from error
        return cls(foresight, skipped)


def foreseen_text(row: Row) -> str:
    """What foresight reads of a row."""
    return row.text if row.request is None else last_text(row.request)
