"""What a student's answers cost through the gateway: measured where it runs, whatever becomes of them."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from routers.confidence import Confidence
from routers.meter import TokenMeter
from routers.router import Router
from serving.classify_plan import ClassifyPlan
from serving.lm import LmStudent
from serving.lm_plan import LmPlan
from serving.recording import Recorded, Recording
from serving.releases import ReleaseStore
from serving.stand_in import create_stand_in
from serving.stand_in_call import StandInHttp

Start = Callable[..., Any]
Json = dict[str, Any]
ROWS = (
    Recorded("sure", "one two three four", confidence=0.95),
    Recorded("unsure", "one two three four", confidence=0.3),
    Recorded("late", "lost", confidence=0.95, latency_s=30.0),
)
ROUTER = Router(Confidence.of_score(1.0, 0.0), rank_threshold=1.0)
USD_PER_HOUR = 3600.0  # a second costs a dollar


def body(text: str, **more: Any) -> Json:
    return {"model": "intents", "messages": [{"role": "user", "content": text}], **more}


@pytest.fixture
def live(serve: Start, stand_in: Start, gateway: Start, tmp_path: Path) -> Start:
    """A gateway with a live `lm` release, whose student is configured as given."""

    def start(**student: Any) -> Any:
        app = create_stand_in(Recording(Path("student.csv"), ROWS), model="small", tokens_per_s=16.0)
        plan = LmPlan(base_url=f"{serve(app, http=StandInHttp)}/v1", model="small", hold_back_s=0.5)
        store = ReleaseStore(tmp_path / "state")
        files = {**LmStudent.of(plan, TokenMeter).files(), "router.json": ROUTER.dump()}
        store.set_live("intents", store.write("intents", files, {"student": "lm"}))
        choice = {"kind": "lm", "base_url": plan.base_url, "model": plan.model, **student}
        task = {"name": "intents", "match": {"model": "intents"}, "student": choice, "audit_rate": 1e-9}
        return gateway(stand_in({}, model="big", default="the teacher's").url, task=[task])

    return start


def test_answers_that_are_made_together_share_what_they_run_on(live: Start) -> None:
    running = live(usd_per_hour=USD_PER_HOUR)
    began = time.perf_counter()
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: running.post(json=body("sure"), timeout=60), range(8)))
    busy_s = time.perf_counter() - began
    students = [exchange.student for exchange in running.exchanges()]
    assert len(students) == 8
    assert 0.0 < sum(student.device_s for student in students) <= busy_s
    for student in students:
        assert 0.0 < student.device_s <= student.latency_s
        assert student.cost_usd == pytest.approx(student.device_s * USD_PER_HOUR / 3600)
    told = sorted(float(answer.headers["x-understudy-cost-usd"]) for answer in answers)
    assert told == pytest.approx(sorted(student.cost_usd for student in students), abs=1e-8)
    counted = running.metric("understudy_student_device_seconds_total", task="intents")
    assert counted == pytest.approx(sum(student.device_s for student in students))
    assert running.metric("understudy_student_answers_total", task="intents") == 8
    assert running.metric("understudy_student_tokens_total", task="intents") == sum(
        student.usage["completion_tokens"] for student in students
    )


def test_an_answer_that_is_rejected_costs_as_well(live: Start) -> None:
    running = live(usd_per_hour=USD_PER_HOUR)
    running.post(json=body("unsure"), timeout=60).raise_for_status()
    (exchange,) = running.exchanges()
    assert exchange.route == "teacher"
    assert exchange.cost_usd == pytest.approx(exchange.teacher.cost_usd + exchange.student.device_s)
    assert running.metric("understudy_student_answers_total", task="intents") == 1


def test_one_of_which_nothing_came_in_time_costs_what_it_took(live: Start) -> None:
    running = live(usd_per_hour=USD_PER_HOUR)
    running.post(json=body("late", stream=True), timeout=60).raise_for_status()
    (exchange,) = running.exchanges()
    assert (exchange.route, exchange.reason) == ("teacher", "student_slow")
    assert exchange.student is None
    assert exchange.cost_usd > exchange.teacher.cost_usd + 0.4
    assert running.metric("understudy_student_device_seconds_total", task="intents") > 0.4
    assert running.metric("understudy_student_answers_total", task="intents") == 0


WORKS_S = 0.3


@pytest.mark.parametrize(
    ("answer", "timeout_s", "reason"),
    [
        ((500, {"error": {"message": "out of memory"}}), 30.0, "student_error"),
        ((200, b"<html>"), 30.0, "student_error"),
        ([0.5, 0.5, 0.5], 30.0, "student_error"),
        ((400, {"error": {"message": "the text is too long"}}), 30.0, "unsupported:refused"),
        ([0.1, 0.9], 0.2, "student_error"),
    ],
    ids=["an error", "nonsense", "no probabilities", "a refusal", "nothing in time"],
)
def test_a_classification_that_came_to_nothing_costs_what_it_took(
    classifier: Start,
    stand_in: Start,
    gateway: Start,
    tmp_path: Path,
    answer: Any,
    timeout_s: float,
    reason: str,
) -> None:
    def classify(text: str) -> Any:
        time.sleep(WORKS_S)
        return answer

    plan = ClassifyPlan(classifier(classify, ("card", "loan")), "bert", timeout_s=timeout_s)
    store = ReleaseStore(tmp_path / "state")
    files = {**plan.files(), "router.json": ROUTER.dump()}
    store.set_live("intents", store.write("intents", files, {"student": "encoder"}))
    choice = {"kind": "encoder", "base_url": plan.base_url, "model": "bert", "usd_per_hour": USD_PER_HOUR}
    task = {"name": "intents", "match": {"model": "intents"}, "student": choice, "audit_rate": 1e-9}
    running = gateway(stand_in({}, model="big", default="the teacher's").url, task=[task])
    running.post(json=body("hello"), timeout=60).raise_for_status()
    (exchange,) = running.exchanges()
    assert (exchange.route, exchange.reason, exchange.student) == ("teacher", reason, None)
    took_s = running.metric("understudy_student_device_seconds_total", task="intents")
    assert took_s >= min(WORKS_S, timeout_s) * 0.99
    assert exchange.cost_usd == pytest.approx(exchange.teacher.cost_usd + took_s)
    assert running.metric("understudy_student_answers_total", task="intents") == 0


def test_a_provider_is_paid_by_the_token(live: Start) -> None:
    running = live(price={"input": 0.0, "output": 1e6})
    answer = running.post(json=body("sure"), timeout=60)
    (exchange,) = running.exchanges()
    assert exchange.cost_usd == exchange.student.usage["completion_tokens"] > 0
    assert float(answer.headers["x-understudy-cost-usd"]) == exchange.cost_usd
