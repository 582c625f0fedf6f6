"""Which teacher answers now, and since when: labels of one that was there before are another teacher's.

The rule is the watch's (gateway/watcher.py, STATISTICS.md §5), so that what suspends a release also says what the next
one is learned from.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from serving.audit_trail import SIGHTINGS
from serving.exchange import Exchange, Json


@dataclass(slots=True)
class _Answering:
    """Who answers one model that is asked for. `run` are the latest answers, as long as all came under new names."""

    known: set[str] = field(default_factory=set)
    run: list[tuple[float, str]] = field(default_factory=list)
    since: float | None = None

    def see(self, at: float, name: str) -> None:
        if not self.known or name in self.known:
            # Names that come and go are one teacher to the promise.
            self.known |= {name, *(known for _, known in self.run)}
            self.run = []
            return
        self.run.append((at, name))
        if len(self.run) == SIGHTINGS:
            self.known, self.since, self.run = {known for _, known in self.run}, self.run[0][0], []


def teacher_since(exchanges: Iterable[Exchange]) -> dict[str, float]:
    """Since when the teacher that answers now has answered (seconds since the epoch), by the model that was asked for.

    Only those where there was another one before: `SIGHTINGS` answers in a row came under names that weren't known
    until then. `exchanges` are of one task, oldest first.
    """
    answering: dict[str, _Answering] = {}
    for exchange in exchanges:
        # A replayed answer says who the teacher was then; who forces the teacher may name any model.
        said = exchange.origin != "teacher" and exchange.reason != "forced"
        if exchange.teacher is not None and said:
            who = answering.setdefault(requested_of(exchange.request), _Answering())
            who.see(exchange.created, exchange.teacher.model)
    return {requested: who.since for requested, who in answering.items() if who.since is not None}


def requested_of(request: Json) -> str:
    """The model that a request asks for; empty where it names none."""
    model = request.get("model")
    return model if isinstance(model, str) else ""
