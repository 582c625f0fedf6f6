"""A task gets another kind of student: what it takes until that is looked at, and what is done for it meanwhile."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from distillation.journal import LookJournal
from distillation.learning import Lesson, learn
from distillation.split import place_of
from routers.looks import GROWTH, labels_needed
from serving.layout import task_directory
from serving.settings import Settings

Make = Callable[..., Any]
PAIRS = [(f"where is my {thing} {i}", thing) for i in range(100) for thing in ("card", "parcel", "refund")]


def lesson(state: Path, python: Path | None = None, **student: Any) -> Lesson:
    settings = Settings.model_validate(
        {
            "state_dir": state,
            "teacher": {"trainable": True},
            "learning": {"python": python},
            "task": [{"name": "intents", "max_disagreement": 0.1, "student": student}],
        }
    )
    (found,) = learn(settings, "intents")
    return found


@pytest.fixture
def encoder(encoder_base: Path) -> dict[str, Any]:
    return {"kind": "encoder", "base": encoder_base, "train_share": 0.6}


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """One that trains nothing, and leaves a file called `begun` to say that it was to."""
    path = tmp_path / "python"
    path.write_text(f"#!/bin/sh\ntouch {tmp_path / 'begun'}\nexit 1\n")
    path.chmod(0o755)
    return path


def test_one_that_is_judged_on_a_part_waits_until_that_has_grown(
    write_log: Make, exchanges: Make, encoder: dict[str, Any], python: Path, tmp_path: Path
) -> None:
    first = exchanges(PAIRS)
    state = write_log(first)
    assert lesson(state).release == "r0001"
    judged = sum(place_of("intents", one.id) >= 0.6 for one in first)
    found = lesson(state, python, **encoder)
    assert (found.outcome, found.labels, found.needed) == ("not_due", judged, math.ceil(judged * GROWTH))
    assert found.needed is not None and found.needed < 200, (
        "and not 375, a quarter more than the other kind had of all"
    )
    write_log(exchanges(PAIRS[: len(PAIRS) // 2], start=2_000_000.0))
    found = lesson(state, python, **encoder)
    assert found.message.startswith("no look was taken")
    assert (tmp_path / "begun").exists()
    assert len(LookJournal(state, "intents").past()) == 1


def test_one_that_was_trained_on_all_there_is_waits_for_a_first_look(
    write_log: Make, exchanges: Make
) -> None:
    state = write_log(exchanges(PAIRS))
    assert lesson(state).release == "r0001"
    until = datetime.fromtimestamp(1_500_000.0, UTC)
    lm: dict[str, Any] = {
        "kind": "lm",
        "base_url": "http://127.0.0.1:9/v1",
        "model": "m",
        "trained_until": until,
    }
    found = lesson(state, **lm)
    assert (found.outcome, found.labels) == ("not_due", 0)
    assert found.needed == labels_needed([], 0.1, 0.9)


def test_nothing_is_trained_where_too_little_is_left_without_a_release_that_is_gone(
    write_log: Make, exchanges: Make, encoder: dict[str, Any], python: Path, tmp_path: Path
) -> None:
    state = write_log(exchanges(PAIRS))
    assert lesson(state).release == "r0001"
    write_log(exchanges(PAIRS, start=2_000_000.0, release="r0001", audit_rate=0.05))
    shutil.rmtree(task_directory(state, "intents") / "releases" / "r0001")
    found = lesson(state, python, **encoder)
    assert found.outcome == "not_due", "the labels that are left are no more than the last look had"
    assert not (tmp_path / "begun").exists()
