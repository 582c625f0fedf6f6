"""An evaluation: everything `understudy evaluate` says of a release. `docs/evaluation.md` documents its JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from distillation.audit_record import AuditRecord
from distillation.judgement import Judgement
from distillation.release_costs import Costs
from serving.exchange import Json

SCHEMA = 1


@dataclass(frozen=True, slots=True)
class PromiseMade:
    """What the release promised when it was tested: at most `max_disagreement`, with `certainty`."""

    max_disagreement: float
    certainty: float


@dataclass(frozen=True, slots=True)
class Admitted:
    """What the release's own card says of the look that let it in; None where an old card doesn't say.

    `admission` is "looks" or "e-process": then `look` is the candidate's number, and `labels` came since it was fixed.
    `delta` is what look number `look` spent of 1 − certainty, on `labels` labels, and `coverage` what it expected.
    """

    look: int | None
    labels: int | None
    delta: float | None
    coverage: float | None
    admission: str = "looks"


@dataclass(frozen=True, slots=True)
class JudgedAnswer:
    """One answer of the student's as the release's card has it: by how many labels it was judged, and what they showed.

    `estimate` is its disagreement, shrunk towards that of all; `standing` is `vetoed`, `shown` (to keep the promise by
    itself) or `unproven` (neither).
    """

    answer: str
    labels: int
    disagreements: int
    estimate: float
    standing: str


@dataclass(frozen=True, slots=True)
class OneRelease:
    """A release of the task, as its card has it. `created` is in seconds since the epoch."""

    name: str
    created: float | None
    coverage: float | None
    live: bool


@dataclass(frozen=True, slots=True)
class Rules:
    """Answers, in their normal form, that the release treats by more than their confidence.

    It passes on those that are `always_escalate`, `vetoed` (shown to be worse than promised) or `unproven` (named in
    `prove`, and they haven't), and serves `proven` ones by bounds of their own.
    """

    always_escalate: list[str]
    vetoed: list[str]
    unproven: list[str]
    proven: list[str]


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One release of a task, judged by what is known now.

    `log` is on all labels of the log, `since` on those that came after the release was made (nothing of it was fitted
    to or chosen by them), `recording` on a file; each is None where there is nothing to judge by. `left_out` counts
    exchanges of the log that aren't used, `seen` rows of the recording that the release was fitted on, which aren't
    used either. `answers` are the card's, the worst first. `expected_broken` is how many of the task's releases may
    break their promise. `notes` are for people.
    """

    task: str
    release: str
    live: bool
    student: str
    created: float | None
    threshold: float
    promise: PromiseMade
    admitted: Admitted
    answers: list[JudgedAnswer]
    log: Judgement | None
    since: Judgement | None
    recording: Judgement | None
    seen: int
    audits: AuditRecord
    costs: Costs
    rules: Rules
    releases: list[OneRelease]
    expected_broken: float
    left_out: dict[str, int]
    notes: list[str]

    def to_json(self) -> Json:
        """The evaluation as `--json` prints it."""
        return {"schema": SCHEMA, **asdict(self)}
