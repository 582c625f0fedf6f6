from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distillation.split import Split, place_of
from gateway.turn import new_id
from serving.exchange import Exchange
from serving.releases import ReleaseStore
from serving.student_choice import StudentChoice
from serving.task_settings import TaskSettings

shares = st.floats(0.1, 0.9)


def policy(share: float | None) -> TaskSettings:
    student = StudentChoice() if share is None else encoder(share)
    return TaskSettings(name="intents", student=student)


def encoder(share: float) -> StudentChoice:
    return StudentChoice(kind="encoder", base=Path("base"), train_share=share)


def met(*releases: str | None) -> list[Exchange]:
    return [
        Exchange(
            id=new_id(), request_id="r", created=1.0, task="intents", tenant="t", request={}, route="teacher",
            reason="no_release", release=release,
        )
        for release in releases
    ]  # fmt: skip


@given(st.text(), st.text())
def test_an_exchange_has_one_place_for_ever(task: str, id: str) -> None:
    assert 0 <= place_of(task, id) < 1
    assert place_of(task, id) == place_of(task, id)


def test_places_are_spread_evenly_and_are_others_for_other_tasks() -> None:
    ids = [new_id() for _ in range(20_000)]
    places = [place_of("intents", id) for id in ids]
    for tenth in range(10):
        share = sum(tenth / 10 <= place < (tenth + 1) / 10 for place in places) / len(places)
        assert share == pytest.approx(0.1, abs=0.015)  # seven standard deviations
    both = sum(place < 0.5 and place_of("other", id) < 0.5 for place, id in zip(places, ids, strict=True))
    assert both / len(ids) == pytest.approx(0.25, abs=0.025)


def test_the_places_of_today_are_those_of_ever_after() -> None:
    # A version that hashed otherwise would judge models by what they were trained on.
    assert place_of("intents", "0199c0ffee00000000000000") == 0.9013544683604635


@given(st.text(), shares, st.none() | shares)
def test_nothing_trains_and_judges(id: str, share: float, judges_from: float | None) -> None:
    split = Split("intents", share, max(share, judges_from or 0.0))
    assert not (split.trains(id) and split.judges(id))
    assert judges_from or split.trains(id) or split.judges(id)


def test_what_trained_a_release_that_traffic_has_met_judges_no_student_any_more(tmp_path: Path) -> None:
    store = ReleaseStore(tmp_path)
    first = store.write("intents", {}, {"student": "encoder", "train_share": 0.7})
    unmet = store.write("intents", {}, {"student": "encoder", "train_share": 0.9})
    assert unmet == "r0002"
    store.write("intents", {}, {"student": "linear"})

    assert Split.of(policy(None), store, met(None, None)) == Split("intents", 0.0, 0.0)
    assert Split.of(policy(None), store, met(None, first, "r0003")) == Split("intents", 0.0, 0.7)
    assert Split.of(policy(0.5), store, met(None, first)) == Split("intents", 0.5, 0.7)
    assert Split.of(policy(0.8), store, met(None, first)) == Split("intents", 0.8, 0.8)
    assert Split.of(policy(0.5), store, met(None, "r0009")) == Split("intents", 0.5, 0.5), (
        "not there any more"
    )


def test_without_such_a_release_everything_judges_a_linear_student(tmp_path: Path) -> None:
    split = Split.of(policy(None), ReleaseStore(tmp_path), met(None))
    assert all(split.judges(new_id()) and not split.trains(new_id()) for _ in range(100))
