from __future__ import annotations

import json
import logging
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from gateway.log_format import FIELDS
from serving.failures import Failure, Failures, Rule

Start = Callable[..., Any]
Wait = Callable[[Callable[[], bool]], None]
ROOT = Path(__file__).parents[2]
SECRET = "sk-of-the-client"
BODY = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}
HEADERS = {"authorization": f"Bearer {SECRET}"}
ALL = {"access_log_sample": 1.0}


def test_a_model_without_a_price_is_told_once(
    stand_in: Start, gateway: Start, caplog: pytest.LogCaptureFixture
) -> None:
    running = gateway(
        stand_in({"hello": "x"}, model="house-7b").url,
        teacher={"price": None},
        observe={"access_log_sample": 0.0},
    )
    for _ in range(3):
        assert "x-understudy-cost-usd" not in running.post(json=BODY).headers
    told = [record.getMessage() for record in caplog.records if record.name == "understudy.log"]
    assert told == [
        "no price is known for model 'house-7b': costs and savings are without it; set teacher.price"
    ]


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Callable[[], list[dict[str, Any]]]:
    """The fields of the lines written so far."""
    caplog.set_level(logging.INFO, "understudy")

    def written() -> list[dict[str, Any]]:
        return [
            {"level": record.levelname, **record.__dict__[FIELDS]}
            for record in caplog.records
            if record.name == "understudy.access"
        ]

    return written


def test_a_line_says_who_answered_and_what_it_cost(
    stand_in: Start, gateway: Start, lines: Start, eventually: Wait
) -> None:
    running = gateway(stand_in({"hello": "x"}).url, observe=ALL)
    answer = running.post(json=BODY, headers={**HEADERS, "x-request-id": "mine-1"})
    running.post(json={**BODY, "stream": True}, headers=HEADERS)
    eventually(lambda: len(lines()) == 2)
    line, streamed = lines()
    (exchange, _) = running.exchanges()
    assert line["request_id"] == exchange.request_id == answer.headers["x-request-id"] == "mine-1"
    assert line["cost_usd"] == pytest.approx(float(answer.headers["x-understudy-cost-usd"]))
    assert line["duration_ms"] >= line["overhead_ms"] > 0
    usage = answer.json()["usage"]
    assert line["input_tokens"] == usage["prompt_tokens"]
    assert line["output_tokens"] == usage["completion_tokens"]
    assert {key: line[key] for key in ("level", "method", "path", "status", "model", "stream")} == {
        "level": "INFO",
        "method": "POST",
        "path": "/v1/chat/completions",
        "status": 200,
        "model": "m",
        "stream": False,
    }
    assert (line["task"], line["route"], line["reason"]) == (exchange.task, "teacher", "no_release")
    assert line["tenant"] == exchange.tenant
    assert streamed["stream"] is True
    assert streamed["request_id"].startswith("req_")


def test_what_failed_is_always_said_and_the_rest_as_often_as_wanted(
    stand_in: Start, gateway: Start, lines: Start, eventually: Wait
) -> None:
    teacher = stand_in({"hello": "x"}, failures=Failures((Rule(Failure(status=503, times=1)),)))
    running = gateway(teacher.url)
    assert running.post(json=BODY).status_code == 503
    assert running.post(json=BODY).status_code == 200
    assert running.post(content=b"{").status_code == 400
    eventually(lambda: len(lines()) == 1)
    (line,) = lines()
    assert (line["level"], line["status"]) == ("WARNING", 503)
    assert line["failure"] == "the teacher answered with status 503"


def test_a_client_that_hung_up_is_said(
    stand_in: Start, gateway: Start, lines: Start, eventually: Wait
) -> None:
    running = gateway(stand_in({"hello": "x"}, latency_ms=3000, latency_spread=0).url, observe=ALL)
    with pytest.raises(httpx.ReadTimeout):
        running.post(json=BODY, timeout=0.3)
    eventually(lambda: len(lines()) == 1)
    (line,) = lines()
    assert line["status"] == 499
    assert line["client_gone"] is True
    assert line["task"], "what was known of it by then"


def test_an_exchange_that_is_lost_is_always_said(
    stand_in: Start, gateway: Start, lines: Start, eventually: Wait
) -> None:
    running = gateway(stand_in({"hello": "x"}).url)
    tasks = running.state_dir / "tasks"
    tasks.rmdir()
    tasks.write_text("not a folder any more")
    assert running.post(json=BODY).status_code == 200
    eventually(lambda: len(lines()) == 1)
    assert lines()[0]["lost"] is True


def test_other_paths_have_a_line_and_the_teacher_the_same_id(
    serve: Start, gateway: Start, lines: Start, eventually: Wait
) -> None:
    seen: list[dict[str, str]] = []

    async def teacher(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            seen.append({name.decode(): value.decode() for name, value in scope["headers"]})
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"{}"})

    running = gateway(serve(teacher), observe=ALL)
    ids = [
        running.get("/v1/models?key=secret-in-a-query", headers=headers).headers["x-request-id"]
        for headers in ({}, {"x-request-id": "mine-2"}, {"x-request-id": "has spaces in it"})
    ]
    eventually(lambda: len(lines()) == 3)
    assert [line["request_id"] for line in lines()] == ids
    assert [headers["x-request-id"] for headers in seen] == ids
    assert ids[1] == "mine-2"
    assert ids[2].startswith("req_"), "one that can't stand in a log is replaced, upstream too"
    assert {line["path"] for line in lines()} == {"/v1/models"}


# The whole process


def test_every_line_of_a_real_server_is_json(
    serving: Start, stand_in: Start, write_log: Start, exchanges: Start
) -> None:
    write_log(exchanges([("a parcel", "lost")] * 3))
    rules = Rule(Failure(status=500), text="a fault"), Rule(Failure(break_after=1), text="a break")
    teacher = stand_in({"hello": "x", "a break": "y"}, failures=Failures(rules))
    running = serving(
        f"""
        [observe]
        log_format = "json"
        access_log_sample = 1.0
        [server]
        workers = 2
        [learning]
        interval_s = 0.2
        [teacher]
        base_url = "{teacher.url}/v1"
        timeout_s = 5
        max_retries = 0
        """,
    )
    for text in ("hello", "a fault", "a break"):
        for stream in (False, True):
            body = {**BODY, "messages": [{"role": "user", "content": text}], "stream": stream}
            httpx.post(f"{running.url}/v1/chat/completions", json=body, headers=HEADERS)
    httpx.get(f"{running.url}/v1/models", headers=HEADERS)

    def entries() -> list[dict[str, Any]]:
        # The last line may be half written.
        return [json.loads(line) for line in running.stderr.split("\n")[:-1]]

    # A process of its own, which a busy machine starts slowly.
    deadline = time.monotonic() + 60
    while not any(entry["message"].startswith("learn: ") for entry in entries()):
        assert time.monotonic() < deadline, "nothing was learned"
        time.sleep(0.1)
    running.child.send_signal(signal.SIGTERM)
    running.child.wait(timeout=30)
    written = entries()
    assert all({"time", "level", "logger", "message"} <= set(entry) for entry in written)
    requests = [entry for entry in written if entry["logger"] == "understudy.access"]
    assert len({entry["request_id"] for entry in requests}) == len(requests) == 7, "one line a request"
    text = running.stderr
    assert SECRET not in text
    assert "a fault" not in text, "never content"
