"""A teacher that fails: what the client sees and after how long, and what the teacher is spared."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest

Start = Callable[..., Any]
ANSWERS = {"hello": "one two three four five six seven eight", "quick": "yes"}


def body(text: str = "hello", failure: str | None = None, **more: Any) -> dict[str, Any]:
    asked = {} if failure is None else {"metadata": {"stand_in": failure}}
    return {"model": "m", "messages": [{"role": "user", "content": text}], **asked, **more}


def seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    began = time.monotonic()
    result = work()
    return time.monotonic() - began, result


@pytest.mark.parametrize(
    ("failure", "status", "code"),
    [
        ("hang-after=0", 504, "timeout"),
        ("hang-after=1", 504, "timeout"),
        ("drip=0.05", 504, "timeout"),
        ("reset-after=0", 502, "upstream_broken"),
        ("reset-after=1", 502, "upstream_broken"),
        ("break-after=0", 502, "upstream_broken"),
        ("send=truncated", 502, "upstream_broken"),
        ("send=garbage", 502, "upstream_broken"),
        ("send=empty", 502, "upstream_broken"),
        ("send=noise", 502, "upstream_broken"),
        ("send=short-length", 502, "upstream_broken"),
    ],
)
def test_every_failure_is_said_within_the_deadline(
    stand_in: Start, gateway: Start, failure: str, status: int, code: str
) -> None:
    teacher = stand_in(ANSWERS)
    running = gateway(teacher.url, teacher={"timeout_s": 1.0})
    took, answer = seconds(lambda: running.post(json=body(failure=failure), timeout=20))
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert answer.headers.get("x-should-retry") != "false"
    assert took < 3
    assert running.post(json=body("quick"), timeout=20).status_code == 200, "nothing is left behind"
    assert [exchange.request["messages"][0]["content"] for exchange in running.exchanges()] == ["quick"]


def test_a_stream_that_stalls_ends_by_an_error_long_before_the_deadline(
    stand_in: Start, gateway: Start
) -> None:
    teacher = stand_in(ANSWERS)
    running = gateway(teacher.url, teacher={"timeout_s": 60.0, "stall_timeout_s": 0.4})
    text = ""
    began = time.monotonic()
    with running.client() as client, pytest.raises(openai.APIError, match=r"silent for 0\.4 s"):
        for chunk in client.chat.completions.create(**body(failure="hang-after=5", stream=True)):
            text += chunk.choices[0].delta.content or ""
    assert text and text != ANSWERS["hello"]
    assert time.monotonic() - began < 10
    assert running.metric("understudy_upstream_errors_total", kind="timeout") == 1


@pytest.mark.parametrize("stream", [False, True])
def test_a_teacher_that_never_answers_is_left_alone(stand_in: Start, gateway: Start, stream: bool) -> None:
    teacher = stand_in(ANSWERS)
    running = gateway(teacher.url, teacher={"timeout_s": 0.5})

    def ask() -> None:
        answer = running.post(json=body(failure="hang-after=0", stream=stream), timeout=20)
        assert answer.status_code == 504

    crowd = [threading.Thread(target=ask) for _ in range(12)]
    for one in crowd:
        one.start()
    for one in crowd:
        one.join()
    answer = running.post(json=body("quick"), timeout=20)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "teacher_unavailable")


def test_thinking_before_the_answer_is_no_stall(stand_in: Start, gateway: Start) -> None:
    teacher = stand_in(ANSWERS)
    running = gateway(teacher.url, teacher={"timeout_s": 20.0, "stall_timeout_s": 0.1})
    answer = running.post(json=body("quick", failure="stall=0.6", stream=True), timeout=20)
    assert answer.text.endswith("data: [DONE]\n\n")


def test_a_storm_is_not_amplified(stand_in: Start, gateway: Start) -> None:
    teacher = stand_in(ANSWERS)
    running = gateway(teacher.url, teacher={"max_retries": 2})
    teacher.fail({"status": 429, "retry_after": 0})
    with httpx.Client(base_url=running.url, verify=False) as client:
        for _ in range(60):
            assert client.post("/v1/chat/completions", json=body()).status_code == 429
    assert 60 + 10 <= teacher.stats()["chat"] <= 60 + 10 + 60 // 10 + 2, "not the 180 asked for"
    assert running.metric("understudy_teacher_retries_total", outcome="over_budget") >= 50
    assert running.metric("understudy_teacher_retries_total", outcome="failed") >= 10
    teacher.fail()
    assert running.post(json=body()).status_code == 200, "429 opens no breaker"


def test_a_long_retry_after_is_the_clients_to_wait_for(stand_in: Start, gateway: Start) -> None:
    teacher = stand_in(ANSWERS)
    running = gateway(teacher.url, teacher={"max_retries": 2, "timeout_s": 600.0})
    took, answer = seconds(lambda: running.post(json=body(failure="status=429;retry-after=61")))
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "61")
    assert took < 3
    assert teacher.stats()["chat"] == 1


def test_a_teacher_that_fails_is_left_alone_and_asked_again(
    stand_in: Start, gateway: Start, eventually: Start
) -> None:
    teacher = stand_in(ANSWERS)
    running = gateway(teacher.url)
    assert running.metric("understudy_teacher_breaker", requests="chat") == 0
    teacher.fail({"status": 503})
    with httpx.Client(base_url=running.url, verify=False) as client:
        for _ in range(10):
            assert client.post("/v1/chat/completions", json=body()).json()["error"]["code"] == "scripted"
        asked = teacher.stats()["chat"]
        fast = []
        for stream in (False, True) * 10:
            began = time.monotonic()
            answer = client.post("/v1/chat/completions", json=body(stream=stream))
            fast.append(time.monotonic() - began)
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "teacher_unavailable")
            assert 1 <= int(answer.headers["retry-after"]) <= 5
            assert answer.headers["x-understudy-route"] == "teacher"
        assert teacher.stats()["chat"] == asked
        assert sorted(fast)[len(fast) // 2] < 0.1
    assert running.metric("understudy_teacher_breaker", requests="chat") == 2
    assert running.metric("understudy_upstream_errors_total", kind="unavailable") == 20
    assert running.get("/v1/models").status_code == 200, "the rest of the API has a breaker of its own"
    teacher.fail()
    with running.client(max_retries=3, timeout=30) as client:
        answer = client.chat.completions.create(**body("quick"))
    assert answer.choices[0].message.content == "yes", "OpenAI's client waits as it is told"
    eventually(lambda: running.metric("understudy_teacher_breaker", requests="chat") == 0)


def test_errors_of_the_requests_open_no_breaker(stand_in: Start, gateway: Start) -> None:
    teacher = stand_in(ANSWERS)
    running = gateway(teacher.url)
    for status in (400, 401, 404, 422, 429):
        teacher.fail({"status": status})
        for _ in range(12):
            assert running.post(json=body()).status_code == status
    teacher.fail()
    assert running.post(json=body()).status_code == 200


def test_the_breaker_can_be_taken_out(stand_in: Start, gateway: Start) -> None:
    teacher = stand_in(ANSWERS)
    running = gateway(teacher.url, teacher={"breaker": False})
    teacher.fail({"status": 503})
    for _ in range(15):
        assert running.post(json=body()).json()["error"]["code"] == "scripted"
    assert teacher.stats()["chat"] == 15


def test_more_than_the_teacher_may_have_wait_and_then_are_turned_away(
    stand_in: Start, gateway: Start
) -> None:
    teacher = stand_in({"hello": "x"}, latency_ms=300, latency_spread=0)
    running = gateway(teacher.url, teacher={"max_concurrency": 2, "timeout_s": 20.0})
    seen: list[httpx.Response] = []

    def ask() -> None:
        seen.append(running.post(json=body(), timeout=30))

    threads = [threading.Thread(target=ask) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    refused = [answer for answer in seen if answer.status_code == 429]
    assert len(seen) - len(refused) >= 2
    assert refused, "twelve don't fit into two and two waiting"
    for answer in refused:
        assert answer.json()["error"]["code"] == "overloaded"
        assert (answer.headers["retry-after"], answer.headers["x-should-retry"]) == ("1", "true")
        assert answer.headers["x-understudy-reason"] == "overloaded"
    assert running.metric("understudy_requests_total", reason="overloaded", code="429") == len(refused)
    assert running.metric("understudy_upstream_errors_total") == 0
    assert running.post(json=body(), timeout=30).status_code == 200
