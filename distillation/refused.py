"""Which rows of a look are refused by vetoes that other rows gave (STATISTICS.md §4).

A release vetoes by all of its labels. Had it been live when those very rows came, a label would have decided by itself
whether the next looks count it as escalated or as accepted: among the accepted rows the lucky ones would be left, and
those that brought a veto about would weigh too little (`tests/routers/test_vetoes_later.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass

import orjson

from serving.errors import DamagedRelease
from serving.releases import REFUSED_FILE


@dataclass(frozen=True, slots=True)
class Refused:
    """The `ids` of the rows that were refused, of those a release was fitted on; None: an older release doesn't say."""

    ids: frozenset[str] | None = None

    def vetoed(self, id: str, fitted: Set[str]) -> bool | None:
        """Whether a row's answer counts as vetoed; None: by the release's own vetoes.

        `fitted` are the ids of the rows the release was fitted on.
        """
        return None if self.ids is None or id not in fitted else id in self.ids

    def files(self, vetoed: Set[str]) -> dict[str, bytes]:
        """The whole as files of a release with these vetoes; none where there are neither: then nothing was refused."""
        if self.ids is None or not (self.ids or vetoed):
            return {}
        return {REFUSED_FILE: orjson.dumps(dict.fromkeys(sorted(self.ids), True))}

    @classmethod
    def read(cls, files: Mapping[str, bytes]) -> Refused:
        """Read it from the files of a release. Raises DamagedRelease."""
        if REFUSED_FILE not in files:
            return cls()
        try:
            return cls(frozenset(str(id) for id in dict(orjson.loads(files[REFUSED_FILE]))))
        except (TypeError, ValueError) as error:
            raise DamagedRelease(f"{REFUSED_FILE} can't be read: {type(error).__name__}: {error}") from error
