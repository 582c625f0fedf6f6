"""Judging a release whose student is a language model that is served elsewhere."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distillation.evaluate import evaluate
from distillation.journal import LearningElsewhere, LookJournal
from distillation.learning import learn
from serving.errors import DamagedRelease, UnderstudyError
from serving.recording import Recorded, Recording
from serving.releases import ReleaseStore
from serving.settings import Settings
from serving.stand_in import create_stand_in
from serving.stand_in_call import StandInHttp
from serving.student_choice import StudentChoice
from serving.task_settings import AgreementChoice, TaskSettings

Make = Callable[..., Any]
ANSWERS = ("1", "2", "3")
COUNT = 240


@pytest.fixture
def lines() -> list[tuple[str, str, str, float]]:
    """A message, the teacher's and the student's answer, and how sure the student is: less so where it is wrong."""
    chance = random.Random(1)
    made = []
    for number in range(COUNT):
        right = chance.choice(ANSWERS)
        fails = chance.random() < 0.3
        given = chance.choice([answer for answer in ANSWERS if answer != right]) if fails else right
        sure = chance.uniform(0.3, 0.7) if fails else chance.uniform(0.6, 0.995)
        made.append((f"message {number}", right, given, sure))
    return made


@pytest.fixture
def url(serve: Make, lines: list[tuple[str, str, str, float]]) -> str:
    rows = tuple(Recorded(text, given, confidence=sure) for text, _, given, sure in lines)
    return (
        f"{serve(create_stand_in(Recording(Path('student.csv'), rows), model='small'), http=StandInHttp)}/v1"
    )


def settings(state: Path, url: str, **more: Any) -> Settings:
    student = StudentChoice(kind="lm", base_url=url, model="small")
    own = {"name": "intents", "max_disagreement": 0.1, "certainty": 0.9, "student": student, **more}
    return Settings(state_dir=state, task=[TaskSettings(**own)])


@pytest.mark.parametrize("kind", ["exact", "numeric"])
def test_by_the_log(write_log: Make, exchanges: Make, lines: Any, url: str, kind: Any) -> None:
    state = write_log(exchanges([(text, right) for text, right, _, _ in lines]))
    configured = settings(state, url, agreement=AgreementChoice(kind=kind))
    (lesson,) = learn(configured, "intents")
    assert lesson.release == "r0001", lesson.message
    found = evaluate(configured, "intents")
    assert (found.student, found.live) == ("lm", True)
    assert found.log is not None
    assert found.log.labels == COUNT
    assert found.log.agreement.value == pytest.approx(
        sum(right == given for _, right, given, _ in lines) / COUNT
    )
    assert 0.2 < (found.log.coverage.value or 0.0) < 1.0
    assert (found.log.disagreement.value or 0.0) < 0.15
    assert (found.log.worst_answers == []) == (kind == "numeric"), "which have no keys to tell them apart by"


def test_answers_it_hasnt_given_are_asked_for(write_log: Make, exchanges: Make, lines: Any, url: str) -> None:
    pairs = [(text, right) for text, right, _, _ in lines]
    state = write_log(exchanges(pairs[:200]))
    configured = settings(state, url)
    (lesson,) = learn(configured, "intents")
    assert lesson.release == "r0001", lesson.message
    write_log(exchanges(pairs[200:], start=4e9))
    with LookJournal(state, "intents").alone(), pytest.raises(LearningElsewhere):
        evaluate(configured, "intents")
    found = evaluate(configured, "intents")
    assert found.log is not None
    assert found.since is not None
    assert (found.log.labels, found.since.labels) == (COUNT, COUNT - 200)


def test_what_cant_be_judged(write_log: Make, exchanges: Make, lines: Any, url: str, tmp_path: Path) -> None:
    pairs = [(text, right) for text, right, _, _ in lines]
    state = write_log(exchanges(pairs[:200]))
    configured = settings(state, url)
    assert learn(configured, "intents")[0].release == "r0001"
    recording = Recording(tmp_path / "dev.csv", (Recorded("message 1", "1"),))
    with pytest.raises(
        UnderstudyError, match="a recording can be judged by a student that lies in its release"
    ):
        evaluate(configured, "intents", recording=recording)
    with pytest.raises(UnderstudyError, match="set student as it was when r0001 was made"):
        evaluate(settings(state, url, student=StudentChoice()), "intents")
    other = StudentChoice(kind="lm", base_url=url, model="small", max_tokens=77)
    with pytest.raises(DamagedRelease, match="another"):
        evaluate(settings(state, url, student=other), "intents")
    ReleaseStore(state).set_live("intents", None)
    assert not evaluate(configured, "intents", "r0001").live
