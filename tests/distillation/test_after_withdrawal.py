"""Once the watch has withdrawn a release, only labels that came afterwards prove the next."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distillation.economics import summarise
from distillation.journal import LookJournal
from distillation.learning import Lesson, learn
from distillation.simulated import SimulatedLearner
from routers.looks import GROWTH, PastLook, labels_needed, next_look
from routers.simulator import Message, simulate
from routers.watch import Watch
from serving.disk import Disk
from serving.releases import ReleaseStore
from serving.settings import Settings
from serving.task_settings import TaskPolicy, TaskSettings
from serving.watch_record import WatchRecord, write_watch_record

Make = Callable[..., Any]
TEXTS = [
    (f"where is {'my card' if i % 2 else 'the parcel'} {i}", "card" if i % 2 else "parcel") for i in range(90)
]


def settings(state: Path) -> Settings:
    return Settings(state_dir=state, task=[TaskSettings(name="intents", max_disagreement=0.1)])


def lesson(state: Path) -> Lesson:
    (found,) = learn(settings(state), "intents")
    return found


def withdraw(state: Path) -> float:
    store = ReleaseStore(state)
    live = store.live("intents")
    assert live is not None
    taken = store.withdraw("intents", live, "disagreement", "9 of 20 audits disagreed")
    assert taken is not None
    return taken.fence


def test_the_next_release_is_proved_on_labels_that_came_since(write_log: Make, exchanges: Make) -> None:
    state = write_log(exchanges(TEXTS))
    assert lesson(state).release == "r0001"
    fence = withdraw(state)
    waiting = lesson(state)
    assert (waiting.outcome, waiting.labels, waiting.needed) == ("not_due", 0, 68)
    assert "r0001 was withdrawn" in waiting.message
    assert "only labels from then on count" in waiting.message
    write_log(exchanges(TEXTS[:60], start=fence + 1))
    assert (lesson(state).outcome, lesson(state).labels) == ("not_due", 60)
    write_log(exchanges(TEXTS[60:], start=fence + 100))
    found = lesson(state)
    assert (found.outcome, found.release, found.labels) == ("released", "r0002", 90)
    store = ReleaseStore(state)
    assert store.read("intents", "r0002").card["labels_since"] == fence
    assert store.read("intents", "r0001").card["labels_since"] is None
    live = store.live("intents")
    assert live is not None
    assert (live.release, live.fence) == ("r0002", fence)
    assert lesson(state).outcome == "not_due"


def test_what_was_spent_before_stays_spent() -> None:
    past = [PastLook(1, 100, True, 10.0), PastLook(1, 200, False, 20.0), PastLook(2, 250, False, 30.0)]
    assert labels_needed(past, 0.05, 0.9) == 313
    assert next_look(past) == 3
    after = labels_needed(past, 0.05, 0.9, fence=40.0)
    assert labels_needed([], 0.05, 0.9) < after < 313, "a first look again, at a third look's part of δ"
    assert labels_needed(past, 0.05, 0.9, fence=30.0) == 313


def test_what_was_learned_meanwhile_does_not_go_live(write_log: Make, exchanges: Make) -> None:
    """The watch withdraws while a look is under way: its labels came before."""
    state = write_log(exchanges(TEXTS[:70]))
    assert lesson(state).release == "r0001"
    write_log(exchanges(TEXTS, start=2_000_000.0))
    withdrawn: list[float] = []

    def progress(step: str) -> None:
        if "fold 1" in step:
            withdrawn.append(withdraw(state))

    (found,) = learn(settings(state), "intents", progress=progress)
    assert len(withdrawn) == 1
    assert (found.outcome, found.release) == ("held", None)
    assert "was learned while r0001 was withdrawn" in found.message
    live = ReleaseStore(state).live("intents")
    assert live is not None
    assert live.release is None
    assert [look.released for look in LookJournal(state, "intents").past()] == [True, False]
    # The look ended after the withdrawal, and is none of the time since: the next is due as a first one is.
    waiting = lesson(state)
    assert waiting.outcome == "not_due"
    assert waiting.needed is not None
    assert waiting.needed < 160, "by growth it would be 1.25 times the 160 labels that don't count any more"


def test_in_the_simulator_too(exchanges: Make) -> None:
    """The teacher answers otherwise from message 150 on: the next student learns from what came after that showed."""
    other = {"card": "parcel", "parcel": "card"}
    texts = [
        (f"where is {'my card' if i % 2 else 'the parcel'} {i}", "card" if i % 2 else "parcel")
        for i in range(400)
    ]
    messages = [Message(text, answer if i < 150 else other[answer]) for i, (text, answer) in enumerate(texts)]
    learner = SimulatedLearner(TaskPolicy(max_disagreement=0.1), seed=1)
    run = simulate(
        messages,
        learner,
        learn_every=10,
        seed=1,
        rate=0.5,
        watching=lambda: Watch(0.1, 0.9),
        withdrawn=learner.withdrawn,
    )
    ((broken, after),) = run.withdrawn
    assert 150 < after < 250
    assert learner.fence == after - 1.0
    before = [kept.release for kept in run.releases if kept.after < after]
    since = [kept for kept in run.releases if kept.after > after]
    assert before[-1] == broken
    assert since and all(kept.disagreement == 0.0 for kept in since)
    assert min(map(int, learner.releases[since[0].release].held_out)) == after, "not one label from before"
    old = [look for look in learner.looks if look.at < learner.fence]
    assert learner.looks[len(old)].labels < GROWTH * old[-1].labels, "it was due as a first one"


def test_where_withdrawals_are_lost_with_the_file_nothing_is_learned_until_a_person_looked(
    write_log: Make, exchanges: Make
) -> None:
    state = write_log(exchanges(TEXTS))
    assert lesson(state).release == "r0001"
    withdraw(state)
    (state / "tasks" / "intents" / "live").write_bytes(b"torn")
    write_log(exchanges(TEXTS * 3, start=2_000_000.0))
    before = LookJournal(state, "intents").past()
    held = lesson(state)
    assert (held.outcome, held.release) == ("held", None)
    assert "understudy promote intents" in held.message
    assert LookJournal(state, "intents").past() == before, "nothing is spent on it"
    ReleaseStore(state).set_live("intents", "r0001")
    assert (lesson(state).outcome, lesson(state).labels) == ("not_due", 0)
    write_log(exchanges(TEXTS, start=time.time() + 1))
    assert lesson(state).release == "r0002"


def test_tasks_say_how_the_live_release_does_and_why_one_was_withdrawn(
    write_log: Make, exchanges: Make
) -> None:
    state = write_log(exchanges(TEXTS))
    lesson(state)
    store = ReleaseStore(state)
    live = store.live("intents")
    assert live is not None
    (summary,) = summarise(settings(state))
    assert summary.watched is None, "no keeper has looked yet"
    watch = Watch(0.1, 0.9)
    for agreed in [True] * 8 + [False]:
        watch.observe(agreed)
    record = WatchRecord("r0001", live.since, watch.to_json())
    write_watch_record(state, "intents", record, Disk())
    (summary,) = summarise(settings(state))
    assert summary.watched is not None
    assert "1 of 9 audits disagreed" in summary.watched.line()
    assert "a jump to 20.0% is noticed after about 127 audits" in summary.watched.line()
    assert summary.to_json()["watched"]["limit"] == pytest.approx(10.0)
    fence = withdraw(state)
    (summary,) = summarise(settings(state))
    assert summary.watched is None
    assert summary.withdrawn is not None
    assert summary.to_json()["withdrawn"]["cause"] == "disagreement"
    assert summary.labels == 0
    assert fence <= time.time()
