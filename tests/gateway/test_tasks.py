"""Which prompts become tasks: those the teacher answers, and the more often the fewer places are left."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from gateway.tasks import OVERFLOW, Found, Tasks
from serving.settings import Settings

Start = Callable[..., Any]


def request(prompt: str, model: str = "m") -> dict[str, Any]:
    return {
        "model": model,
        "messages": [{"role": "system", "content": prompt}, {"role": "user", "content": "hello"}],
    }


def tasks_of(limit: int, disk: list[str] | None = None, **more: Any) -> Tasks:
    settings = Settings(server={"max_tasks": limit}, **more)
    return Tasks(settings, lambda: disk if disk is not None else [])


def answered(tasks: Tasks, asked: dict[str, Any]) -> str:
    task, newcomer = tasks.find(asked, None)
    return task if newcomer is None else tasks.confirm(newcomer)


def letters(number: int) -> str:
    """A word for a number: the fingerprint takes digits for what varies."""
    return "".join(chr(97 + int(digit)) for digit in str(number))


def test_a_prompt_is_no_task_before_the_teacher_has_answered() -> None:
    tasks = tasks_of(4)
    newcomer = tasks.find(request("label"), None).newcomer
    assert newcomer is not None
    for _ in range(100):
        assert tasks.find(request("label"), None) == Found(OVERFLOW, newcomer)
    assert tasks.names() == []
    assert tasks.confirm(newcomer) == newcomer
    assert tasks.find(request("label"), None) == Found(newcomer)
    assert tasks.names() == [newcomer]


def test_the_fewer_places_are_left_the_more_answers_one_takes() -> None:
    tasks = tasks_of(8)
    needed = []
    for number in range(8):
        asked, answers = request(letters(number)), 1
        while answered(tasks, asked) == OVERFLOW:
            answers += 1
        needed.append(answers)
    assert needed == [1, 1, 1, 1, 2, 2, 4, 8]
    assert [answered(tasks, request("one more")) for _ in range(20)] == [OVERFLOW] * 20
    assert answered(tasks, request(letters(3))) != OVERFLOW, "those that are in stay in"


def test_prompts_that_never_come_again_leave_room_for_one_that_does() -> None:
    tasks = tasks_of(200)
    for number in range(5_000):
        answered(tasks, request(f"the customer is {letters(number)}"))
    assert len(tasks.names()) == 100
    narrow = request("label the message")
    named = [answered(tasks, narrow) for _ in range(2)]
    assert named[0] == OVERFLOW != named[1]


def test_workers_share_what_they_discover() -> None:
    disk: list[str] = []
    now = 0.0
    tasks = Tasks(Settings(server={"max_tasks": 2}), lambda: disk, clock=lambda: now)
    newcomer = tasks.find(request("label"), None).newcomer
    assert newcomer is not None
    disk.append(newcomer)
    assert tasks.find(request("label"), None).task == OVERFLOW, "the disk is looked at once a second at most"
    now = 1.0
    assert tasks.find(request("label"), None) == Found(newcomer)
    disk += ["auto-000000000001", OVERFLOW]
    assert [answered(tasks, request("another")) for _ in range(5)] == [OVERFLOW] * 5, (
        "that was the last place"
    )
    assert tasks.names() == sorted([newcomer, "auto-000000000001"])


@given(st.lists(st.tuples(st.integers(0, 30), st.booleans())), st.integers(1, 12))
def test_there_are_never_more_tasks_than_places(asked: list[tuple[int, bool]], limit: int) -> None:
    tasks = tasks_of(limit, task=[{"name": "named", "match": {"model": "named"}}])
    for number, is_answered in asked:
        task, newcomer = tasks.find(request(letters(number)), None)
        if newcomer is not None and is_answered:
            task = tasks.confirm(newcomer)
        assert task == OVERFLOW or task in tasks.names()
        assert len(tasks.names()) <= limit
    assert tasks.find(request("x", "named"), None) == Found("named")


def test_what_the_teacher_refuses_takes_no_place(stand_in: Start, gateway: Start) -> None:
    running = gateway(stand_in({"hello": "x"}).url, server={"max_tasks": 2})
    for number in range(10):
        junk = {**request("label", f"junk-{letters(number)}"), "metadata": {"stand_in": "status=404"}}
        refused = running.post(json=junk)
        assert refused.status_code == 404
        assert refused.headers["x-understudy-task"] == OVERFLOW
    assert [path.name for path in (running.state_dir / "tasks").iterdir()] == []
    for stream, prompt in enumerate(("whole", "streamed", "streamed")):
        answer = running.post(json={**request(prompt), "stream": bool(stream)})
        assert answer.status_code == 200
    names = {exchange.task for exchange in running.exchanges()}
    assert answer.headers["x-understudy-task"] in names - {OVERFLOW}
    assert len(names) == 3
    labelled = running.metric("understudy_requests_total", task=OVERFLOW, code="404")
    assert labelled == 10, "a prompt the teacher hasn't answered gets no series of its own"
