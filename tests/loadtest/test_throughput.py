"""The benchmark of the gateway's throughput, small: every way it measures is the way it says."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from loadtest.demo import example
from loadtest.throughput.__main__ import Row, measure
from loadtest.throughput.hammer import fire
from loadtest.throughput.scene import BARE, SCENARIOS, Script, bare, gateway, teacher
from serving.recording import read_recording

ROWS = read_recording(example("parcels.csv")).rows


def test_requests_take_the_ways_that_are_measured(tmp_path: Path) -> None:
    core = min(os.sched_getaffinity(0))
    with teacher() as url, gateway("this", tmp_path, url, ROWS, checkout=None, core=core) as running:
        rows = [Row(running, scenario) for scenario in SCENARIOS]
        asyncio.run(measure(rows, Script(ROWS), rounds=1, requests=40))
        assert os.sched_getaffinity(running.pid) == {core}
    assert [row.odd for row in rows] == [0] * len(rows)
    assert all(len(volley.latencies) == 40 for row in rows for volley in row.together)


def test_an_answer_that_took_another_way_is_odd(tmp_path: Path) -> None:
    with bare(tmp_path, core=min(os.sched_getaffinity(0))) as running:
        requests = Script(ROWS).requests(BARE, running.port, 10)
        assert len(set(requests)) == 10
        assert asyncio.run(fire(running.port, requests, BARE.expected, connections=3)).odd == 0
        assert asyncio.run(fire(running.port, requests, SCENARIOS[0].expected, connections=3)).odd == 10


def test_a_server_that_goes_is_an_error(tmp_path: Path) -> None:
    with bare(tmp_path, core=min(os.sched_getaffinity(0))) as running:
        requests = Script(ROWS).requests(BARE, running.port, 1)
    with pytest.raises(ConnectionError):
        asyncio.run(fire(running.port, requests, BARE.expected, connections=1))
