"""The cliff: after training, 41 % of the answers got significantly worse under an unchanged average.

The first student disagrees 7.3 % everywhere. The second disagrees 7.3 % as well, but 17 % on seven of seventeen answers
and 1 % on the others. α = δ = 10 %: by the average both may answer everything. Planted in a task's whole life, with the
vetoes taken out and with them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from scipy.stats import binom

from routers.admission import AnswerTerms, Verdict, admit
from routers.confidence import Confidence
from routers.propensity import Period, pooled_propensity
from routers.router import Router
from routers.simulator import LiveStudent, Message, simulate
from serving.exchange import Exchange

ALPHA = DELTA = 0.1
ANSWERS, WORSE = 17, 7
RATES = np.where(np.arange(ANSWERS) < WORSE, 0.17, 0.005)
FIRST, SECOND = 5000, 10_000
"""When the two students are tested, in messages."""


def stream(seed: int, length: int) -> list[Message]:
    """Messages that say what each of the two students answers, and how sure it is (which tells nothing)."""
    rng = np.random.default_rng(seed)
    second = rng.integers(0, ANSWERS, length)
    slips = rng.random(length) < RATES[second]
    teacher = np.where(slips, (second + rng.integers(1, ANSWERS, length)) % ANSWERS, second)
    first_slips = rng.random(length) < RATES.mean()
    first = np.where(first_slips, (teacher + rng.integers(1, ANSWERS, length)) % ANSWERS, teacher)
    sure = rng.random(length)
    return [
        Message(f"{one:02} {two:02} {score:.6f}", f"{right:02}")
        for one, two, score, right in zip(first, second, sure, teacher, strict=True)
    ]


@dataclass(frozen=True)
class Student:
    """The first or the second."""

    router: Router
    which: int

    def skips(self, text: str) -> bool:
        return False

    def predict(self, text: str) -> tuple[str, float, Mapping[str, float]]:
        words = text.split()
        return words[self.which], float(words[2]), {}


@dataclass
class Learner:
    """Tests the first student and then the second, as a look does; `vetoes` off, it sees the average alone."""

    vetoes: bool
    verdicts: list[Verdict] = field(default_factory=list)
    released: list[Student] = field(default_factory=list)

    def learn(self, exchanges: Sequence[Exchange]) -> tuple[str, LiveStudent] | None:
        which = len(self.verdicts)
        if len(exchanges) not in (FIRST, SECOND):
            return None
        labelled = [e for e in exchanges if e.teacher is not None or e.audit == "missing"]
        texts = [e.request["messages"][0]["content"] for e in labelled]
        router = Router(Confidence.of_score(1.0, 0.0), rank_threshold=0.0)
        answers = [text.split()[which] for text in texts]
        ranks = [float(text.split()[2]) for text in texts]
        right = [e.teacher.choices[0]["message"]["content"] if e.teacher else None for e in labelled]
        periods = [Period(FIRST, 0.05, np.zeros(len(texts), bool))]
        if self.released:
            before = self.released[0]
            accepted = [before.router.judge(float(t.split()[2]), t.split()[0]).accepted for t in texts]
            periods.append(Period(SECOND - FIRST, 0.05, np.array(accepted)))
        verdict = admit(
            ranks,
            answers,
            [answer == truth for answer, truth in zip(answers, right, strict=True)],
            pooled_propensity(periods),
            max_disagreement=ALPHA,
            delta=DELTA,
            # No discovery is made at a level of zero.
            level=DELTA if self.vetoes else 0.0,
            terms=AnswerTerms(),
            seed=which,
        )
        self.verdicts.append(verdict)
        if not verdict.passed:
            return None
        router = replace(router, rank_threshold=verdict.rank_threshold, vetoed=verdict.vetoed)
        self.released.append(Student(router, which))
        return f"r{which + 1}", self.released[-1]


@pytest.mark.parametrize("vetoes", [False, True])
def test_answers_that_got_worse_under_an_unchanged_average(vetoes: bool) -> None:
    lives, cliffs, served, wrong, vetoed, mistaken = 0, 0, 0, 0, 0, 0
    for seed in range(3):
        learner = Learner(vetoes)
        messages = stream(seed, SECOND + 1500)
        run = simulate(messages, learner, learn_every=FIRST, seed=seed, rate=0.05)
        if [kept.release for kept in run.releases] != ["r1", "r2"]:
            continue  # the luck of the strictest level
        lives += 1
        first, second = learner.verdicts
        assert len(first.vetoed) <= 1, "of the first, no answer is worse than the others"
        for one in second.slices:
            significant = one.worse <= DELTA * WORSE / ANSWERS
            assert (one.standing == "vetoed") is (vetoes and significant)
        served_worse = set()
        for message, reply in zip(messages[SECOND:], run.served[SECOND:], strict=True):
            if reply.by_student:
                served += 1
                wrong += reply.answer != message.teacher
                if int(reply.answer) < WORSE:
                    served_worse.add(reply.answer)
        cliffs += len(served_worse)
        vetoed += len(second.vetoed)
        mistaken += sum(int(answer) >= WORSE for answer in second.vetoed)
    assert lives >= 2, "both pass by their average"
    if vetoes:
        assert cliffs <= 0.1 * WORSE * lives, f"{cliffs} of {WORSE * lives} worse answers were served"
        assert wrong < 0.02 * served
        assert binom.sf(mistaken - 1, vetoed, DELTA) > 1e-3, f"{mistaken} of {vetoed} vetoes were mistaken"
    else:
        assert cliffs == WORSE * lives, "the average hides all of them"
        assert wrong > 0.06 * served
        assert wrong < ALPHA * served
