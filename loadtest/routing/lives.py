"""A task's life in the simulator with one rule of STATISTICS.md broken on purpose.

The student is a table: what it says to each text, how sure it is, and that nothing may be released is known
beforehand. Coin, decisions, looks and the test of the promise are the gateway's own; what is broken is broken here.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from routers.confidence import Confidence
from routers.looks import PastLook, labels_needed, next_look, spent
from routers.promise import Promise
from routers.propensity import Period, pooled_propensity
from routers.router import Router
from routers.simulator import LiveStudent, Message, simulate
from serving.exchange import Exchange

ALPHA = 0.1
DELTA = 0.1

Bools = NDArray[np.bool_]
Floats = NDArray[np.float64]
Said = Mapping[str, tuple[str, float]]
"""A student as a table: from a text to its answer and score."""

_FOLDS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """Which rules are kept; each names the section of STATISTICS.md that has it."""

    looks: bool = True  # §3: a look when labels have grown by a factor, each with its share of δ
    crossed: bool = True  # §3: no label scores its own exchange
    own_traffic: bool = True  # §2: only the task's own traffic, as it comes
    missing: bool = True  # §2: an audit without an answer is a disagreement
    replays: bool = True  # §1: answers from the cache count
    weights: bool = True  # §2: 1/propensity
    audits: bool = True  # §2: what was answered is audited
    random_coin: bool = True  # §2: the coin knows nothing of the content


@dataclass(frozen=True, slots=True)
class TableStudent:
    """A release whose student is a table."""

    said: Said
    router: Router

    @classmethod
    def above(cls, threshold: float, said: Said) -> TableStudent:
        """The release that gives every answer whose score is at least `threshold`."""
        return cls(said, Router(Confidence.of_score(1.0, 0.0), threshold))

    def skips(self, text: str) -> bool:
        """It is always asked."""
        return False

    def predict(self, text: str) -> tuple[str, float, Mapping[str, float]]:
        """What the table says."""
        answer, score = self.said[text]
        return answer, score, {}


class Scorer(Protocol):
    """Fits a score on labels and gives it to texts."""

    def __call__(self, fitted: Sequence[str], agreed: Bools, texts: Sequence[str]) -> Floats:
        """The scores of `texts`, by what is known of the texts `fitted`."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One life: the messages in the order they come, and the student that is to be tested.

    `breaks` says of a release, by what is known of the traffic, whether it breaks the promise. `earlier` is a release
    that goes live after `learn_every` messages, as if promoted by hand; there is no look before `first_look` messages.
    `scorer` takes the place of the table's scores. `missing` is the chance that an audit of a message is lost. With
    `only_audits` the labels are those of the coin alone (the reference test).
    """

    messages: Sequence[Message]
    said: Said
    breaks: Callable[[TableStudent], bool]
    learn_every: int
    first_look: int = 0
    audit_rate: float = 0.05
    earlier: TableStudent | None = None
    scorer: Scorer | None = None
    missing: Callable[[Message], float] = lambda message: 0.0
    only_audits: bool = False


@dataclass(frozen=True, slots=True)
class Label:
    """What a labelled exchange says: text, score and answers; `missing` audits have no answer of the teacher's."""

    text: str
    score: float
    agreed: bool
    teacher: str | None
    coin: bool
    by_student: bool

    @property
    def missing(self) -> bool:
        """Whether the teacher could not be had."""
        return self.teacher is None


@dataclass(slots=True)
class TableLearner:
    """Tests the promise of the task's student on what was logged, by the rules that are kept."""

    task: Task
    rules: Rules
    seed: int
    looks: list[PastLook] = field(default_factory=list)
    released: TableStudent | None = None
    _started: bool = False
    _read: int = 0
    _labels: list[Label] = field(default_factory=list)

    def learn(self, exchanges: Sequence[Exchange]) -> tuple[str, LiveStudent] | None:
        """The earlier release, then, once it is proven, the student."""
        if self.task.earlier is not None and not self._started:
            self._started = True
            return "earlier", self.task.earlier
        if self.released is not None or len(exchanges) < self.task.first_look:
            return None
        if self.rules.looks and len(exchanges) < labels_needed(self.looks, ALPHA, 1.0 - DELTA):
            return None
        labels = self._chosen(exchanges)
        number = next_look(self.looks)
        delta = spent(number, DELTA) if self.rules.looks else DELTA
        agreed = np.array([label.agreed for label in labels])
        threshold = Promise(ALPHA, 1.0 - delta, seed=self.seed).threshold(
            self._scores(labels, agreed), agreed, propensity=self._propensity(exchanges, labels)
        )
        self.looks.append(PastLook(number, len(exchanges), threshold is not None))
        if threshold is None:
            return None
        self.released = TableStudent.above(threshold, self._served(labels, agreed))
        return "tested", self.released

    def _chosen(self, exchanges: Sequence[Exchange]) -> list[Label]:
        """The labels that are tested: all there are, but for a rule that is broken."""
        fresh = exchanges[self._read :]
        self._labels += [
            self._label(one) for one in fresh if one.teacher is not None or one.audit == "missing"
        ]
        self._read = len(exchanges)
        labels = self._labels
        if self.task.only_audits:
            labels = [label for label in labels if self._drawn(label)]
        if not self.rules.audits:
            labels = [label for label in labels if not label.by_student]
        if not self.rules.missing:
            labels = [label for label in labels if not label.missing]
        if not self.rules.replays:
            labels = list({label.text: label for label in reversed(labels)}.values())
        if not self.rules.own_traffic:
            labels = _balanced(labels)
        return labels

    def _label(self, exchange: Exchange) -> Label:
        text = str(exchange.request["messages"][-1]["content"])
        answer, score = self.task.said[text]
        given = exchange.teacher
        teacher = None if given is None else str(given.choices[0]["message"]["content"])
        return Label(text, score, answer == teacher, teacher, exchange.coin, exchange.route == "student")

    def _drawn(self, label: Label) -> bool:
        """Whether the coin fell, or what stands in for it where it may see the content."""
        if self.rules.random_coin:
            return label.coin
        return zlib.crc32(f"{self.seed} {label.text}".encode()) < self.task.audit_rate * 2**32

    def _scores(self, labels: Sequence[Label], agreed: Bools) -> Floats:
        if self.task.scorer is None:
            return np.array([label.score for label in labels])
        texts = [label.text for label in labels]
        if not self.rules.crossed:
            return self.task.scorer(texts, agreed, texts)
        scores = np.empty(len(texts))
        folds = np.random.default_rng(self.seed).permutation(len(texts)) % _FOLDS
        for fold in range(_FOLDS):
            fitted, held_out = np.flatnonzero(folds != fold), np.flatnonzero(folds == fold)
            scores[held_out] = self.task.scorer(
                [texts[i] for i in fitted], agreed[fitted], [texts[i] for i in held_out]
            )
        return scores

    def _served(self, labels: Sequence[Label], agreed: Bools) -> Said:
        """The student as it would be served: its score fitted on all labels."""
        said = self.task.said
        if self.task.scorer is None:
            return said
        scores = self.task.scorer([label.text for label in labels], agreed, list(said))
        return {text: (said[text][0], float(score)) for text, score in zip(said, scores, strict=True)}

    def _propensity(self, exchanges: Sequence[Exchange], labels: Sequence[Label]) -> Floats | None:
        earlier = self.task.earlier
        if earlier is None or not (self.rules.weights and self.rules.audits):
            return None
        accepted = [earlier.router.decide(earlier.said[label.text][1], {}).accepted for label in labels]
        first = sum(one.release is None for one in exchanges)
        return pooled_propensity(
            [
                Period(first, self.task.audit_rate, np.zeros(len(labels), np.bool_)),
                Period(len(exchanges) - first, self.task.audit_rate, np.array(accepted)),
            ]
        )


def breaks(task: Task, rules: Rules, seed: int) -> bool | None:
    """Live the task's life: whether a release broke the promise, or None when none was made."""
    learner = TableLearner(task, rules, seed)
    simulate(
        task.messages,
        learner,
        learn_every=task.learn_every,
        seed=seed,
        rate=task.audit_rate,
        missing=task.missing,
    )
    if learner.released is None:
        return None
    return task.breaks(learner.released)


def _balanced(labels: Sequence[Label]) -> list[Label]:
    """As many labels of each of the teacher's answers as there are of the rarest."""
    counts = Counter(label.teacher for label in labels)
    left = dict.fromkeys(counts, min(counts.values()))
    kept = []
    for label in labels:
        if left[label.teacher]:
            left[label.teacher] -= 1
            kept.append(label)
    return kept
