"""Releases whose student is served elsewhere: what they keep, and redoing their decisions."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import orjson

from distillation.ahead import Ahead
from distillation.as_served import AsServed, as_served
from distillation.dataset import Row
from distillation.past import ROUTER_FILE, Redone
from distillation.refused import Refused
from routers.router import Router
from serving.errors import DamagedRelease
from serving.exchange import StudentAnswer
from serving.lm_plan import LmPlan
from serving.releases import HELD_OUT_FILE, Release
from serving.served import ServedPlan, read_plan

HeldOut = Mapping[str, tuple[float, str | None]]


def student_id(plan: ServedPlan, redact: Sequence[str]) -> str:
    """The name under which a student's answers are kept: of all that they depend on, 16 hex digits.

    `redact` is what it doesn't get to see. How long an answer may take isn't among it.
    """
    asked = {**plan.asked(), "redact": sorted(redact)}
    return hashlib.sha256(orjson.dumps(asked)).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class Answered:
    """The student's answer to a row: `key` is its normal form (None: there is none), `agreed` with the label."""

    answer: StudentAnswer
    key: str | None
    agreed: bool


@dataclass(frozen=True, slots=True)
class ServedRelease:
    """A release's plan and router, how it ranked the rows its confidence was fitted on, and the student's answers.

    `held_out` maps the ids of those rows to the rank and answer key that they were tested with: −∞ for one that was
    given up, no key for one that was judged before its end. `answered` maps ids to answers; what the student refuses
    isn't there. `name` is None until it is written. `refused` says which of the rows it was fitted on are refused by
    other rows' vetoes. What `ahead` skips is never accepted. `adapter` holds the files of the model's LoRA adapter, if
    it has one; they are only there in a release that isn't written yet.
    """

    plan: ServedPlan
    router: Router
    held_out: HeldOut
    answered: Mapping[str, Answered]
    name: str | None = None
    ahead: Ahead = field(default_factory=Ahead)
    refused: Refused = field(default_factory=Refused)
    adapter: Mapping[str, bytes] = field(default_factory=dict)

    def accepts_row(self, row: Row) -> bool:
        """Whether the release would have answered a row's request, had its confidence not been fitted on it."""
        if self.name is not None and row.release == self.name:
            return row.accepted  # the log knows
        redone = self.redo(row)
        return redone is not None and redone.decision.accepted

    def redo(self, row: Row) -> Redone | None:
        """What the release makes of a row, had it not been fitted on it; None where its student refuses to answer."""
        known = self.answered.get(row.id)
        if known is None:
            return None
        served = as_served(known.answer, self.plan, streamed=is_streamed(row))
        ranked = self.held_out.get(row.id) or self._rank(known, served)
        if served.said is None:
            decision = self.router.judge(*ranked, vetoed=self.refused.vetoed(row.id, self.held_out.keys()))
        else:  # of no answer's slice yet, so that its label has no hand in a veto
            decision = self.router.judge_begun(ranked[0], served.said)
        if self.ahead.skips(row, self.held_out.keys()):
            decision = replace(decision, accepted=False, reason="skipped")
        return Redone(ranked[0], known.key, known.agreed, decision)

    def _rank(self, known: Answered, served: AsServed) -> tuple[float, str | None]:
        key = known.key if served.ended else None
        if self.gives_up(served):
            return -math.inf, key
        return self.router.confidence.rank(served.judged.score, served.judged.signals, key), key

    def gives_up(self, served: AsServed) -> bool:
        """Whether a generation is stopped at one of its early checkpoints."""
        cut = self.plan.stop_below
        if cut is None:
            return False
        return any(self.router.confidence.rank(early.score, early.signals) < cut for early in served.early)

    def files(self) -> dict[str, bytes]:
        """The whole as files of a release; `read_served_release` reads them back."""
        return {
            **self.plan.files(),
            ROUTER_FILE: self.router.dump(),
            HELD_OUT_FILE: orjson.dumps(self.held_out),  # −∞ becomes null
            **self.ahead.files(),
            **self.refused.files(self.router.vetoed),
            **self.adapter,
        }


def read_served_release(release: Release, answered: Mapping[str, Answered]) -> ServedRelease:
    """A release of the store, with its student's answers by row. Raises DamagedRelease."""
    try:
        held_out = {
            id: (-math.inf if rank is None else float(rank), None if key is None else str(key))
            for id, (rank, key) in orjson.loads(release.files[HELD_OUT_FILE]).items()
        }
        router = Router.load(release.files[ROUTER_FILE])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DamagedRelease(
            f"release {release.name} of task {release.task}: {HELD_OUT_FILE} can't be read: {error}"
        ) from error
    return ServedRelease(
        read_plan(release.files),
        router,
        held_out,
        answered,
        release.name,
        Ahead.read(release.files),
        Refused.read(release.files),
    )


def stopping(plan: ServedPlan, below: float | None) -> ServedPlan:
    """The plan of a release that gives generations up below this rank; only an `lm` has any."""
    return replace(plan, stop_below=below) if isinstance(plan, LmPlan) else plan


def is_streamed(row: Row) -> bool:
    """Whether the client asked for a stream."""
    return row.request is not None and row.request.get("stream") is True
