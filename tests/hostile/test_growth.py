"""However many tasks, models, tenants, keys and ids clients make up: no unbounded memory, no series of theirs."""

from __future__ import annotations

import http.client
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sized
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from gateway.app import Gateway, create_app
from gateway.attempts import Attempts
from gateway.auth import Gate
from gateway.metrics import Metrics
from gateway.tasks import Tasks
from serving.settings import Settings

Start = Callable[..., Any]
MADE_UP = 12_000
MAX_TASKS = 20
OURS = ("gateway", "routers", "serving")


def letters(number: int) -> str:
    return "".join(chr(97 + int(digit)) for digit in str(number))


def made_up(number: int) -> tuple[bytes, dict[str, str]]:
    """A request like no other: prompt, model, tenant, ids. The teacher refuses every third."""
    name = letters(number)
    body = {
        "model": f"model-{name}",
        "messages": [
            {"role": "system", "content": f"You serve {name}. " * 100},
            {"role": "user", "content": name},
        ],
        "user": name,
        "metadata": {name: name, "stand_in": "status=404" if number % 3 == 0 else "stall=0"},
    }
    headers = {
        "content-type": "application/json",
        "authorization": f"Bearer key-{name}",
        "x-request-id": f"id-{name}",
        "x-understudy-task": name,
        "x-understudy-route": "teacher" if number % 2 else f"route-{name}" if number % 20 == 0 else "teacher",
        "x-stainless-retry-count": str(number),
    }
    return json.dumps(body).encode(), headers


def send(url: str, numbers: range) -> None:
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=20)
    for number in numbers:
        body, headers = made_up(number)
        connection.request("POST", "/v1/chat/completions", body, headers)
        response = connection.getresponse()
        response.read()
        assert response.status in (200, 400, 404), response.status
        if number % 10 == 0:
            connection.request("GET", f"/v1/made-up/{number}?{number}", headers=headers)
            connection.getresponse().read()
    connection.close()


def series(url: str) -> set[str]:
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=20)
    connection.request("GET", "/metrics")
    lines = connection.getresponse().read().decode().splitlines()
    connection.close()
    return {line.rpartition(" ")[0] for line in lines if not line.startswith("#")}


def containers(part: object, path: str, seen: set[int]) -> Iterator[tuple[str, Sized]]:
    """Everything with a size that hangs on a part of ours, by the way that leads to it."""
    if id(part) in seen:
        return
    seen.add(id(part))
    if isinstance(part, dict | list | set | tuple):
        yield path, part
        return
    if not type(part).__module__.startswith(OURS):
        return
    names = list(getattr(part, "__dict__", ())) + [
        n for c in type(part).__mro__ for n in getattr(c, "__slots__", ())
    ]
    for name in names:
        yield from containers(getattr(part, name), f"{type(part).__name__}.{name}", seen)


# Each of these grows up to a bound of its own, which the tests below send it past.
BOUNDED = {"Attempts._latest", "Tasks._answers"}


def test_nothing_else_grows(
    stand_in: Start, serve: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEACHER_KEY", "k")
    teacher = {
        "base_url": f"{stand_in({}, default='x').url}/v1",
        "api_key_env": "TEACHER_KEY",
        "max_retries": 0,
    }
    settings = Settings(
        state_dir=tmp_path / "state",
        teacher=teacher,
        log={"durability": "relaxed"},
        learning={"interval_s": 0},
        server={"max_tasks": MAX_TASKS},
    )
    app: Gateway = create_app(settings)
    url = serve(app)
    send(url, range(50))
    before = {path: len(held) for path, held in containers(app, "", set())}
    assert {"Attempts._latest", "Tasks._discovered", "Metrics._request_series"} <= set(before)
    send(url, range(50, 2050))
    grown = {path: len(held) - before.get(path, 0) for path, held in containers(app, "", set())}
    assert {path for path, by in grown.items() if by > 200} <= BOUNDED, grown


def test_attempts_forget() -> None:
    attempts = Attempts()
    keys = [Attempts.key(f"tenant-{number}", b"body") for number in range(MADE_UP)]
    for key in keys:
        attempts.remember(key, "id", coin=False, audit_rate=0.0)
    assert sum(attempts.earlier(key) is not None for key in keys) == 10_000
    assert attempts.earlier(keys[-1]) is not None


def test_the_gate_forgets_keys() -> None:
    gate = Gate([], None)
    callers = [gate.admit(f"Bearer key-{number}") for number in range(MADE_UP)]
    for caller in callers:
        gate.teacher_accepted(caller)
    assert sum(gate.verified(caller) for caller in callers) == 10_000
    assert gate.verified(callers[-1])


def test_newcomers_are_forgotten() -> None:
    tasks = Tasks(Settings(server={"max_tasks": 1}, task=[{"name": "named"}]), lambda: [])
    for number in range(MADE_UP):
        request = {"model": f"model-{number}", "messages": [{"role": "user", "content": "hello"}]}
        task, newcomer = tasks.find(request, f"task-{number}")
        assert newcomer is not None and tasks.confirm(newcomer) == task == "other"
        tasks.policy(task)
        tasks.comparison(task)
    assert {path: len(held) for path, held in containers(tasks, "", set()) if len(held) > 100} == {
        "Tasks._answers": 10_000
    }


def test_no_label_comes_from_a_client() -> None:
    tasks = Tasks(Settings(server={"max_tasks": MAX_TASKS}), lambda: [])
    metrics = Metrics()
    for number in range(MADE_UP):
        request = {"model": f"model-{number}", "messages": [{"role": "user", "content": "hello"}]}
        task, newcomer = tasks.find(request, None)
        task = task if newcomer is None else tasks.confirm(newcomer)
        metrics.record_request(task, "teacher", "no_release", 200, 0.1)
        metrics.record_first_token(task, "teacher", 0.1)
        metrics.record_spending(task, "teacher", 0.1, None)
        metrics.record_tokens(
            task, "teacher", {f"kind-{number}": 1, "prompt_tokens": 1, "completion_tokens": 1}
        )
        metrics.record_logged(task)
    lines = metrics.exposition().decode().splitlines()
    assert len(lines) < 100 * (MAX_TASKS + 1)
    assert "kind-" not in "".join(lines)


def test_a_gateway_keeps_its_size(stand_in: Start, tmp_path: Path, eventually: Start) -> None:
    """Its resident memory after 500 made-up requests, and after 2,000 more of them: 8 kB each would be seen."""
    config = tmp_path / "understudy.toml"
    config.write_text(f"""
        state_dir = "{tmp_path / "state"}"
        [server]
        port = 0
        max_tasks = {MAX_TASKS}
        [teacher]
        base_url = "{stand_in({}, default="x").url}/v1"
        max_retries = 0
        [log]
        durability = "relaxed"
        [learning]
        interval_s = 0
        """)
    command = [sys.executable, "-m", "understudy", "serve", "--config", str(config)]
    output = (tmp_path / "output").open("w+")
    with subprocess.Popen(
        command, stdout=output, stderr=output, env=os.environ | {"OPENAI_API_KEY": "k"}
    ) as child:
        try:
            eventually(lambda: "http://" in (tmp_path / "output").read_text())
            said = (tmp_path / "output").read_text()
            url = next(word.strip(",") for word in said.split() if word.startswith("http://127.0.0.1"))
            send(url, range(500))
            first, size = series(url), _resident(child.pid)
            send(url, range(500, 2500))
            grown = _resident(child.pid) - size
            print(f"{grown / 1024:.1f} MiB more after 2,000 made-up requests")
            assert series(url) == first, "2,000 more made-up names are no new series"
            assert not any("model-" in name or "made-up" in name or "id-" in name for name in first)
            assert grown < 2000 * 8
        finally:
            child.terminate()
            child.wait(20)
            output.close()


def _resident(pid: int) -> int:
    """Kilobytes."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmRSS:")).split()[1])
