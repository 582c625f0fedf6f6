"""Which requests a release won't show its student: learned from the same rows, and only where it pays."""

from __future__ import annotations

import random
from dataclasses import astuple
from pathlib import Path
from typing import Any

import pytest

from distillation.dataset import Dataset, Row, Traffic, build_dataset
from distillation.gate import Look, take_look
from distillation.kind import LinearKind
from distillation.past import PastRelease, read_past
from distillation.simulated import SimulatedLearner
from distillation.stakes import stakes_of
from routers.foresight import FORESIGHT_FILE
from routers.foresight_fit import Stakes
from routers.simulator import LiveStudent, Message, simulate
from serving.agreement import comparison
from serving.errors import DamagedRelease
from serving.exchange import Exchange, StudentAnswer, TeacherAnswer
from serving.releases import SKIPPED_FILE, ReleaseStore
from serving.student_choice import StudentChoice
from serving.student_settings import StudentSettings
from serving.task_settings import TaskPolicy, TaskSettings

POLICY = TaskPolicy(max_disagreement=0.02, certainty=0.9)
SLOW = Stakes(student_s=0.5, student_usd=2e-4, teacher_s=1.0, teacher_usd=1e-3, waiting_usd_per_s=1 / 3600)
LINEAR = Stakes(
    student_s=1.5e-4, student_usd=2e-9, teacher_s=1.0, teacher_usd=1e-3, waiting_usd_per_s=1 / 3600
)
KINDS = {"card": "where is my card {}", "parcel": "the parcel {} please", "refund": "refund order {} now"}
POEM = "write a poem about {}"


def messages(count: int, seed: int, poems: float = 0.3) -> list[Message]:
    """Three kinds of messages, and one for which nobody could tell what the teacher will say."""
    chance = random.Random(seed)
    made = []
    for number in range(count):
        kind = chance.choice(list(KINDS))
        text = POEM if chance.random() < poems else KINDS[kind]
        made.append(Message(text.format(number), kind))
    return made


def dataset(count: int, seed: int = 1) -> Dataset:
    rows = [
        Row(
            str(number),
            message.text,
            message.teacher,
            [{"message": {"content": message.teacher}, "finish_reason": "stop"}],
            10,
            2,
            "big",
            None,
        )
        for number, message in enumerate(messages(count, seed))
    ]
    return Dataset(rows, {None: Traffic(count, 0, 0.05 * count)})


def look(stakes: Stakes | None, policy: TaskPolicy = POLICY, count: int = 500) -> Look[PastRelease]:
    return take_look(dataset(count), {}, policy, number=1, seed=1, stakes=stakes)


def with_student(**changes: Any) -> TaskPolicy:
    return POLICY.model_copy(update={"student": StudentChoice(**changes)})


class TestWhatIsLearned:
    def test_what_is_always_escalated_isnt_shown_to_a_slow_student(self) -> None:
        found = look(SLOW)
        assert found.candidate is not None
        ahead, card = found.candidate.ahead, found.skipping
        assert ahead.foresight is not None
        assert ahead.foresight.skips(POEM.format("winter"))
        assert not ahead.foresight.skips(KINDS["card"].format("7"))
        assert card["on"] and card["why"] == "it pays"
        assert card["skipped"] >= 0.25
        assert card["lost_at_most"] <= 0.02
        assert card["spared_s"] == pytest.approx(card["skipped"] * 0.5)
        assert 0 < card["worth_usd"] <= card["at_best_usd"]
        assert found.coverage is not None
        lost = set(ahead.skipped) & {
            row.id
            for row in dataset(500).rows
            if found.candidate.router.judge(*found.candidate.held_out[row.id]).accepted
        }
        assert len(lost) == card["lost"] <= 0.02 * 500
        assert found.coverage == pytest.approx((card["of"] - card["lost"]) / 500)

    @pytest.mark.parametrize(
        ("stakes", "policy", "why"),
        [
            (LINEAR, POLICY, "0.15 ms"),
            (None, POLICY, "no price"),
            (SLOW, with_student(skip="never"), "never"),
        ],
    )
    def test_it_stays_off_where_it_cant_pay_and_says_so(
        self, stakes: Stakes | None, policy: TaskPolicy, why: str
    ) -> None:
        found = look(stakes, policy)
        assert found.candidate is not None
        assert found.candidate.ahead.foresight is None
        assert FORESIGHT_FILE not in found.candidate.files()
        assert not found.skipping["on"] and why in found.skipping["why"]

    def test_a_hedge_needs_foresight_that_skips_nothing(self) -> None:
        student = StudentChoice(
            kind="lm", base_url="http://localhost/v1", model="m", hedge=True, skip="never"
        )
        found = look(None, POLICY.model_copy(update={"student": student}))
        assert found.candidate is not None
        foresight = found.candidate.ahead.foresight
        assert foresight is not None and foresight.skip_below is None
        assert foresight.hedges(POEM.format("winter"))
        assert not foresight.hedges(KINDS["card"].format("7"))
        assert not found.candidate.ahead.skipped

    def test_few_labels_cant_show_that_little_is_lost(self) -> None:
        found = look(SLOW, with_student(skip_at_most=0.001))
        assert found.candidate is not None
        assert not found.skipping["on"] and "0.1%" in found.skipping["why"]

    def test_a_level_isnt_passed_by_what_would_be_skipped(self) -> None:
        """With and without it the same levels pass here; whatever is tested is what is served."""
        skipping, never = look(SLOW), look(SLOW, with_student(skip="never"))
        assert skipping.verdict.passed and never.verdict.passed
        assert skipping.verdict.rank_threshold >= never.verdict.rank_threshold


class TestOnDisk:
    def test_a_release_redoes_its_skips(self, tmp_path: Path) -> None:
        found = look(SLOW)
        assert found.candidate is not None
        store = ReleaseStore(tmp_path)
        name = store.write("intents", found.candidate.files(), {"student": "linear"})
        past = read_past(store, "intents", name)
        assert past.ahead == found.candidate.ahead
        rows = dataset(500).rows
        assert [past.accepts_row(row) for row in rows] == [found.candidate.accepts_row(row) for row in rows]
        assert not any(past.accepts_row(row) for row in rows if row.id in past.ahead.skipped)
        unseen = [Row("n", POEM.format("x"), None, None, None, None, None, None)]
        assert past.ahead.skips(unseen[0], past.held_out.keys())

    def test_releases_without_foresight_ask_always(self, tmp_path: Path) -> None:
        found = look(None)
        assert found.candidate is not None
        store = ReleaseStore(tmp_path)
        name = store.write("intents", found.candidate.files(), {"student": "linear"})
        assert read_past(store, "intents", name).ahead.foresight is None

    @pytest.mark.parametrize("data", [b"", b"[]", b'{"1": "x"}', b'{"1": null}'])
    def test_damaged_skips_are_refused(self, tmp_path: Path, data: bytes) -> None:
        found = look(SLOW)
        assert found.candidate is not None
        store = ReleaseStore(tmp_path)
        files = {**found.candidate.files(), SKIPPED_FILE: data}
        name = store.write("intents", files, {"student": "linear"})
        with pytest.raises(DamagedRelease, match=SKIPPED_FILE):
            read_past(store, "intents", name)


class TestStakes:
    def test_they_come_from_the_log(self, exchanges: Any) -> None:
        logged: list[Exchange] = exchanges([("a b", "x"), ("c d", "y")])
        replayed = exchanges([("e f", "x")], start=3e6, route="cache", origin="teacher")
        unpriced = exchanges([("g h", "x")], start=4e6, teacher=TeacherAnswer("m", [], None, 9.0))
        student = StudentSettings(usd_per_hour=3.6, waiting_usd_per_hour=7.2)
        choice = StudentChoice()
        # One was made beside others, of the other only its latency is known.
        given = [
            StudentAnswer("linear", [], None, 0.2, 1.0, device_s=0.05),
            StudentAnswer("linear", [], None, 0.3, 1.0),
        ]
        found = stakes_of([*logged, *replayed, *unpriced], given, student, choice)
        assert found is not None
        assert astuple(found) == pytest.approx((0.25, 0.000175, 0.5, 0.001, 0.002))
        assert stakes_of(logged, [], student, choice) is None
        assert stakes_of(unpriced, given, student, choice) is None

    def test_a_linear_student_is_timed_by_its_own_answers(self, exchanges: Any, tmp_path: Path) -> None:
        kind = LinearKind(ReleaseStore(tmp_path), TaskSettings(name="intents"))
        linear, other = StudentAnswer("linear", [], None, 1e-4, 1.0), StudentAnswer("lm", [], None, 0.5, 1.0)
        logged = [
            *exchanges([("a b", "x")], student=linear),
            *exchanges([("c d", "x")], student=other),
            *exchanges([("a b", "x")], student=linear, route="cache", origin="student"),
            *exchanges([("e f", "x")]),
        ]
        assert kind.given(logged) == [linear]


class Watched(SimulatedLearner):
    """Keeps the log of a simulated life."""

    def learn(self, exchanges: Any) -> tuple[str, LiveStudent] | None:
        self.log = list(exchanges)
        return super().learn(exchanges)


@pytest.mark.parametrize("seed", range(2))
def test_a_life_with_skipping(seed: int) -> None:
    """Skipped requests are escalated with propensity 1, and are labels like all others."""
    learner = Watched(POLICY, seed, stakes=SLOW)
    run = simulate(messages(800, seed), learner, learn_every=200, seed=seed)
    assert run.releases
    assert all(kept.disagreement <= 0.02 for kept in run.releases)
    skipped = [exchange for exchange in learner.log if exchange.reason == "skipped"]
    assert len(skipped) > 30
    assert all(e.student is None and e.teacher is not None and e.propensity == 1.0 for e in skipped)
    built = build_dataset(learner.log, comparison(POLICY.agreement))
    assert {exchange.id for exchange in skipped} <= {row.id for row in built.rows}
