"""Labels of a teacher that isn't there any more are another teacher's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from distillation.dataset import build_dataset
from distillation.learning import Lesson, learn
from distillation.teachers import teacher_since
from serving.agreement import comparison
from serving.exchange import Exchange, TeacherAnswer
from serving.releases import ReleaseStore
from serving.settings import Settings
from serving.task_settings import AgreementChoice, TaskSettings

Make = Callable[..., Any]


def text(number: int) -> str:
    return f"where is {'my card' if number % 2 else 'the parcel'} {number}"


def answered(names: list[str], requested: str = "intents", start: float = 0.0) -> list[Exchange]:
    """Exchanges a second apart, answered under these names."""
    made = []
    for number, name in enumerate(names):
        says = [{"message": {"content": "card" if number % 2 else "parcel"}, "finish_reason": "stop"}]
        made.append(
            Exchange(
                f"{requested}{start + number:09}",
                "r",
                start + number,
                "intents",
                "t",
                {"model": requested, "messages": [{"role": "user", "content": text(number)}]},
                "teacher",
                "no_release",
                teacher=TeacherAnswer(name, says, None, 0.1, trainable=True),
                audit_rate=0.05,
                propensity=1.0,
            )
        )
    return made


def test_twenty_answers_in_a_row_under_a_new_name_are_another_teacher() -> None:
    assert teacher_since(answered(["a"] * 50)) == {}
    assert teacher_since(answered(["a"] * 50 + ["b"] * 19)) == {}
    assert teacher_since(answered(["a"] * 50 + ["b"] * 20)) == {"intents": 50.0}
    assert teacher_since(answered((["a"] * 5 + ["b"] * 15) * 3 + ["b"] * 40)) == {}, "it came and went"
    assert teacher_since(answered(["a"] * 9 + ["b", "c"] * 10)) == {"intents": 9.0}
    assert teacher_since(answered(["a"] * 30 + ["b"] * 30 + ["a"] * 20)) == {"intents": 60.0}, "and back"


def test_one_that_asks_for_another_model_changes_no_teacher() -> None:
    both = answered(["big-1"] * 60) + answered(["small-1"] * 60, "small", start=100.0)
    assert teacher_since(both) == {}
    both += answered(["small-2"] * 20, "small", start=200.0)
    assert teacher_since(both) == {"small": 200.0}
    dataset = build_dataset(both, comparison(AgreementChoice()))
    assert len(dataset.rows) == 80
    assert dataset.left_out == {"the teacher has changed since": 60}
    assert {row.teacher_model for row in dataset.rows} == {"big-1", "small-2"}
    assert dataset.teacher_since == 200.0
    assert sum(one.exchanges for one in dataset.traffic.values()) == 80, "nor is their traffic counted"


def test_replayed_and_forced_answers_say_nothing_of_who_answers_now() -> None:
    replayed = [
        replace(one, route="cache", origin="teacher", reason="hit:teacher") for one in answered(["b"] * 40)
    ]
    assert teacher_since(answered(["a"] * 20) + replayed) == {}
    forced = [replace(one, reason="forced") for one in answered(["b"] * 40)]
    assert teacher_since(answered(["a"] * 20) + forced) == {}


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 30)), min_size=1, max_size=8))
def test_what_is_used_begins_with_the_last_change(runs: list[tuple[str, int]]) -> None:
    names = [name for name, count in runs for _ in range(count)]
    since = teacher_since(answered(names)).get("intents")
    dataset = build_dataset(answered(names), comparison(AgreementChoice()))
    assert len(dataset.rows) + dataset.left_out.total() == len(names)
    assert [row.created for row in dataset.rows] == [at for at in range(len(names)) if at >= (since or 0.0)]
    if since is not None:
        begun = names[int(since) :]
        assert len(begun) >= 20
        assert names[int(since) - 1] not in begun[:20]


def test_the_next_release_is_learned_from_the_teacher_that_answers_now(write_log: Make) -> None:
    def lesson() -> Lesson:
        (found,) = learn(settings, "intents")
        return found

    state = write_log(answered(["big-1"] * 60 + ["big-2"] * 50))
    settings = Settings(state_dir=state, task=[TaskSettings(name="intents", max_disagreement=0.1)])
    waiting = lesson()
    assert (waiting.outcome, waiting.labels) == ("not_due", 50)
    assert "The teacher has changed on 1970-01-01: only labels from then on count" in waiting.message
    write_log(answered(["big-2"] * 40, start=1000.0))
    found = lesson()
    assert (found.outcome, found.labels) == ("released", 90)
    card = ReleaseStore(state).read("intents", "r0001").card
    assert card["teacher_models"] == {"big-2": 90}
    assert card["teacher_models_by_request"] == {"intents": {"big-2": 90}}
    assert card["left_out"] == {"the teacher has changed since": 60}
