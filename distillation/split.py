"""Which exchanges train a student that is too dear to be cross-fitted, and which judge it (STATISTICS.md §3).

The two parts are told apart by a hash of an exchange's id, which is random: what was asked, what was answered and who
answered has no hand in it, so that either part is a random sample of the task's traffic, and an exchange is of the same
part for ever. What trains never judges, neither as a label nor as traffic.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from serving.exchange import Exchange, Json
from serving.releases import ReleaseStore
from serving.task_settings import TaskSettings

_SALT = b"understudy split"
"""Blake2's own parameter for that: whatever else is hashed of ids, or drawn by them, says nothing of this."""


def place_of(task: str, id: str) -> float:
    """Where an exchange lies between 0 and 1: uniform over exchanges, and always the same for one."""
    digest = hashlib.blake2b(f"{task}\n{id}".encode(), digest_size=8, person=_SALT).digest()
    return int.from_bytes(digest) / 2**64


@dataclass(frozen=True, slots=True)
class Split:
    """Of a task's exchanges, those placed below `trains_below` train, those from `judges_from` on judge.

    `judges_from` isn't the smaller of the two. What lies in between has trained a release that the traffic has met:
    what that makes of it, it makes of its own training.
    """

    task: str
    trains_below: float = 0.0
    judges_from: float = 0.0

    def trains(self, id: str) -> bool:
        """Whether an exchange is for training."""
        return place_of(self.task, id) < self.trains_below

    def judges(self, id: str) -> bool:
        """Whether an exchange is for judging."""
        return self.judges_from <= 0.0 or place_of(self.task, id) >= self.judges_from

    @classmethod
    def of(cls, policy: TaskSettings, store: ReleaseStore, exchanges: Iterable[Exchange]) -> Split:
        """The split that the task's student needs, whatever its kind, given the log.

        To weigh a label is to ask each release that the traffic has met whether it would have accepted that request,
        and of what it was trained on it would be too sure: so that judges no student any more.
        """
        choice = policy.student
        share = choice.train_share if choice.base is not None else 0.0
        after = cls.after(policy.name, store, {exchange.release for exchange in exchanges})
        return cls(policy.name, share, max(share, after.judges_from))

    @classmethod
    def after(cls, task: str, store: ReleaseStore, met: Collection[str | None]) -> Split:
        """The split by which nothing judges that may have trained one of these releases."""
        named = [name for name in met if name is not None]
        cards = store.list(task) if named else []
        below = [trained_below(card) for card in cards if card.get("release") in named]
        return cls(task, judges_from=max(below, default=0.0))


def trained_below(card: Json) -> float:
    """The place below which exchanges trained a release, by its card; 0: it was cross-fitted, or trained elsewhere."""
    share = card.get("train_share")
    return float(share) if isinstance(share, int | float) and not isinstance(share, bool) else 0.0
