"""`understudy learn` for the simulator: the same dataset, look and release, without files; and the oracle's share."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from distillation.betting import freeze, peek
from distillation.candidate import Candidate
from distillation.dataset import Row, build_dataset, known_answers
from distillation.due import not_due
from distillation.gate import take_look
from distillation.linear_training import TermCounts
from distillation.past import PastRelease
from distillation.watching import came_after
from routers.foresight_fit import Stakes
from routers.looks import PastLook, labels_needed, next_look
from routers.router import Router
from routers.simulator import LiveStudent, Message
from serving.agreement import comparison
from serving.closed_answers import TokenEstimate
from serving.exchange import Exchange
from serving.linear import LinearStudent
from serving.task_settings import TaskPolicy


@dataclass(frozen=True, slots=True)
class SimulatedRelease:
    """A release as the simulator plays it."""

    release: PastRelease

    @property
    def router(self) -> Router:
        """The release's router."""
        return self.release.router

    def skips(self, text: str) -> bool:
        """Whether the student isn't asked."""
        foresight = self.release.ahead.foresight
        return foresight is not None and foresight.skips(text)

    def predict(self, text: str) -> tuple[str, float, Mapping[str, float]]:
        """The student's answer, score and signals."""
        score, signals, answer = self.release.predict(text)
        return answer, score, signals


@dataclass(slots=True)
class SimulatedLearner:
    """Learns as `understudy learn` does, remembering its looks and releases in memory instead of on disk.

    `fence` is when a release was last withdrawn (`withdrawn`), as `Live.fence` says it; −∞: never.
    """

    policy: TaskPolicy
    seed: int
    stakes: Stakes | None = None
    looks: list[PastLook] = field(default_factory=list)
    releases: dict[str, PastRelease] = field(default_factory=dict)
    candidate: Candidate | None = None
    fence: float = -math.inf

    def withdrawn(self, at: float) -> None:
        """The watch has withdrawn what was live: only what comes after `at` counts from now on."""
        self.fence = at

    def learn(self, exchanges: Sequence[Exchange]) -> tuple[str, LiveStudent] | None:
        """A new release if a look is due and passes, or one level more of the candidate."""
        exchanges = came_after(exchanges, self.fence)
        if self.policy.admission == "e-process":
            return self._bet(exchanges)
        most = sum(one.teacher is not None or one.audit == "missing" for one in exchanges)
        if most < self._needed():
            return None  # as `not_due` will say, but without reading the whole log
        dataset = build_dataset(exchanges, comparison(self.policy.agreement), self.policy.student.sees)
        if not_due(dataset, self.looks, self.policy, fence=self.fence) is not None:
            return None
        number = next_look(self.looks)
        look = take_look(
            dataset,
            self.releases,
            self.policy,
            number=number,
            seed=self.seed + len(self.looks),
            stakes=self.stakes,
        )
        at = exchanges[-1].created
        self.looks.append(PastLook(number, look.labels, look.candidate is not None, at))
        return None if look.candidate is None else self._release(look.candidate)

    def _bet(self, exchanges: Sequence[Exchange]) -> tuple[str, LiveStudent] | None:
        dataset = build_dataset(exchanges, comparison(self.policy.agreement), self.policy.student.sees)
        if self.candidate is not None and self.candidate.after <= self.fence:
            self.candidate = None
        if self.candidate is not None:
            look = peek(self.candidate, dataset, self.policy)
            if look.candidate is not None:
                self.candidate = replace(self.candidate, served=look.candidate.router)
                self.looks[-1] = replace(self.looks[-1], released=True)
                return self._release(look.candidate)
        spare = self.candidate is None or self.candidate.exhausted(len(dataset.rows))
        if spare and not_due(dataset, self.looks, self.policy, fence=self.fence) is None:
            self.candidate = freeze(
                dataset,
                self.releases,
                self.policy,
                number=next_look(self.looks),
                serial=self.seed + len(self.looks),
                after=exchanges[-1].created,
            )
            at = exchanges[-1].created
            self.looks.append(PastLook(self.candidate.number, len(dataset.rows), False, at))
        return None

    def _needed(self) -> int:
        policy = self.policy
        return labels_needed(self.looks, policy.max_disagreement, policy.certainty, fence=self.fence)

    def _release(self, release: PastRelease) -> tuple[str, LiveStudent]:
        name = f"r{len(self.releases) + 1:04d}"
        self.releases[name] = release
        return name, SimulatedRelease(release)


@dataclass(frozen=True, slots=True)
class Oracle:
    """What one fixed score threshold, chosen by hindsight, needs: shares of teacher calls, all and the last 1,000."""

    threshold: float
    teacher_share: float
    last_share: float
    disagreement: float
    answers: list[str]


def oracle(
    messages: Sequence[Message], max_disagreement: float, *, refit_every: int = 100, steps: int = 7
) -> Oracle | None:
    """The floor for this student: the lowest threshold whose accepted answers disagree at most α, without audits.

    The student is refitted after every `refit_every` labels; only escalated messages are labels. Found by bisection
    over the threshold in `steps` steps; None if even the strictest tried disagrees more.
    """
    comparing = comparison(TaskPolicy().agreement)
    rows = [
        Row(
            str(i),
            m.text,
            comparing.key(choices := [{"message": {"content": m.teacher}, "finish_reason": "stop"}]),
            choices,
            None,
            None,
            None,
            None,
        )
        for i, m in enumerate(messages)
    ]
    counts = TermCounts([m.text for m in messages])
    low, high, best = 0.0, 4.0, None
    for _ in range(steps):
        middle = (low + high) / 2
        tried = _fixed_threshold(messages, rows, counts, middle, refit_every)
        if tried.disagreement <= max_disagreement:
            best, high = tried, middle
        else:
            low = middle
    return best


def _fixed_threshold(
    messages: Sequence[Message], rows: Sequence[Row], counts: TermCounts, threshold: float, refit_every: int
) -> Oracle:
    known = known_answers(rows)
    place = {answer.key: index for index, answer in enumerate(known)}
    answers = np.array([place[row.answer or ""] for row in rows])
    labelled: list[int] = []
    given: list[str] = []
    student: LinearStudent | None = None
    called: list[bool] = []
    wrong = 0
    fitted_on = 0
    for number, message in enumerate(messages):
        accepted = False
        if student is not None:
            prediction = student.predict(message.text)
            accepted = prediction.score >= threshold
            if accepted:
                given.append(student.answers[prediction.index].key)
                wrong += given[-1] != rows[number].answer
        called.append(not accepted)
        if accepted:
            continue
        given.append(message.teacher)
        labelled.append(number)
        if len(labelled) >= fitted_on + refit_every:
            fitted_on = len(labelled)
            training = np.array(labelled)
            student = counts.fit(training, answers[training], known, TokenEstimate(0.0, 0.0))
    last = called[-1000:]
    accepted_count = len(called) - sum(called)
    return Oracle(
        threshold, sum(called) / len(called), sum(last) / len(last), wrong / max(1, accepted_count), given
    )
