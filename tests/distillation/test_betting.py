"""Learning with `admission = "e-process"`: a candidate is fixed, tested by what comes after it, and goes live."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson
import pytest

from distillation.candidate import Candidate, CandidateFile
from distillation.economics import summarise
from distillation.evaluate import evaluate
from distillation.evaluation_words import spent_in_words
from distillation.journal import LookJournal
from distillation.learning import Lesson, learn
from distillation.past import read_past
from distillation.simulated import SimulatedLearner
from routers.looks import PastLook, spent
from routers.simulator import Message, simulate
from serving.exchange import Exchange
from serving.releases import CANDIDATE_FILE, ReleaseStore
from serving.settings import Settings
from serving.task_settings import TaskPolicy, TaskSettings

Make = Callable[..., Any]
KINDS = {"card": "where is my card {}", "parcel": "the parcel {} please", "refund": "refund order {} now"}


def pairs(count: int, seed: int = 1) -> list[tuple[str, str]]:
    chance = random.Random(seed)
    kinds = [chance.choice(list(KINDS)) for _ in range(count)]
    return [(KINDS[kind].format(chance.randrange(1000)), kind) for kind in kinds]


def configured(state: Path, **task: Any) -> Settings:
    own = TaskSettings(**{"name": "intents", "max_disagreement": 0.1, "admission": "e-process", **task})
    return Settings(state_dir=state, task=[own])


def lesson(state: Path, **task: Any) -> Lesson:
    (found,) = learn(configured(state, **task), "intents")
    return found


@pytest.fixture
def begun(write_log: Make, exchanges: Make) -> tuple[Path, list[Exchange]]:
    """A state with 80 labels, and 75 more that are yet to come."""
    made = exchanges(pairs(155))
    return write_log(made[:80]), made[80:]


def candidate_of(state: Path) -> Candidate:
    policy = TaskSettings(name="intents", max_disagreement=0.1, admission="e-process")
    found = CandidateFile(state, "intents").read(policy)
    assert found is not None
    return found


def test_from_a_candidate_to_a_release(begun: tuple[Path, list[Exchange]], write_log: Make) -> None:
    state, later = begun
    fixed = lesson(state)
    assert (fixed.outcome, fixed.release, fixed.needed) == ("held", None, 81)
    assert fixed.message == "candidate 1 is fixed, by 80 labels; those that come from now on test it"
    assert LookJournal(state, "intents").past()[-1].labels == 80
    candidate = candidate_of(state)
    assert (candidate.number, candidate.labels, candidate.served) == (1, 80, None)
    again = lesson(state)
    assert again.outcome == "held" and "0 labels since candidate 1 was fixed" in again.message
    (summary,) = summarise(configured(state))
    assert summary.outlook == "candidate 1 is being tested: 0 labels came since it was fixed"
    assert again.look is not None and again.look["short"][0]["accepted"] == 0

    write_log(later[:10])
    soon = lesson(state)
    assert soon.outcome == "held" and "10 labels since" in soon.message
    assert soon.look is not None
    # The labels that are short are those of the bets, not of the exact test, and δ is the candidate's own.
    assert soon.look["short"][0]["if_all_agree"] > 20
    assert soon.look["delta"] == spent(1, 1 - 0.9)

    write_log(later[10:])
    live = lesson(state)
    assert (live.outcome, live.release) == ("released", "r0001")
    assert live.look is not None and live.look["admission"] == "e-process"
    now = ReleaseStore(state).live("intents")
    assert now is not None and now.release == "r0001"
    router = read_past(ReleaseStore(state), "intents", "r0001").router
    assert router == candidate_of(state).served
    assert router.decide(99.0, {}, "card").reason in ("confident", "no_signals")
    assert LookJournal(state, "intents").past()[-1].released
    told = spent_in_words(evaluate(configured(state), "intents"))
    assert told.startswith(
        "admitted by bets on candidate 1 since the release before, on 75 labels that came after"
    )
    once = lesson(state)
    assert (once.outcome, once.release) == ("held", None), "what is out already doesn't go out again"


def test_a_candidate_of_another_promise_is_no_candidate(
    begun: tuple[Path, list[Exchange]], write_log: Make
) -> None:
    state, later = begun
    lesson(state)
    write_log(later)
    assert (
        CandidateFile(state, "intents").read(
            TaskSettings(name="intents", max_disagreement=0.1, admission="e-process", prove={"card": 0.1})
        )
        is None
    )
    found = lesson(state, max_disagreement=0.2)
    assert "candidate 2 is fixed, by 155 labels" in found.message


@pytest.mark.parametrize("damage", [b"", b"{}", b"[]", b'{"schema": 9}', None])
def test_a_damaged_candidate_has_spent_what_it_spent(
    begun: tuple[Path, list[Exchange]], write_log: Make, damage: bytes | None
) -> None:
    state, later = begun
    lesson(state)
    path = state / "tasks" / "intents" / CANDIDATE_FILE
    if damage is None:
        read = orjson.loads(path.read_bytes())
        read["content"]["levels"]["others"] = []
        damage = orjson.dumps(read)
    path.write_bytes(damage)
    write_log(later)
    assert "candidate 2 is fixed, by 155 labels" in lesson(state).message


def test_labels_from_before_a_withdrawal_are_no_evidence(
    begun: tuple[Path, list[Exchange]], write_log: Make, exchanges: Make
) -> None:
    """A candidate that was fixed before its release was withdrawn is none any more."""
    state, later = begun
    lesson(state)
    write_log(later)
    assert lesson(state).release == "r0001"
    store = ReleaseStore(state)
    live = store.live("intents")
    assert live is not None
    withdrawn = store.withdraw("intents", live, "disagreement", "it broke its promise")
    assert withdrawn is not None
    waiting = lesson(state)
    assert (waiting.outcome, waiting.release, waiting.labels) == ("not_due", None, 0)
    write_log(exchanges(pairs(80, seed=4), start=withdrawn.fence + 1.0))
    assert "is fixed, by 80 labels" in lesson(state).message


def test_one_that_had_its_time_makes_room(
    begun: tuple[Path, list[Exchange]], write_log: Make, exchanges: Make
) -> None:
    """Nothing agrees any more: the bets are lost, and at twice the labels another candidate is fixed."""
    state, _ = begun
    lesson(state)
    other = {"card": "parcel", "parcel": "refund", "refund": "card"}
    turned = [(text, other[answer]) for text, answer in pairs(79, seed=2)]
    made = exchanges(turned, start=1_000_500.0)
    write_log(made)
    held = lesson(state)
    assert held.outcome == "held" and "79 labels since" in held.message
    assert held.look is not None and held.look["levels"][0]["p_value"] == 1.0
    write_log(exchanges(pairs(1, seed=3), start=1_001_000.0))
    assert "candidate 2 is fixed, by 160 labels" in lesson(state).message
    assert LookJournal(state, "intents").past() == [
        replace(look, look=number, labels=labels, released=False)
        for look, number, labels in zip(LookJournal(state, "intents").past(), (1, 2), (80, 160), strict=True)
    ]


def test_a_students_life_in_the_simulator() -> None:
    policy = TaskPolicy(max_disagreement=0.1, certainty=0.9, admission="e-process")
    learner = SimulatedLearner(policy, seed=1)
    messages = [Message(text, answer) for text, answer in pairs(260)]
    run = simulate(messages, learner, learn_every=20, seed=1)
    assert run.releases and all(kept.disagreement <= 0.1 for kept in run.releases)
    assert learner.looks[0] == PastLook(1, learner.looks[0].labels, True)
    assert run.teacher_share() < 1.0
