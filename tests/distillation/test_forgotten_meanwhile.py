"""Somebody is forgotten while a task is learned: nothing is made of what was read before."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distillation.candidate import CandidateFile
from distillation.learning import Lesson, learn
from distillation.past import read_past
from serving.forgetting import Whose, forget
from serving.layout import training_directory
from serving.log import LogReader
from serving.releases import ReleaseStore
from serving.settings import Settings
from serving.task_settings import TaskSettings

Make = Callable[..., Any]
PAIRS = [(f"where is my {thing} {i}", thing) for i in range(50) for thing in ("card", "parcel", "refund")]
THEIRS = 10


@pytest.fixture
def state(write_log: Make, exchanges: Make) -> Path:
    written: Path = write_log(
        dataclasses.replace(one, tenant="theirs" if number < THEIRS else "ours")
        for number, one in enumerate(exchanges(PAIRS))
    )
    return written


def learned(state: Path, progress: Callable[[str], None] = lambda _: None, **task: Any) -> Lesson:
    policy = TaskSettings(name="intents", max_disagreement=0.1, **task)
    (found,) = learn(Settings(state_dir=state, task=[policy]), "intents", progress=progress)
    return found


def forgetting(state: Path, when: str) -> Callable[[str], None]:
    """Has them forgotten when learning says that it is so far."""

    def told(said: str) -> None:
        if when in said:
            forget(state, Whose(tenant="theirs"), noticed_within_s=0.0)

    return told


def test_no_release_is_made_of_it(state: Path) -> None:
    found = learned(state, forgetting(state, "testing the promise"))
    assert (found.outcome, found.release) == ("held", None)
    assert "something was erased from the log of task intents while it was learned" in found.message
    assert ReleaseStore(state).list("intents") == []
    again = learned(state)
    assert (again.outcome, again.labels) == ("not_due", len(PAIRS) - THEIRS), "what was spent stays spent"


def test_one_that_was_made_before_forgets_them(state: Path) -> None:
    found = learned(state)
    assert found.release is not None
    erased = forget(state, Whose(tenant="theirs"), noticed_within_s=0.0)
    assert erased.tasks["intents"].releases == {found.release: THEIRS}
    held = read_past(ReleaseStore(state), "intents", found.release).held_out
    assert held.keys() == {one.id for one in LogReader(state).exchanges("intents").exchanges}


def test_no_candidate_is_fixed_by_it(state: Path) -> None:
    task: dict[str, Any] = {"admission": "e-process"}
    found = learned(state, forgetting(state, "fitting the student on all labels"), **task)
    assert (found.outcome, found.release) == ("held", None)
    assert "something was erased" in found.message
    policy = TaskSettings(name="intents", max_disagreement=0.1, **task)
    assert CandidateFile(state, "intents").read(policy) is None


def test_what_training_that_was_killed_has_left_goes_with_the_next_look(state: Path) -> None:
    left = training_directory(state, "intents")
    left.mkdir()
    (left / "job.json").write_text("where is my card")
    assert learned(state).release == "r0001", "of another kind by now"
    assert not left.exists()
