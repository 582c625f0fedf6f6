from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gateway import names

Start = Callable[..., Any]
BODY = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}


def test_every_metric_is_there_under_its_name(stand_in: Start, gateway: Start) -> None:
    running = gateway(stand_in({"hello": "x"}).url)
    text = running.get("/metrics").text
    exposed = {match + ("_total" if kind == "counter" else "") for match, kind in _types(text)}
    declared = {value for key, value in vars(names).items() if key.startswith("METRIC_")}
    assert {name.replace("_total_total", "_total") for name in exposed} == declared


def _types(text: str) -> list[tuple[str, str]]:
    found = re.findall(r"^# TYPE (\S+) (counter|gauge|histogram)$", text, re.M)
    return [(name, kind) for name, kind in found if not name.endswith("_created")]


def test_a_client_cant_create_a_series(stand_in: Start, gateway: Start) -> None:
    running = gateway(stand_in({"hello": "x"}).url, server={"max_tasks": 3})
    for number in [*range(10)] * 3:
        system = {"role": "system", "content": f"prompt {chr(97 + number) * 4}"}
        headers = {"x-understudy-task": f"mine-{number}", "x-understudy-route": "teacher"}
        running.post(json={**BODY, "messages": [system, *BODY["messages"]]}, headers=headers)
        running.post(f"/v1/made/up/{number}", json={})
        running.get(f"/made/up/{number}")
    text = running.get("/metrics").text
    assert set(re.findall(r'task="([^"]*)"', text)) - {"", "other"} == set(
        re.findall(r'task="(auto-[0-9a-f]{12})"', text)
    )
    assert len(set(re.findall(r'task="(auto-[^"]*)"', text))) == 3
    assert "made/up" not in text
    assert "mine" not in text


def test_the_keeper_says_when_it_came_round(stand_in: Start, gateway: Start, eventually: Start) -> None:
    began = time.time()
    running = gateway(stand_in({}).url)
    eventually(lambda: running.metric("understudy_keeper_round_timestamp_seconds") >= began)


def test_a_task_with_a_release_says_what_it_promises(
    stand_in: Start, gateway: Start, publish: Start, tmp_path: Path
) -> None:
    publish(tmp_path / "state", "small", {"parcel lost": "lost", "parcel late": "late"})
    running = gateway(stand_in({}).url, task=[{"name": "small", "max_disagreement": 0.07}])
    assert running.metric("understudy_max_disagreement", task="small") == 0.07


def test_a_run_of_learning_is_counted(
    stand_in: Start, gateway: Start, write_log: Start, exchanges: Start
) -> None:
    write_log(exchanges([("a parcel", "lost")] * 3))
    running = gateway(stand_in({}).url, learning={"interval_s": 0.1})
    # A process of its own, which a busy machine starts slowly.
    deadline = time.monotonic() + 60
    while running.metric("understudy_learning_runs_total", outcome="ended") < 1:
        assert time.monotonic() < deadline, "it never ended"
        time.sleep(0.1)


def test_time_tokens_and_money_are_counted(stand_in: Start, gateway: Start) -> None:
    running = gateway(stand_in({"hello": "x"}, latency_ms=100, latency_spread=0).url)
    answer = running.post(json=BODY)
    running.post(json={**BODY, "stream": True})
    usage = answer.json()["usage"]
    assert running.metric("understudy_tokens_total", kind="input") == 2 * usage["prompt_tokens"]
    assert running.metric("understudy_tokens_total", kind="output") == 2 * usage["completion_tokens"]
    cost = float(answer.headers["x-understudy-cost-usd"])
    assert abs(running.metric("understudy_cost_usd_total", route="teacher") - 2 * cost) < 1e-9
    assert running.metric("understudy_request_cost_usd_count") == 2
    assert running.metric("understudy_request_duration_seconds_sum", route="teacher") >= 0.2
    assert running.metric("understudy_time_to_first_token_seconds_count") == 1
    assert running.metric("understudy_overhead_seconds_count") == 2
    assert running.metric("understudy_overhead_seconds_sum") < 0.1
