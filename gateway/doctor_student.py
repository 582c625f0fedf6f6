"""What `understudy doctor` checks of students that are asked over HTTP: whether they answer, and say how sure."""

from __future__ import annotations

import math
import time

from gateway.finding import Finding
from routers.meter import TokenMeter
from serving.classify_plan import ClassifyPlan
from serving.errors import UnderstudyError
from serving.exchange import Json
from serving.served import ServedPlan, plan_of, served_student
from serving.settings import Settings

_QUESTION: Json = {"messages": [{"role": "user", "content": "Say yes."}], "max_tokens": 4}


async def check_students(settings: Settings) -> list[Finding]:
    """Ask each student of the configuration that is served elsewhere one question, as requests would ask it."""
    choices = [
        settings.task_defaults.student,
        *(settings.for_task(task.name).student for task in settings.task),
    ]
    plans = dict.fromkeys(plan_of(choice) for choice in choices if choice.served)
    return [await _check(plan) for plan in plans]


async def _check(plan: ServedPlan) -> Finding:
    began = time.perf_counter()
    try:
        student = served_student(plan, TokenMeter)
        try:
            answer = await student.answer(_QUESTION)
        finally:
            await student.aclose()
    except UnderstudyError as error:
        advice = "start it, or correct the task's student.base_url and student.model; the teacher answers meanwhile"
        return Finding("student", "problem", f"{plan.model!r}: {error}", advice)
    took = time.perf_counter() - began
    if not math.isfinite(answer.score):
        said = f"{plan.model!r} gives no log-probabilities, so that it can never be trusted"
        return Finding(
            "student",
            "problem",
            said,
            "use a server that gives them (logprobs), such as vLLM, or set student.samples",
        )
    if isinstance(plan, ClassifyPlan):
        return Finding(
            "student", "ok", f"{plan.model!r} answered in {took * 1000:.0f} ms, with probabilities"
        )
    said = f"{plan.model!r} answered in {took * 1000:.0f} ms, with log-probabilities"
    if took > plan.hold_back_s:
        advice = "a faster one, or a longer student.hold_back_s: streamed requests wait that long at most"
        return Finding("student", "warning", said, advice)
    return Finding("student", "ok", said)
