"""`student.sees` from the log to the release: learned, judged and served by the same text."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distillation.dataset import build_dataset
from distillation.economics import summarise
from distillation.learning import Lesson, learn
from distillation.past import PastRelease
from routers.confidence import Confidence
from routers.meter import TokenMeter
from routers.router import Router
from serving.agreement import comparison
from serving.closed_answers import KnownAnswer, TokenEstimate
from serving.engines import Engines
from serving.exchange import Exchange, Json
from serving.linear import LinearStudent
from serving.releases import ReleaseStore
from serving.settings import Settings
from serving.students import load_student

Make = Callable[..., Any]
QUESTIONS = {"Is your card lost?": "lost_card", "Is your parcel late?": "late_parcel"}


def talk(question: str, answer: str, *, system: str = "Label.") -> Json:
    messages = [
        {"role": "system", "content": system},
        {"role": "user", "content": "I need help"},
        {"role": "assistant", "content": question},
        {"role": "user", "content": answer},
    ]
    return {"model": "intents", "messages": messages}


@pytest.fixture
def talks(exchanges: Make) -> list[Exchange]:
    """What the last message means depends on the one before it."""
    pairs = [list(QUESTIONS.items())[number % 2] for number in range(160)]
    return [
        dataclasses.replace(one, request=talk(question, ("yes", "yes please", "it is")[number % 3]))
        for number, (one, (question, _)) in enumerate(zip(exchanges(pairs), pairs, strict=True))
    ]


def settings_for(state_dir: Path, sees: str) -> Settings:
    defaults = {"max_disagreement": 0.1, "student": {"sees": sees}}
    return Settings(state_dir=state_dir, task_defaults=defaults)


def learned(state_dir: Path, sees: str) -> Lesson:
    (lesson,) = learn(settings_for(state_dir, sees))
    return lesson


def test_a_conversation_is_learned_by_who_sees_it(write_log: Make, talks: list[Exchange]) -> None:
    state_dir = write_log(talks)
    assert learned(state_dir, "message").labels == 0
    (summary,) = summarise(settings_for(state_dir, "message"))
    assert 'student.sees = "last" or "conversation" would see them' in summary.outlook
    (summary,) = summarise(settings_for(state_dir, "conversation"))
    assert (summary.sees, summary.labels) == ("conversation", 160)
    lesson = learned(state_dir, "conversation")
    assert lesson.outcome == "released"
    assert lesson.look is not None and lesson.look["sees"] == "conversation"
    store = ReleaseStore(state_dir)
    student = load_student(store.read("intents", "r0001"), TokenMeter, Engines())
    assert store.list("intents")[0]["sees"] == "conversation"
    assert student.unsupported(talk("Is your card lost?", "it is")) is None


def test_the_last_message_alone_isnt_enough_here(write_log: Make, talks: list[Exchange]) -> None:
    lesson = learned(write_log(talks), "last")
    assert (lesson.outcome, lesson.labels) == ("held", 160)


def test_what_an_earlier_student_couldnt_serve_is_labelled_for_certain(talks: list[Exchange]) -> None:
    """With r0001, which sees single messages, live: conversations went to the teacher, whatever was in them."""
    during = [
        dataclasses.replace(one, release="r0001", reason="unsupported:turns", audit_rate=0.02)
        for one in talks[:10]
    ]
    exact = comparison(Settings().task_defaults.agreement)
    assert build_dataset(during, exact, "message").rows == []
    dataset = build_dataset(during, exact, "last")
    assert len(dataset.rows) == 10
    assert dataset.traffic["r0001"].accepted == 0
    past = PastRelease(sure_student(), Router(Confidence.of_score(1.0, 0.0), -1.0), {})
    assert past.accepts("x", "yes"), "it is sure of everything it sees"
    assert not any(past.accepts_row(row) for row in dataset.rows)


def sure_student() -> LinearStudent:

    return LinearStudent(
        vocabulary=["yes"],
        words=1,
        idf=np.ones(1, dtype=np.float32),
        weights=np.ones((1, 1), dtype=np.float32),
        intercept=np.zeros(1, dtype=np.float32),
        answers=[KnownAnswer("lost_card", [{"message": {"content": "lost_card"}}], 1)],
        tokens=TokenEstimate(0.0, 0.0),
    )


def test_a_release_is_served_by_what_it_saw(
    write_log: Make, talks: list[Exchange], stand_in: Make, gateway: Make
) -> None:
    learned(write_log(talks), "conversation")
    # The setting has changed since: what is live keeps its own until the next release.
    running = gateway(
        stand_in({}, default="teacher").url,
        task=[{"name": "intents", "match": {"model": "intents"}, "student": {"sees": "message"}}],
    )
    for question, meant in QUESTIONS.items():
        answer = running.post(json=talk(question, "yes"))
        assert answer.headers["x-understudy-route"] == "student", answer.headers
        assert answer.json()["choices"][0]["message"]["content"] == meant
    between = talk("Is your card lost?", "yes")
    between["messages"].insert(2, {"role": "system", "content": "Answer in French."})
    assert running.post(json=between).headers["x-understudy-reason"] == "unsupported:system"
    begun = talk("Is your card lost?", "yes")
    begun["messages"].append({"role": "assistant", "content": "lost"})
    assert running.post(json=begun).headers["x-understudy-reason"] == "unsupported:prefill"
