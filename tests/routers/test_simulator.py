"""The simulator's mechanics, and the promise over a task's whole life: cold start, looks, later releases."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import binomtest

from routers.confidence import Confidence
from routers.looks import PastLook, labels_needed, next_look, spent
from routers.looks import tested_grid as levels_to_test  # under its own name pytest takes it for a test
from routers.promise import Promise
from routers.propensity import Period, pooled_propensity
from routers.router import Router
from routers.simulator import LiveStudent, Message, Run, simulate
from routers.watch import Watch
from serving.exchange import Exchange

ALPHA = DELTA = 0.1
SEEDS = 200


def stream(seed: int, length: int, bands: Sequence[tuple[float, float]]) -> list[Message]:
    """Messages that say which score the student will give and whether it will agree.

    Scores are uniform on [0, 1]; `bands` are (lowest score, disagreement), highest first.
    """
    rng = np.random.default_rng(seed)
    scores = rng.random(length)
    rates = np.select([scores >= low for low, _ in bands], [rate for _, rate in bands])
    wrong = rng.random(length) < rates
    return [Message(f"{score:.6f} {'ab'[int(w)]}", "a") for score, w in zip(scores, wrong, strict=True)]


def read(text: str) -> tuple[str, float]:
    score, answer = text.split()
    return answer, float(score)


@dataclass(frozen=True)
class Latent:
    """A student whose answers and scores stand in the messages."""

    router: Router

    def skips(self, text: str) -> bool:
        return False

    def predict(self, text: str) -> tuple[str, float, dict[str, float]]:
        return *read(text), {}


def accepting(threshold: float) -> Latent:
    return Latent(Router(Confidence.of_score(1.0, 0.0), threshold))


@dataclass
class Scripted:
    """Releases given students at given calls, whatever the log says, and keeps the log for a look at it."""

    releases: dict[int, Latent]
    calls: int = 0
    log: list[Exchange] = field(default_factory=list)

    def learn(self, exchanges: Sequence[Exchange]) -> tuple[str, LiveStudent] | None:
        self.calls += 1
        self.log = list(exchanges)
        student = self.releases.get(self.calls)
        return None if student is None else (f"r{self.calls}", student)


@dataclass
class PromiseLearner:
    """Takes looks as `understudy learn` does: schedule, pooled propensities, the weighted test.

    `looks` off tests at the full δ whenever it is asked. `grid` replaces the levels a look tests.
    """

    looks: bool = True
    grid: Sequence[float] | None = None
    past: list[PastLook] = field(default_factory=list)
    thresholds: dict[str | None, float] = field(default_factory=lambda: {None: np.inf})
    traffic: dict[str | None, int] = field(default_factory=dict)
    rates: dict[str | None, float] = field(default_factory=dict)
    scores: list[float] = field(default_factory=list)
    agreed: list[bool] = field(default_factory=list)
    seen: int = 0

    def learn(self, exchanges: Sequence[Exchange]) -> tuple[str, LiveStudent] | None:
        for exchange in exchanges[self.seen :]:
            self._note(exchange)
        self.seen = len(exchanges)
        labels = len(self.scores)
        if self.looks and labels < labels_needed(self.past, ALPHA, 1 - DELTA):
            return None
        number = next_look(self.past)
        scores = np.array(self.scores)
        promise = Promise(ALPHA, 1 - (spent(number, DELTA) if self.looks else DELTA), seed=len(self.past))
        chances = self._propensity(scores)
        grid = self.grid or levels_to_test(float((chances.min() / chances).sum()), promise.least_accepted)
        threshold = promise.threshold(scores, self.agreed, propensity=chances, grid=grid)
        self.past.append(PastLook(number, labels, threshold is not None))
        if threshold is None:
            return None
        name = f"r{len(self.thresholds)}"
        self.thresholds[name] = threshold
        return name, accepting(threshold)

    def _note(self, exchange: Exchange) -> None:
        self.traffic[exchange.release] = self.traffic.get(exchange.release, 0) + 1
        self.rates[exchange.release] = self.rates.get(exchange.release, 0.0) + exchange.audit_rate
        if exchange.teacher is None and exchange.audit != "missing":
            return
        answer, score = read(exchange.request["messages"][0]["content"])
        self.scores.append(score)
        teacher = exchange.teacher
        self.agreed.append(teacher is not None and teacher.choices[0]["message"]["content"] == answer)

    def _propensity(self, scores: NDArray[np.float64]) -> NDArray[np.float64]:
        return pooled_propensity(
            [
                Period(count, self.rates[name] / count, scores >= self.thresholds[name])
                for name, count in self.traffic.items()
            ]
        )


GOOD: list[tuple[float, float]] = [(0.4, 0.02), (0.0, 0.5)]


def test_without_a_release_everything_is_the_teachers() -> None:
    learner = Scripted({})
    run = simulate(stream(0, 95, GOOD), learner, learn_every=10, seed=0)
    assert learner.calls == 9
    assert run.releases == [] and run.teacher_share() == 1.0
    assert {(one.answer, one.by_student, one.release) for one in run.served} == {("a", False, None)}
    assert {(e.route, e.release, e.propensity, e.student) for e in learner.log} == {
        ("teacher", None, 1.0, None)
    }


def test_the_log_says_what_the_gateways_log_would() -> None:
    messages = stream(1, 3000, GOOD)
    learner = Scripted({5: accepting(0.5)})
    run = simulate(messages, learner, learn_every=100, seed=3, rate=0.1)
    log = learner.log
    assert [e.release for e in log] == [None] * 500 + ["r5"] * 2500
    for message, one, exchange in zip(messages, run.served, log, strict=True):
        answer, score = read(message.text)
        accepted = exchange.release is not None and score >= 0.5
        assert one.by_student is accepted and exchange.route == ("student" if accepted else "teacher")
        assert one.answer == (answer if accepted else message.teacher)
        assert one.teacher_called is (not accepted or exchange.coin)
        assert (exchange.teacher is not None) is one.teacher_called
        assert exchange.propensity == (0.1 if accepted else 1.0) and exchange.audit_rate == 0.1
        assert exchange.audit == ("answered" if accepted and exchange.coin else "none")
        assert (exchange.student is None) is (exchange.release is None)
    # The coin falls as often for every kind of request.
    for part in (
        log[:500],
        [e for e in log if e.route == "student"],
        [e for e in log if e.route != "student"],
    ):
        assert binomtest(sum(e.coin for e in part), len(part), 0.1).pvalue > 1e-3
    late = run.served[-400:]
    assert run.teacher_share(400) == sum(one.teacher_called for one in late) / 400


def test_a_missing_audit_is_logged_as_owed() -> None:
    learner = Scripted({1: accepting(0.0)})
    run = simulate(stream(2, 3000, GOOD), learner, learn_every=1000, seed=0, rate=0.2, missing=lambda _: 0.5)
    audits = [e for e in learner.log if e.route == "student" and e.coin]
    missing = [e for e in audits if e.audit == "missing"]
    assert binomtest(len(missing), len(audits), 0.5).pvalue > 1e-3
    assert all(e.teacher is None for e in missing)
    assert all(e.teacher is not None for e in audits if e.audit == "answered")
    assert all(e.audit == "none" for e in learner.log if not (e.route == "student" and e.coin))
    assert sum(one.teacher_called for one in run.served[1000:]) == len(audits)  # asked, though in vain


def test_the_coin_is_flipped_less_often_after_three_hundred_audits_of_a_release() -> None:
    learner = Scripted({1: accepting(0.0), 12: accepting(0.0)})
    simulate(stream(3, 13_000, GOOD), learner, learn_every=1000, seed=1)
    first = [e for e in learner.log if e.release == "r1"]
    audited = np.cumsum([e.audit == "answered" for e in first])
    assert audited[-1] > 300
    before = np.concatenate([[0], audited[:-1]])
    assert [e.audit_rate for e in first] == np.where(before < 300, 0.05, 0.02).tolist()
    assert {e.audit_rate for e in learner.log if e.release is None} == {0.05}
    assert {e.audit_rate for e in learner.log if e.release == "r12"} == {0.05}  # watched closely again


def test_a_release_is_judged_on_everything_after_it() -> None:
    messages = stream(4, 1000, GOOD)
    run = simulate(
        messages,
        Scripted({2: accepting(0.2), 5: accepting(0.9), 10: accepting(2.0)}),
        learn_every=100,
        seed=0,
    )
    for kept, threshold in zip(run.releases, (0.2, 0.9, 2.0), strict=True):
        rest = [read(message.text) for message in messages[kept.after :]]
        answered = [answer for answer, score in rest if score >= threshold]
        assert (kept.rest, kept.answered, kept.disagreed) == (len(rest), len(answered), answered.count("b"))
        assert kept.disagreement == (answered.count("b") / len(answered) if answered else 0.0)
    assert [(kept.release, kept.after) for kept in run.releases] == [("r2", 200), ("r5", 500), ("r10", 1000)]


def test_the_same_seed_is_the_same_run() -> None:
    def played(seed: int) -> Run:
        return simulate(
            stream(5, 1500, GOOD), PromiseLearner(), learn_every=50, seed=seed, missing=lambda _: 0.1
        )

    first = played(7)
    assert first == played(7)
    assert first.served != played(8).served
    assert len(first.releases) > 1


def test_a_good_student_takes_over() -> None:
    run = simulate(stream(6, 3000, GOOD), PromiseLearner(), learn_every=50, seed=0)
    assert run.releases
    # 60 % are easy and 8 points of the hard ones still fit under α; 5 % of those are audited.
    assert 0.3 < run.teacher_share(1000) < 0.5


def admitted(seeds: int, *, looks: bool) -> int:
    """Runs in which a student that sits exactly at α, whatever it scores, was ever released.

    One level, so that nothing but the looks is tested again and again.
    """
    runs = (
        simulate(stream(seed, 420, [(0.0, ALPHA)]), PromiseLearner(looks, [1.0]), learn_every=10, seed=seed)
        for seed in range(seeds)
    )
    return sum(bool(run.releases) for run in runs)


def test_looking_whenever_labels_arrive_admits_a_student_at_alpha_far_too_often() -> None:
    assert binomtest(admitted(60, looks=False), 60, DELTA, alternative="greater").pvalue < 1e-4


def test_looks_admit_a_student_at_alpha_as_rarely_as_promised() -> None:
    count = admitted(SEEDS, looks=True)
    assert binomtest(count, SEEDS, DELTA, alternative="greater").pvalue > 1e-3, f"{count} of {SEEDS}"


def test_first_and_later_releases_keep_their_promise() -> None:
    """The hard case: 40 % may be answered, and every wider level of the grid sits just above α."""
    bands = [(0.6, 0.02), (0.56, 0.9003), (0.0, ALPHA + 1e-3)]
    wrong_above_56 = 0.4 * 0.02 + 0.04 * 0.9003
    releases: list[int] = []
    broken: list[list[bool]] = []
    for seed in range(SEEDS):
        learner = PromiseLearner()
        run = simulate(stream(seed, 480, bands), learner, learn_every=20, seed=seed)
        thresholds = [learner.thresholds[kept.release] for kept in run.releases]
        risks = [
            (wrong_above_56 + (0.56 - t) * (ALPHA + 1e-3)) / (1 - t) if t < 0.56 else 0.0 for t in thresholds
        ]
        releases.append(len(risks))
        broken.append([risk > ALPHA for risk in risks])
    assert np.mean(releases) > 2, "too few releases to say anything of later ones"
    for position in range(4):
        count = sum(len(flags) > position and flags[position] for flags in broken)
        assert binomtest(count, SEEDS, DELTA, alternative="greater").pvalue > 1e-3, f"release {position + 1}"
    # Of R releases δR may be broken. Releases of one run share labels: count runs, not releases.
    excess = np.array([sum(flags) - DELTA * len(flags) for flags in broken])
    assert excess.mean() < 3 * excess.std() / np.sqrt(SEEDS)


@pytest.mark.parametrize("watched", [True, False])
def test_with_the_watch_a_broken_release_is_withdrawn(watched: bool) -> None:
    learner = Scripted({1: accepting(0.0)})
    heard: list[float] = []
    run = simulate(
        stream(7, 4000, [(0.0, 0.3)]),
        learner,
        learn_every=100,
        seed=1,
        rate=0.1,
        watching=(lambda: Watch(ALPHA, 1 - DELTA)) if watched else None,
        withdrawn=heard.append,
    )
    assert run.live == (None if watched else "r1")
    if not watched:
        assert run.withdrawn == [] and heard == []
        return
    ((name, after),) = run.withdrawn
    assert name == "r1" and heard == [after - 1.0]
    assert all(one.by_student for one in run.served[100:after])
    assert not any(one.by_student for one in run.served[after:])
    audits = sum(one.teacher_called for one in run.served[100:after])
    assert 5 <= audits <= 100, "30 % under α = 10 % is no matter of hundreds of audits"
    assert [exchange.created for exchange in learner.log] == list(range(4000)), (
        "what to leave out is the learner's affair"
    )
