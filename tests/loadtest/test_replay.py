from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest

from loadtest.command import ReplayOptions, run_replay
from loadtest.replay import order
from serving.errors import UnderstudyError
from serving.exchange import Json
from serving.failures import Failures, Rule, parse_failure
from serving.log import LogReader
from serving.recording import Recorded, read_recording
from serving.stand_in import StandIn, create_stand_in

ROOT = Path(__file__).parents[2]
PARCELS = ROOT / "examples" / "parcels.csv"


@contextlib.contextmanager
def understudy(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-m", "understudy", "replay", *arguments],
        cwd=ROOT,
        # A person's own settings must not leak into the gateway that a replay starts.
        env={**os.environ, "UNDERSTUDY_STATE_DIR": "/nowhere"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def replayed(*arguments: str) -> tuple[int, Json, str]:
    with understudy(*arguments, "--json") as process:
        output, errors = process.communicate(timeout=100)
    assert output, errors
    results: Json = orjson.loads(output)
    return process.returncode, results, errors


def test_the_order_is_the_seeds_and_repeats() -> None:
    rows = [Recorded(str(number), "a") for number in range(50)]
    assert order(rows, seed=None, limit=None) == rows
    assert (
        order(rows, seed=1, limit=None) == order(rows, seed=1, limit=None) != order(rows, seed=2, limit=None)
    )
    assert sorted(order(rows, seed=1, limit=None), key=lambda row: int(row.text)) == rows
    assert order(rows, seed=1, limit=7) == order(rows, seed=1, limit=None)[:7]


def test_a_replay_through_a_gateway_of_its_own(tmp_path: Path) -> None:
    work = tmp_path / "work"
    seed_file = tmp_path / "seed.csv"
    seed_file.write_text("text,gold\nfirst of all,customs\nsecond of all,customs\n")
    prompt = ROOT / "examples" / "system_prompt.txt"
    code, results, errors = replayed(
        str(PARCELS),
        *("--seed", "3", "--limit", "60", "--seed-file", str(seed_file), "--work", str(work)),
        *("--task", "parcels", "--system-prompt", str(prompt), "--concurrency", "2"),
    )
    assert code == 0
    rows = order(read_recording(PARCELS).rows, seed=3, limit=60)
    assert (results["requests"], results["failed"], results["interrupted"]) == (60, 0, False)
    assert results["routes"] == [{"route": "teacher", "reason": "no_release", "requests": 60, "share": 1.0}]
    assert (results["agreement"], results["teacher_share"], results["audits"]) == (1.0, 1.0, 0)
    assert results["accuracy"] == results["teacher_accuracy"] == sum(r.gold == r.teacher for r in rows) / 60
    assert results["usd_per_request"] == pytest.approx(results["teacher_usd_per_request"])
    assert 0.0004 < results["usd_per_request"] < 0.001
    assert "60/60 · teacher 60 · agreement 100.0 %" in errors

    exchanges = LogReader(work / "state").exchanges("parcels").exchanges
    texts = [exchange.request["messages"][-1]["content"] for exchange in exchanges]
    assert set(texts[:2]) == {"first of all", "second of all"}  # sent first, and not counted above
    assert sorted(texts[2:]) == sorted(row.text for row in rows)
    assert exchanges[0].request["messages"][0]["content"] == prompt.read_text().strip()
    assert exchanges[0].teacher is not None
    assert exchanges[0].teacher.choices[0]["message"]["content"] == "customs"


def test_what_learning_came_to_is_said_where_nothing_is_live() -> None:
    code, results, errors = replayed(
        str(PARCELS), "--limit", "12", "--learn-every", "10", "--task", "parcels"
    )
    assert (code, results["requests"]) == (0, 12)
    assert "parcels: no look is due" in errors


def test_failed_requests_are_counted_and_make_the_exit_code_1(serve: Callable[[StandIn], str]) -> None:
    failures = Failures((Rule(parse_failure("status=503"), every=4),))
    url = serve(create_stand_in(read_recording(PARCELS), failures=failures))
    code, results, errors = replayed(str(PARCELS), "--base-url", f"{url}/v1", "--limit", "20")
    assert code == 1
    assert (results["requests"], results["failed"]) == (20, 5)
    assert sum(results["failures"].values()) == 5
    assert next(iter(results["failures"])).startswith("503: ")
    assert results["audits"] is None  # neither a log nor metrics there
    assert "5 failed" in errors
    assert httpx.get(f"{url}/stats").json()["chat"] == 20


def test_ctrl_c_shows_what_there_is(serve: Callable[[StandIn], str]) -> None:
    url = serve(create_stand_in(read_recording(PARCELS), latency_ms=100, latency_spread=0))
    with understudy(str(PARCELS), "--base-url", f"{url}/v1") as process:
        deadline = time.monotonic() + 30
        while httpx.get(f"{url}/stats").json()["answered"] < 8:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "interrupted: this is what had come by then" in output
    assert "Where requests went" in output
    assert "Traceback" not in errors


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"file": Path("nowhere.csv")}, "nowhere.csv can't be read"),
        ({"config": Path("understudy.toml")}, "--config is of the gateway at --base-url"),
        ({"base_url": "http://127.0.0.1:9/v1", "learn_every": 5}, "--learn-every needs --config"),
        (
            {"base_url": "http://127.0.0.1:9/v1", "max_disagreement": 0.1, "latency_ms": 5.0},
            "--max-disagreement, --latency-ms: of the gateway and the teacher that a replay starts itself",
        ),
        ({"base_url": "localhost:8080"}, "must begin with http://"),
        ({"price": "cheap"}, "--price must be two numbers"),
        ({"price": "1,-1"}, "--price must be two numbers"),
        ({"max_disagreement": 1.5}, "--max-disagreement must be between 0 and 1"),
        ({"certainty": 0.0}, "--certainty must be between 0 and 1"),
        ({"answers": "silver"}, "--answers must be teacher or gold"),
        ({"system_prompt": Path("nowhere.txt")}, "--system-prompt nowhere.txt can't be read"),
        ({"work": ROOT / "examples"}, "isn't empty"),
    ],
)
def test_bad_input_is_refused_before_anything_is_sent(given: dict[str, Any], says: str) -> None:
    with pytest.raises(UnderstudyError, match=re.escape(says)) as raised:
        run_replay(ReplayOptions(**{"file": PARCELS, **given}), as_json=False)
    assert "\n" not in str(raised.value)


def test_bad_input_is_one_line_and_exit_code_2() -> None:
    with understudy("nowhere.csv") as process:
        output, errors = process.communicate(timeout=30)
    assert (process.returncode, output) == (2, "")
    assert errors == "understudy: nowhere.csv can't be read: No such file or directory\n"
