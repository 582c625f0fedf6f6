"""Fine-tuning that can't be: what `understudy learn` says then, what it leaves, and that the next look works."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pytest

from distillation.journal import LookJournal
from distillation.learning import Lesson, learn
from serving.releases import ReleaseStore
from serving.settings import Settings

Make = Callable[..., Any]


@pytest.fixture
def state(write_log: Make, exchanges: Make) -> Path:
    """A log of which enough may judge."""
    pairs = [
        (f"where is my {thing} {i}", thing) for i in range(100) for thing in ("card", "parcel", "refund")
    ]
    written: Path = write_log(exchanges(pairs))
    return written


def lesson(
    state: Path,
    base: Path,
    python: Path | None = None,
    *,
    unattended: bool = False,
    provider: str = "CPUExecutionProvider",
    **learning: Any,
) -> Lesson:
    settings = Settings.model_validate(
        {
            "state_dir": state,
            "teacher": {"trainable": True},
            "student": {"onnx": {"providers": [provider]}},
            "learning": {"python": python, **learning},
            "task": [
                {
                    "name": "intents",
                    "max_disagreement": 0.1,
                    "student": {"kind": "encoder", "base": base, "train_share": 0.5},
                }
            ],
        }
    )
    (found,) = learn(settings, "intents", unattended=unattended)
    return found


def nothing_is_left(state: Path) -> None:
    assert not (state / "tasks" / "intents" / "training").exists()
    assert ReleaseStore(state).list("intents") == []
    assert LookJournal(state, "intents").past() == [], "no look was taken, so that none is spent"


def python(folder: Path, does: str) -> Path:
    """A Python that does something else than it is told."""
    path = folder / "python"
    path.write_text(f"#!/bin/sh\n{does}\n")
    path.chmod(0o755)
    return path


def test_a_base_that_isnt_there(state: Path, tmp_path: Path) -> None:
    found = lesson(state, tmp_path / "nowhere")
    assert found.outcome == "held"
    assert found.message.startswith(
        f"no look was taken: student.base: there is no folder {tmp_path / 'nowhere'}"
    )
    nothing_is_left(state)


def test_a_python_without_what_trains(state: Path, encoder_base: Path, tmp_path: Path) -> None:
    bare = python(tmp_path, f'exec {sys.executable} -S "$@"')  # without its site-packages
    found = lesson(state, encoder_base, bare)
    assert found.outcome == "held"
    assert found.message == (
        f"no look was taken: {bare} has no module tokenizers: run `pip install 'understudy[train]'` there (in a "
        "checkout: '.[train]'), or set learning.python to a Python that has it"
    )
    nothing_is_left(state)


def test_one_that_is_killed_in_the_middle(state: Path, encoder_base: Path, tmp_path: Path) -> None:
    killed = python(
        tmp_path, 'echo \'{"progress": {"epoch": 1, "epochs": 4, "loss": 1, "seconds_left": 9}}\'; kill -9 $$'
    )
    found = lesson(state, encoder_base, killed)
    assert found.outcome == "held"
    assert found.message == (
        "no look was taken: encoder_training.py was killed, as the system does when memory runs out"
    )
    nothing_is_left(state)
    linear = Settings.model_validate(
        {"state_dir": state, "teacher": {"trainable": True}, "task_defaults": {"max_disagreement": 0.1}}
    )
    (again,) = learn(linear, "intents")
    assert (again.outcome, again.labels) == ("released", 300), "the labels are all there"


def test_what_failed_late_waits_unless_somebody_asks_or_something_changes(
    state: Path, encoder_base: Path, tmp_path: Path, write_log: Make, exchanges: Make
) -> None:
    starts = tmp_path / "starts"
    fails = python(tmp_path, f"echo x >> {starts}; kill -9 $$")

    def tried(*, unattended: bool = False) -> str:
        """What is said, if it wasn't tried."""
        before = starts.read_text() if starts.exists() else ""
        found = lesson(state, encoder_base, fails, unattended=unattended)
        assert found.outcome == "held"
        return "" if starts.read_text() != before else found.message

    assert tried(unattended=True) == "", "the first time"
    waits = tried(unattended=True)
    assert waits.startswith("no look was taken: fine-tuning failed on as good as these ")
    assert waits.endswith(" in 60 minutes, or now by `understudy learn --task intents`")
    assert tried() == "", "a person asks"
    assert tried(unattended=True)
    setback = state / "tasks" / "intents" / "setback.json"
    said = orjson.loads(setback.read_bytes())
    for changed in (
        {"at": said["at"] - 3600},
        {"at": said["at"] + 3600},
        {"asked": "before"},
        {"labels": "many"},
    ):
        setback.write_bytes(orjson.dumps({**said, **changed}))
        assert tried(unattended=True) == "", changed
        assert tried(unattended=True), "and waits again"
    write_log(exchanges([(f"is my card {i} there", "card") for i in range(40)], start=2_000_000.0))
    assert tried(unattended=True), "hardly more labels"
    write_log(exchanges([(f"is my card {i} here", "card") for i in range(150)], start=3_000_000.0))
    assert tried(unattended=True) == "", "labels have grown"


def test_what_hangs_is_ended_and_waits_like_what_failed(
    state: Path, encoder_base: Path, tmp_path: Path
) -> None:
    hangs = python(tmp_path, "exec sleep 600")
    found = lesson(state, encoder_base, hangs, unattended=True, stall_timeout_s=0.5)
    assert found.outcome == "held"
    assert found.message == (
        "no look was taken: encoder_training.py was ended: for 0.5 s it hadn't said how far it is, as one that has "
        "hung; if this machine is so slow, raise learning.stall_timeout_s"
    )
    nothing_is_left(state)
    again = lesson(state, encoder_base, hangs, unattended=True, stall_timeout_s=0.5)
    assert "it is tried again in 60 minutes" in again.message


def test_what_shows_at_once_is_tried_again_at_once(state: Path, encoder_base: Path, tmp_path: Path) -> None:
    bare = python(tmp_path, f'exec {sys.executable} -S "$@"')
    for _ in range(2):
        assert "has no module tokenizers" in lesson(state, encoder_base, bare, unattended=True).message


def test_what_could_not_be_run_here_isnt_begun_with(state: Path, encoder_base: Path, tmp_path: Path) -> None:
    starts = tmp_path / "starts"
    python_there = python(tmp_path, f"echo x >> {starts}")
    for _ in range(2):  # it costs nothing, so that it may be tried each time
        found = lesson(state, encoder_base, python_there, unattended=True, provider="MadeUpExecutionProvider")
        assert found.outcome == "held"
        assert found.message.startswith(
            "no look was taken: ONNX Runtime knows no MadeUpExecutionProvider, and this build has "
        )
        assert not starts.exists()
        nothing_is_left(state)
    assert not (state / "tasks" / "intents" / "setback.json").exists()


def test_a_damaged_base(state: Path, encoder_base: Path, torch_python: Path) -> None:
    found = lesson(state, encoder_base, torch_python)
    assert found.outcome == "held"
    assert f"{encoder_base}: tokenizer.json can't be read: " in found.message
    nothing_is_left(state)
