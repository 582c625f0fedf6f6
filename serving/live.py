"""The file `state/tasks/<task>/live`: which release answers, and which were withdrawn and why. The one truth.

    {"release", "generation", "previous", "since", "withdrawals", "lost_until"}

It is replaced atomically, so that a release and the reason why it isn't live any more are never apart. What wrote it
before there was a watch left out the last three.
"""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass, field
from typing import Literal

import orjson

RELEASE_NAME = re.compile(r"r([0-9]{4,})")
_MAX_WITHDRAWALS = 20

Cause = Literal["disagreement", "teacher_changed"]
"""Why a release was withdrawn: its audits disagreed too often, or the teacher isn't the one it learned from."""


@dataclass(frozen=True, slots=True)
class Withdrawal:
    """A release that the watch took away at `at` (seconds since the epoch). `said` is the reason for a person."""

    release: str
    cause: Cause
    at: float
    said: str


@dataclass(frozen=True, slots=True)
class Live:
    """Which release answers; None: nothing, everything goes to the teacher.

    `generation` grows with every change and is never used twice for a task. `previous` are the releases that
    were live before and were followed by another one, newest first, at most 20: the way back for `rollback`.
    `since` is when the release became live, in seconds since the epoch; 0: not known. `withdrawals` are what the watch
    took away, oldest first, at most 20; those until `lost_until` were lost with a damaged file (0: none were).
    """

    release: str | None
    generation: int
    previous: list[str]
    since: float = field(default=0.0, compare=False)
    withdrawals: list[Withdrawal] = field(default_factory=list, compare=False)
    lost_until: float = field(default=0.0, compare=False)

    @property
    def fence(self) -> float:
        """When a release was last withdrawn, or may have been, in seconds since the epoch; 0: never.

        What was labelled before says nothing of the promises of releases to come (STATISTICS.md §5).
        """
        return max([self.lost_until, *(one.at for one in self.withdrawals[-1:])])

    def withdrawn(self, release: str) -> Withdrawal | None:
        """Why a release was last withdrawn; None: it never was."""
        return next((one for one in reversed(self.withdrawals) if one.release == release), None)

    def dump(self) -> bytes:
        """The whole as the file."""
        return orjson.dumps(
            {
                "release": self.release,
                "generation": self.generation,
                "previous": self.previous,
                "since": self.since,
                "withdrawals": [asdict(one) for one in self.withdrawals[-_MAX_WITHDRAWALS:]],
                "lost_until": self.lost_until,
            }
        )


def parse_live(data: bytes) -> Live | None:
    """Read what `dump` wrote, now or before there was a watch; None for anything else."""
    try:
        content = orjson.loads(data)
        match content:
            case {
                "release": None | str() as release,
                "generation": int(generation),
                "previous": list(previous),
            }:
                names = [*previous, *([] if release is None else [release])]
                since = float(content.get("since", 0.0))
                withdrawals = [_withdrawal(one) for one in content.get("withdrawals", [])]
                lost_until = float(content.get("lost_until", 0.0))
                times = (since, lost_until)
                if type(generation) is int and all(map(_is_name, names)) and all(map(math.isfinite, times)):
                    return Live(release, generation, previous, since, withdrawals, lost_until)
    except (KeyError, TypeError, ValueError):
        return None
    return None


def _withdrawal(data: object) -> Withdrawal:
    match data:
        case {
            "release": str(release),
            "cause": "disagreement" | "teacher_changed" as cause,
            "at": float() | int() as at,
            "said": str(said),
        } if _is_name(release):
            return Withdrawal(release, cause, float(at), said)
    raise ValueError(f"{data!r} is no withdrawal")


def _is_name(name: object) -> bool:
    return isinstance(name, str) and RELEASE_NAME.fullmatch(name) is not None
