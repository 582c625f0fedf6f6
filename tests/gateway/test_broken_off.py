"""What a client that leaves has cost all the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from distillation.economics import summarise
from serving.settings import Settings

Start = Callable[..., Any]
TEXT = "tell me about parcels " * 20
ANSWER = " ".join(f"word{i}" for i in range(200))
PER_TOKEN = {"input": 10e-6, "output": 30e-6}


def body(**more: Any) -> dict[str, Any]:
    return {"model": "big", "messages": [{"role": "user", "content": TEXT}], **more}


@pytest.mark.parametrize("store", [True, False])
def test_a_stream_that_is_left_costs_what_had_come(
    stand_in: Start, gateway: Start, eventually: Start, store: bool
) -> None:
    teacher = stand_in({TEXT: ANSWER}, latency_ms=4000, latency_spread=0.0)
    running = gateway(teacher.url)
    with running.client() as client:
        stream = client.chat.completions.create(**body(stream=True, store=store))
        seen = [next(stream) for _ in range(5)]
        stream.close()
    eventually(lambda: running.metric("understudy_requests_total", code="499") == 1)
    eventually(lambda: teacher.stats()["disconnected"] == 1)
    spent = running.metric("understudy_cost_usd_total", route="teacher")
    prompt = len(TEXT) / 4 * PER_TOKEN["input"]
    come = sum(len(chunk.choices[0].delta.content or "") for chunk in seen) / 4 * PER_TOKEN["output"]
    assert prompt + come <= spent < prompt + len(ANSWER) / 4 * PER_TOKEN["output"]
    assert running.exchanges() == [], "there is no answer to learn from"
    if store:
        settings = Settings(state_dir=running.state_dir)
        eventually(lambda: any(task.cost_usd for task in summarise(settings)))
        (summary,) = summarise(settings)
        assert summary.cost_usd == pytest.approx(spent)


def test_a_whole_answer_that_is_not_waited_for_costs_its_prompt(
    stand_in: Start, gateway: Start, eventually: Start
) -> None:
    teacher = stand_in({TEXT: ANSWER}, latency_ms=4000, latency_spread=0.0)
    running = gateway(teacher.url)
    with pytest.raises(Exception, match="timed out"):
        running.post(json=body(), timeout=0.5)
    eventually(lambda: running.metric("understudy_requests_total", code="499") == 1)
    spent = running.metric("understudy_cost_usd_total", route="teacher")
    assert spent == pytest.approx(len(TEXT) / 4 * PER_TOKEN["input"], rel=0.01)


def test_a_stream_that_breaks_costs_what_had_come(stand_in: Start, gateway: Start) -> None:
    teacher = stand_in({TEXT: ANSWER})
    running = gateway(teacher.url)
    answer = running.post(json=body(stream=True, metadata={"stand_in": "break-after=5"}))
    assert '"error"' in answer.text
    assert running.metric("understudy_cost_usd_total", route="teacher") > len(TEXT) / 4 * PER_TOKEN["input"]


def test_an_answer_that_came_whole_is_paid_for_once(
    stand_in: Start, gateway: Start, eventually: Start
) -> None:
    running = gateway(stand_in({TEXT: ANSWER}).url)
    assert running.post(json=body()).status_code == 200
    assert running.post(json=body(stream=True)).status_code == 200
    costs = [exchange.cost_usd for exchange in running.exchanges()]
    assert len(costs) == 2
    assert running.metric("understudy_cost_usd_total", route="teacher") == pytest.approx(sum(costs))


def test_a_teacher_that_refuses_costs_nothing(stand_in: Start, gateway: Start) -> None:
    running = gateway(stand_in({TEXT: ANSWER}).url)
    assert running.post(json=body(metadata={"stand_in": "status=503"})).status_code == 503
    assert running.metric("understudy_cost_usd_total", route="teacher") == 0


@pytest.mark.parametrize("stream", [True, False])
def test_the_gateways_own_deadline_costs_the_prompt(stand_in: Start, gateway: Start, stream: bool) -> None:
    running = gateway(stand_in({TEXT: ANSWER}, latency_ms=8000).url, teacher={"timeout_s": 0.5})
    silent = {"stand_in": "hang-after=0"}
    assert running.post(json=body(stream=stream, metadata=silent)).status_code == 504
    spent = running.metric("understudy_cost_usd_total", route="teacher")
    assert spent == pytest.approx(len(TEXT) / 4 * PER_TOKEN["input"], rel=0.01)


def test_who_leaves_the_line_before_the_teacher_costs_nothing(
    stand_in: Start, gateway: Start, eventually: Start
) -> None:
    teacher = stand_in({TEXT: ANSWER}, latency_ms=4000, latency_spread=0.0)
    running = gateway(teacher.url, teacher={"max_concurrency": 1})
    with running.client() as client:
        # It has the only place.
        stream = client.chat.completions.create(**body(stream=True))
        next(stream)
        with pytest.raises(Exception, match="timed out"):
            running.post(json=body(), timeout=0.3)
        eventually(lambda: running.metric("understudy_requests_total", code="499") == 1)
        assert teacher.stats()["chat"] == 1
        assert running.metric("understudy_cost_usd_total", route="teacher") == 0
        stream.close()


def test_who_leaves_before_a_retry_costs_nothing(stand_in: Start, gateway: Start, eventually: Start) -> None:
    teacher = stand_in({TEXT: ANSWER})
    teacher.fail({"status": 503, "retry_after": 4})
    running = gateway(teacher.url, teacher={"max_retries": 1})
    with pytest.raises(Exception, match="timed out"):
        running.post(json=body(), timeout=0.5)
    eventually(lambda: running.metric("understudy_requests_total", code="499") == 1)
    assert teacher.stats()["chat"] == 1
    assert running.metric("understudy_cost_usd_total", route="teacher") == 0
