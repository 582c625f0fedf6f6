"""A classifier on a real vLLM is a task's student: from the demo's messages to a release, to a gateway that answers."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distillation.learning import learn
from gateway.doctor_student import check_students
from serving.classify import ClassifyStudent
from serving.classify_plan import ClassifyPlan
from serving.recording import Recorded, read_recording
from serving.settings import Settings
from serving.student_choice import StudentChoice
from serving.student_server import StudentBroken, StudentRefused
from serving.task_settings import TaskSettings

Make = Callable[..., Any]
SENT = 400
LONG = "parcel " * 3000


@pytest.fixture(scope="module")
def rows() -> tuple[Recorded, ...]:
    return read_recording(Path(__file__).parents[2] / "examples" / "parcels.csv").rows[:SENT]


def settings(server: Any, state: Path) -> Settings:
    student = StudentChoice(kind="encoder", base_url=f"{server.url}/v1", model=server.model)
    task = TaskSettings(
        name="intents", match={"model": "intents"}, max_disagreement=0.15, certainty=0.8, student=student
    )
    return Settings(state_dir=state, task=[task])


def asking(text: str) -> dict[str, Any]:
    return {"model": "intents", "messages": [{"role": "user", "content": text}]}


def test_from_the_log_to_a_gateway_that_answers(
    vllm_pooling: Any,
    rows: tuple[Recorded, ...],
    write_log: Make,
    exchanges: Make,
    stand_in: Make,
    gateway: Make,
) -> None:
    said = {row.text: row.teacher or "" for row in rows}
    state = write_log(exchanges(said.items()))
    configured = settings(vllm_pooling, state)
    (lesson,) = learn(configured, "intents")
    assert lesson.release == "r0001", lesson.message
    assert lesson.look is not None
    assert lesson.look["agreement"] > 0.7
    teacher = stand_in({**said, LONG: "other"}, model="big")
    running = gateway(teacher.url, task=[task.model_dump(exclude_unset=True) for task in configured.task])
    routes: dict[str, list[bool]] = {"student": [], "teacher": []}
    for text, right in list(said.items())[:60]:
        answer = running.post(json=asking(text))
        given = answer.json()["choices"][0]["message"]["content"]
        routes[answer.headers["x-understudy-route"]].append(given == right)
    assert len(routes["student"]) > 10
    assert all(routes["teacher"])
    assert sum(routes["student"]) > 0.8 * len(routes["student"])
    refused = running.post(json=asking(LONG))
    assert refused.headers["x-understudy-reason"] == "unsupported:refused"
    served = [one for one in running.exchanges() if one.by_student]
    assert all(one.student.model == vllm_pooling.model and math.isfinite(one.student.score) for one in served)


def test_doctor_asks_it(vllm_pooling: Any, tmp_path: Path) -> None:
    (found,) = asyncio.run(check_students(settings(vllm_pooling, tmp_path)))
    assert found.verdict == "ok", found.said


def test_what_it_refuses(vllm_pooling: Any) -> None:
    async def ask(model: str, text: str) -> None:
        student = ClassifyStudent.of(ClassifyPlan(f"{vllm_pooling.url}/v1", model))
        try:
            await student.answer(asking(text))
        finally:
            await student.aclose()

    with pytest.raises(StudentRefused, match="status 400"):
        asyncio.run(ask(vllm_pooling.model, LONG))
    with pytest.raises(StudentBroken, match="status 404"):
        asyncio.run(ask("another", "Hello"))
