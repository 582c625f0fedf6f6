"""What `understudy doctor` checks of students that are asked over HTTP: whether they answer, and say how sure."""

from __future__ import annotations

import math
import time
from dataclasses import replace

from gateway.doctor_server import server_limits
from gateway.finding import Finding
from routers.meter import TokenMeter
from serving.adapter import Adapter
from serving.adapter_loading import is_loaded
from serving.classify_plan import ClassifyPlan
from serving.engines import Engines
from serving.errors import ConfigError, UnderstudyError
from serving.exchange import Json
from serving.lm import LmStudent
from serving.lm_plan import LmPlan
from serving.pool import Pool, served_at
from serving.served import ServedPlan, plan_of, served_student
from serving.settings import Settings

_QUESTION: Json = {"messages": [{"role": "user", "content": "Say yes."}], "max_tokens": 4}


async def check_students(settings: Settings) -> list[Finding]:
    """Ask each student of the configuration that is served elsewhere one question, as requests would ask it."""
    choices = [
        settings.task_defaults.student,
        *(settings.for_task(task.name).student for task in settings.task),
    ]
    found: dict[Finding, None] = {}
    plans: dict[ServedPlan, None] = {}
    for choice in choices:
        if not choice.served:
            continue
        try:
            adapter = None if choice.adapter is None else Adapter.read(choice.adapter).name
        except ConfigError as error:
            found[Finding("student", "problem", str(error), "no release can be learned with it")] = None
        else:
            plans[plan_of(choice, adapter)] = None
    pool = Pool(settings.state_dir, settings.student.vllm)
    try:
        return [*found, *[await _check(plan, pool) for plan in plans]]
    finally:
        await pool.aclose()


async def _check(plan: ServedPlan, pool: Pool) -> Finding:
    waiting = ""
    try:
        if isinstance(plan, LmPlan) and plan.adapter is not None and not await _is_loaded(plan, pool):
            # Nobody but a release has it loaded.
            waiting = f"; its adapter {plan.adapter} is loaded by the first look"
            plan = replace(plan, adapter=None)
        began = time.perf_counter()
        student = served_student(plan, TokenMeter, Engines(pool=pool))
        try:
            answer = await student.answer(_QUESTION)
            took = time.perf_counter() - began
            limits = await server_limits(student) if isinstance(student, LmStudent) else ""
        finally:
            await student.aclose()
    except UnderstudyError as error:
        where = "[student.vllm]" if plan.base_url is None else "the task's student.base_url"
        advice = f"start it, or correct {where} and student.model; the teacher answers meanwhile"
        return Finding("student", "problem", f"{plan.model!r}: {error}", advice)
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
    said = f"{plan.served_as!r} answered in {took * 1000:.0f} ms, {limits}{waiting}"
    if took > plan.hold_back_s:
        advice = "a faster one, or a longer student.hold_back_s: streamed requests wait that long at most"
        return Finding("student", "warning", said, advice)
    return Finding("student", "ok", said)


async def _is_loaded(plan: LmPlan, pool: Pool) -> bool:
    """Whether the server has the plan's adapter. Raises as `is_loaded` does."""
    server = served_at(
        plan.base_url,
        below="/v1",
        timeout_s=plan.timeout_s,
        api_key_env=plan.api_key_env,
        engines=Engines(pool=pool),
    )
    try:
        return await is_loaded(plan.served_as, server)
    finally:
        await server.aclose()
