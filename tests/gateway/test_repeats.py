"""The teacher is asked twice now and then: what it promises itself is measured, and nothing below it goes live."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distillation.economics import summarise
from distillation.learning import Lesson, learn
from routers.noise import Noise
from serving.recording import Recorded, Recording
from serving.settings import Settings
from serving.stand_in import create_stand_in
from serving.stand_in_call import StandInHttp
from serving.task_settings import TaskSettings

Start = Callable[..., Any]
TASK: dict[str, Any] = {
    "name": "intents",
    "match": {"model": "intents"},
    "max_disagreement": 0.1,
    "noise_rate": 1.0,
}


def body(text: str, **more: Any) -> dict[str, Any]:
    return {"model": "intents", "messages": [{"role": "user", "content": text}], **more}


def text(number: int) -> str:
    return f"where is {'my card' if number % 2 else 'the parcel'} {number}"


def recorded(count: int, wavering: int) -> Recording:
    """Every `wavering`-th text is answered otherwise the second time; 0: none."""
    rows = []
    for number in range(count):
        answer = "card" if number % 2 else "parcel"
        rows.append(Recorded(text(number), answer))
        if wavering and number % wavering == 0:
            rows.append(Recorded(text(number), "something else"))
    return Recording(Path("answers.csv"), tuple(rows))


def lesson(state: Path) -> Lesson:
    (found,) = learn(settings(state), "intents")
    return found


def settings(state: Path) -> Settings:
    return Settings(state_dir=state, task=[TaskSettings(**TASK)])


@pytest.mark.parametrize("wavering", [0, 4])
def test_a_teacher_that_disagrees_with_itself_gets_no_student(
    serve: Start, gateway: Start, eventually: Start, wavering: int
) -> None:
    count = 80
    teacher = serve(create_stand_in(recorded(count, wavering)), http=StandInHttp)
    running = gateway(teacher, task=[TASK])
    for number in range(count):
        said = running.post(json=body(text(number))).json()["choices"][0]["message"]["content"]
        assert said == ("card" if number % 2 else "parcel"), "the client gets the first answer"
    eventually(lambda: running.metric("understudy_repeats_total", task="intents") == count)
    eventually(lambda: sum(one.repeat is not None for one in running.exchanges()) == count)
    differed = count // wavering if wavering else 0
    assert running.metric("understudy_repeats_total", outcome="disagreed") == differed
    logged = running.exchanges()
    assert all(one.audit == "none" or one.coin for one in logged)
    assert {one.teacher.choices[0]["message"]["content"] for one in logged} == {"card", "parcel"}
    twice = [usage for one in logged for usage in (one.teacher.usage, one.repeat.usage)]
    usd = sum(u["prompt_tokens"] * 10e-6 + u["completion_tokens"] * 30e-6 for u in twice)
    assert running.metric("understudy_cost_usd_total", task="intents") == pytest.approx(usd)
    assert running.metric("understudy_tokens_total", kind="repeat_input") == sum(
        one.repeat.usage["prompt_tokens"] for one in logged
    )
    found = lesson(running.state_dir)
    (summary,) = summarise(settings(running.state_dir))
    assert summary.noise == Noise(count, differed)
    assert summary.cost_usd == pytest.approx(usd)
    assert found.labels == count, "a second answer is no second label"
    if not wavering:
        assert found.release == "r0001"
        assert found.look is not None
        assert found.look["teacher_noise"] == {"asked": count, "differed": 0, "at_least": 0.0}
        return
    assert (found.outcome, found.release) == ("declined", None)
    assert f"({differed} of {count} asked twice, 90% certain)" in found.message
    assert "max_disagreement = 0.1 can't be promised" in found.message
    assert "the teacher disagrees with itself on at least 18." in summary.outlook


def test_only_what_counts_and_only_while_no_release_is_live(
    stand_in: Start, gateway: Start, publish: Start, eventually: Start, tmp_path: Path
) -> None:
    teacher = stand_in({"parcel lost": "lost", "parcel late": "late"}, default="unclear")
    publish(tmp_path / "state", "served", {"parcel lost": "lost"})
    served = {**TASK, "name": "served", "match": {"model": "served"}, "audit_rate": 1e-9}
    running = gateway(teacher.url, task=[TASK, served])
    for _ in range(3):
        assert running.post(json=body("parcel late", model="served")).status_code == 200
    running.post(json=body("parcel lost", store=False))
    running.post(json=body("parcel lost"), headers={"x-understudy-route": "teacher"})
    running.post(json=body("parcel lost", temperature=0))
    replayed = running.post(json=body("parcel lost", temperature=0))
    assert replayed.headers["x-understudy-route"] == "cache"
    running.post(json=body("parcel late", stream=True))
    eventually(lambda: running.metric("understudy_repeats_total", task="intents") == 2)
    assert running.metric("understudy_repeats_total") == 2
    eventually(lambda: sum(one.repeat is not None for one in running.exchanges()) == 2)
    assert teacher.stats()["chat"] == 7 + 2
    assert [one.request.get("stream") for one in running.exchanges() if one.repeat is not None] == [
        None,
        True,
    ]


def test_a_teacher_that_gives_no_second_answer_is_not_noisy(
    stand_in: Start, gateway: Start, eventually: Start
) -> None:
    teacher = stand_in({"parcel lost": "lost"})
    teacher.fail({"from": 2, "to": 2, "status": 400})
    running = gateway(teacher.url, task=[TASK])
    assert running.post(json=body("parcel lost")).status_code == 200
    eventually(lambda: running.metric("understudy_repeats_total", outcome="missing") == 1)
    (summary,) = summarise(settings(running.state_dir))
    assert (summary.noise, summary.labels) == (None, 1)


def test_where_it_may_not_be_learned_from_it_is_not_asked_twice(
    stand_in: Start, gateway: Start, eventually: Start
) -> None:
    teacher = stand_in({"parcel lost": "lost"})
    running = gateway(teacher.url, task=[TASK], teacher={"trainable": False})
    for _ in range(3):
        assert running.post(json=body("parcel lost")).status_code == 200
    eventually(lambda: len(running.exchanges()) == 3)
    assert teacher.stats()["chat"] == 3


def test_without_a_rate_nothing_is_asked_twice_and_with_the_default_one_in_two_hundred() -> None:
    assert TaskSettings(name="t").noise_rate == 0.005
    with pytest.raises(ValueError, match="noise_rate"):
        TaskSettings(name="t", noise_rate=-0.1)
