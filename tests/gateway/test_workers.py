"""`serve --workers N`: dying workers, keepers and supervisors, and the metrics of them all."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

Start = Callable[..., Any]
BODY = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}


def config(teacher: str, more: str = "") -> str:
    return f'''
state_dir = "here"
learning.interval_s = 0
[server]
workers = 2
{more}
[teacher]
base_url = "{teacher}/v1"
'''


def starts(running: Any, count: int, within_s: float = 30) -> None:
    """Wait until so many workers have started to serve."""
    deadline = time.monotonic() + within_s
    while len(re.findall("worker [0-9]+ serves", running.stderr)) < count:
        assert time.monotonic() < deadline, running.stderr
        time.sleep(0.02)


def ask(url: str, times: int) -> None:
    for _ in range(times):
        # A connection each, so that the kernel hands them to both workers.
        assert httpx.post(f"{url}/v1/chat/completions", json=BODY, verify=False).status_code == 200


def test_a_worker_that_is_killed_is_replaced_and_what_it_counted_stays(
    serving: Start, stand_in: Start, tmp_path: Path
) -> None:
    # As a person may have set it, with what an earlier run left there.
    shared = tmp_path / "metrics"
    shared.mkdir()
    (shared / "counter_0.db").write_bytes(b"rubbish")
    running = serving(config(stand_in({"hello": "x"}).url), env={"PROMETHEUS_MULTIPROC_DIR": str(shared)})
    asked = 0
    for kills, number in enumerate((signal.SIGKILL, signal.SIGRTMIN + 6)):
        starts(running, 2 + kills)
        ask(running.url, 10)
        asked += 10
        for _ in range(3):
            assert running.metric("understudy_requests_total") == asked
        os.kill(running.workers()[0], number)
        starts(running, 3 + kills)
        for _ in range(3):
            assert running.metric("understudy_requests_total") == asked
    files = [path.name for path in shared.glob("understudy-metrics-*/*.db")]
    assert {name.rpartition("_")[2] for name in files} <= {"0.db", "1.db"}, (
        "a file for each place, not process"
    )
    for cause in ("SIGKILL", f"signal {signal.SIGRTMIN + 6}"):
        assert running.stderr.count(f"has ended ({cause}) and is replaced") == 1
    running.child.send_signal(signal.SIGTERM)
    assert running.child.wait(timeout=20) == 0
    assert [path.name for path in shared.iterdir()] == ["counter_0.db"], "what isn't ours is left alone"


def test_a_killed_worker_is_soon_replaced_and_so_is_a_keeper(
    serving: Start, stand_in: Start, eventually: Start
) -> None:
    running = serving(config(stand_in({"hello": "x"}).url))
    keeper = r"this process \(([0-9]+)\) is the keeper"
    starts(running, 2)
    eventually(lambda: re.search(keeper, running.stderr) is not None)
    (first,) = re.findall(keeper, running.stderr)
    os.kill(int(first), signal.SIGKILL)
    killed = time.monotonic()
    eventually(lambda: len(re.findall(keeper, running.stderr)) == 2)
    assert time.monotonic() - killed < 5
    ask(running.url, 4)
    starts(running, 3)
    ask(running.url, 4)


def test_a_worker_that_is_told_to_stop_does_and_is_replaced(
    serving: Start, stand_in: Start, eventually: Start
) -> None:
    running = serving(config(stand_in({"hello": "x"}).url))
    starts(running, 2)
    os.kill(running.workers()[1], signal.SIGTERM)
    eventually(lambda: "has ended (exit code 0) and is replaced" in running.stderr)
    ask(running.url, 4)
    # To the whole group, as Ctrl-C and systemd do it: workers leave it to their supervisor.
    starts(running, 3)
    for pid in [running.child.pid, *running.workers()]:
        os.kill(pid, signal.SIGINT)
    assert running.child.wait(timeout=20) == 0


@pytest.mark.parametrize("workers", [1, 2])
def test_a_gateway_whose_workers_cant_start_ends(
    serving: Start, stand_in: Start, tmp_path: Path, workers: int
) -> None:
    # What is wrong shows only in the worker: a log folder that a file stands in the way of.
    (tmp_path / "here" / "tasks").mkdir(parents=True)
    (tmp_path / "here" / "keeper.lock").mkdir()
    (tmp_path / "sitecustomize.py").write_text(
        "import prometheus_client\n\n"
        "def fail(*_, **__):\n    raise OSError('no metrics today')\n\n"
        "prometheus_client.CollectorRegistry.register = fail\n"
    )
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])])
    running = serving(
        config(stand_in({}).url), "--workers", str(workers), env={"PYTHONPATH": path}, wait=False
    )
    assert running.child.wait(timeout=30) == 3
    assert "no metrics today" in running.stderr
