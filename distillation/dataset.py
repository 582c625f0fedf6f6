"""From the log to what a student is fitted and judged on: nothing else is read.

A row is an eligible exchange with a label: the teacher's answer is known, or was owed and never came (`missing`, which
counts as disagreement in every test and teaches nothing). The traffic of each period is counted whole, labelled or not.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial

from distillation.teachers import requested_of, teacher_since
from routers.noise import Noise
from serving import sight
from serving.agreement import Comparison, comparison
from serving.chat import last_user_text
from serving.closed_answers import KnownAnswer, TokenEstimate
from serving.exchange import Exchange, Json
from serving.sight import Sees
from serving.task_settings import TaskPolicy

Unsupported = Callable[[Json], str | None]
"""The feature of a request that a student wasn't made for, or None."""

STALE_AUDIT_S = 3600.0
"""An audit that is still owed after so long counts as missing."""


@dataclass(frozen=True, slots=True)
class Row:
    """One labelled exchange. `answer` is the normal form of the teacher's answer, None if it is missing.

    `text` is what the student to be sees of `request`; a past release may see it otherwise. `created` is in seconds
    since the epoch; `accepted` says whether the client got the student's answer. `propensity` is the exchange's own,
    `least_propensity` the smallest that any could have had then. `steady` says whether the teacher, asked twice,
    agreed with itself; None: there is no second answer to compare.
    """

    id: str
    text: str
    answer: str | None
    choices: list[Json] | None
    prompt_tokens: int | None
    completion_tokens: int | None
    teacher_model: str | None
    release: str | None
    request: Json | None = field(default=None, compare=False, repr=False)
    created: float = field(default=0.0, compare=False)
    accepted: bool = field(default=False, compare=False)
    propensity: float = field(default=1.0, compare=False)
    least_propensity: float = field(default=1.0, compare=False)
    steady: bool | None = field(default=None, compare=False)


@dataclass(slots=True)
class Traffic:
    """The eligible traffic while one release was live (or none): how much, and its mean audit rate."""

    exchanges: int = 0
    accepted: int = 0
    rates: float = 0.0

    @property
    def audit_rate(self) -> float:
        """The mean of the audit rates the coins were flipped with."""
        return self.rates / self.exchanges if self.exchanges else 0.0


@dataclass(slots=True)
class Dataset:
    """What the log says about one task. `left_out` counts exchanges that aren't used, by why.

    `teacher_since` is when the teacher last changed, in seconds since the epoch; 0: it never did.
    """

    rows: list[Row] = field(default_factory=list)
    traffic: dict[str | None, Traffic] = field(default_factory=dict)
    left_out: Counter[str] = field(default_factory=Counter)
    teacher_since: float = 0.0

    @property
    def answers(self) -> list[str]:
        """The known teacher answers, one a row that has one."""
        return [row.answer for row in self.rows if row.answer is not None]

    @property
    def noise(self) -> Noise:
        """How often the teacher disagreed with itself."""
        return Noise.of(row.steady for row in self.rows)

    def without_period(self, release: str | None) -> Dataset:
        """The same without what came while `release` was live: its decisions can't be redone any more."""
        rows = [row for row in self.rows if row.release != release]
        traffic = {key: value for key, value in self.traffic.items() if key != release}
        left_out = self.left_out + Counter({"release is gone": len(self.rows) - len(rows)})
        return Dataset(rows, traffic, left_out, self.teacher_since)


def build_dataset(
    exchanges: Iterable[Exchange],
    comparing: Comparison,
    sees: Sees = "message",
    *,
    unsupported: Unsupported | None = None,
    trained_until: float = -math.inf,
    judges: Callable[[str], bool] | None = None,
) -> Dataset:
    """Sort the exchanges of one task, oldest first, into rows and traffic. Order is kept.

    `sees` is what the student to be sees of a request. What it can't serve for that is left out, and what only an
    earlier student couldn't serve isn't: the teacher answered it for certain. A student that sees all of a request says
    what is `unsupported` itself. One that was trained elsewhere on the log, up to `trained_until` (seconds since the
    epoch), has nothing to do with what came before: neither labels nor traffic. The same goes for what came before the
    teacher changed (distillation/teachers.py). `judges` says by its id whether an exchange is of the part that judges
    (distillation/split.py): what isn't counts neither as label nor as traffic; None: all judge.

    Nothing after the oldest audit that is still owed is used: leaving out just the audits that are under way would
    make audited traffic look rarer than it is. One owed for longer than an hour is missing.
    """
    ordered = list(exchanges)
    stale = ordered[-1].created - STALE_AUDIT_S if ordered else 0.0
    changed = teacher_since(ordered)
    dataset = Dataset(teacher_since=max(changed.values(), default=0.0))
    waiting = False
    feature_of = partial(sight.unsupported, sees=sees) if unsupported is None else unsupported
    for exchange in ordered:
        if exchange.created <= trained_until:
            dataset.left_out["the student was trained on it"] += 1
            continue
        if changed and exchange.created < changed.get(requested_of(exchange.request), -math.inf):
            dataset.left_out["the teacher has changed since"] += 1
            continue
        if judges is not None and not judges(exchange.id):
            dataset.left_out["kept for training"] += 1
            continue
        owed = exchange.audit == "pending" and _unusable(exchange, feature_of) is None
        waiting = waiting or (owed and exchange.created >= stale)
        why_not = "behind an audit still pending" if waiting else _unusable(exchange, feature_of)
        if why_not is not None:
            dataset.left_out[why_not] += 1
            continue
        traffic = dataset.traffic.setdefault(exchange.release, Traffic())
        traffic.exchanges += 1
        traffic.rates += exchange.audit_rate
        traffic.accepted += exchange.by_student
        teacher = exchange.teacher
        if teacher is None and exchange.audit not in ("missing", "pending"):
            continue  # accepted and not audited: traffic without a label
        usage = teacher.usage if teacher is not None and teacher.usage is not None else {}
        dataset.rows.append(
            Row(
                id=exchange.id,
                text=(
                    sight.seen_text(exchange.request, sees)
                    if unsupported is None
                    else last_user_text(exchange.request) or ""
                ),
                answer=_answer(exchange, comparing),
                choices=teacher.choices if teacher is not None else None,
                prompt_tokens=_count(usage, "prompt_tokens"),
                completion_tokens=_count(usage, "completion_tokens"),
                teacher_model=teacher.model if teacher is not None else None,
                release=exchange.release,
                request=exchange.request,
                created=exchange.created,
                accepted=exchange.by_student,
                propensity=exchange.audit_rate if exchange.by_student else 1.0,
                least_propensity=1.0 if exchange.release is None else exchange.audit_rate or 1.0,
                steady=_steady(exchange, comparing),
            )
        )
    return dataset


def dataset_of(
    exchanges: Iterable[Exchange], policy: TaskPolicy, judges: Callable[[str], bool] | None = None
) -> Dataset:
    """The dataset of the student that a policy asks for, as learning will see it; `judges` as in `build_dataset`."""
    comparing = comparison(policy.agreement)
    student = policy.student
    until = -math.inf if student.trained_until is None else student.trained_until.timestamp()
    if student.kind != "lm":
        return build_dataset(exchanges, comparing, student.sees, trained_until=until, judges=judges)
    from serving.lm import unsupported  # with the HTTP client, which a linear student doesn't need

    return build_dataset(exchanges, comparing, unsupported=unsupported, trained_until=until, judges=judges)


def _answer(exchange: Exchange, comparing: Comparison) -> str | None:
    """The normal form of the teacher's answer; of a redacted one a form that no student can give."""
    if exchange.teacher is None:
        return None
    key = comparing.key(exchange.teacher.choices)
    return f" redacted {key}" if "teacher" in exchange.redacted else key


def _steady(exchange: Exchange, comparing: Comparison) -> bool | None:
    """Whether the teacher said the same twice; beside a student it gets the harder requests, which aren't counted."""
    first, again = exchange.teacher, exchange.repeat
    if first is None or again is None or exchange.release is not None or "teacher" in exchange.redacted:
        return None
    return comparing.agree(first.choices, again.choices)


def _count(usage: Json, name: str) -> int | None:
    """A number of tokens, if the teacher's usage holds one: servers write all kinds of things there."""
    value = usage.get(name)
    return value if type(value) is int and value >= 0 else None


def _unusable(exchange: Exchange, unsupported: Unsupported) -> str | None:
    if not exchange.eligible:
        return "not eligible"
    if exchange.superseded_by is not None:
        return "superseded by a retry"
    if exchange.cancelled:
        # Also those that were audited: whether they were must not decide whether they count.
        return "cancelled by the client"
    feature = unsupported(exchange.request)
    if feature is not None:
        return f"unsupported: {feature}"
    if exchange.teacher is not None and not exchange.teacher.trainable:
        return "teacher not marked trainable"
    if exchange.teacher is None and not exchange.by_student and exchange.audit != "missing":
        return "teacher gave no answer"
    return None


def known_answers(rows: Iterable[Row]) -> list[KnownAnswer]:
    """The closed answer space: every ordinary answer seen, in the form the teacher most often gave it, sorted by key.

    Answers that aren't plain text ended by itself (refusals, cut-off answers: their keys begin with a space) are the
    teacher's to give.
    """
    forms: dict[str, Counter[str]] = {}
    tokens: dict[str, Counter[int]] = {}
    for row in rows:
        if row.answer is None or row.choices is None or row.answer.startswith(" "):
            continue
        match row.choices:
            case [{"message": {"content": str(content)}}]:
                form = content
            case _:  # parts, or no content at all: the normal form says the same
                form = row.answer
        forms.setdefault(row.answer, Counter())[form] += 1
        if row.completion_tokens is not None:
            tokens.setdefault(row.answer, Counter())[row.completion_tokens] += 1
    return [
        KnownAnswer(
            key=key,
            choices=[
                {
                    "index": 0,
                    "message": {
                        "role": "assistant",
                        "content": counted.most_common(1)[0][0],
                        "refusal": None,
                    },
                    "logprobs": None,
                    "finish_reason": "stop",
                }
            ],
            completion_tokens=tokens[key].most_common(1)[0][0] if key in tokens else 0,
        )
        for key, counted in sorted(forms.items())
    ]


def _spoken(row: Row) -> int:
    return len(row.text) if row.request is None else sight.spoken_characters(row.request)


def token_estimate(rows: Iterable[Row]) -> TokenEstimate:
    """The teacher's prompt tokens by the length of what was said: least squares on what its usage said."""
    pairs = [(_spoken(row), row.prompt_tokens) for row in rows if row.prompt_tokens is not None]
    if not pairs:
        return TokenEstimate(fixed=0.0, per_character=0.0)
    mean_length = sum(length for length, _ in pairs) / len(pairs)
    mean_tokens = sum(tokens for _, tokens in pairs) / len(pairs)
    spread = sum((length - mean_length) ** 2 for length, _ in pairs)
    shared = sum((length - mean_length) * (tokens - mean_tokens) for length, tokens in pairs)
    per_character = max(0.0, shared / spread) if spread > 0 else 0.0
    return TokenEstimate(fixed=mean_tokens - per_character * mean_length, per_character=per_character)
