from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from loadtest.processes import cpu_seconds
from loadtest.routing.cost import (
    NothingToMeasure,
    Spent,
    decisions,
    decisions_table,
    gateway,
    gateway_table,
    hinges,
    learned,
)
from routers.simulator import Message
from serving.recording import read_recording

PARCELS = Path(__file__).parents[2] / "examples" / "parcels.csv"


def test_cpu_seconds_are_what_a_process_burns() -> None:
    program = "import time\nwhile time.process_time() < 0.3: pass\nprint(1, flush=True)\ninput()"
    child = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()
    assert 0.27 <= cpu_seconds(child.pid) < 5  # counted in ticks of 10 ms
    child.communicate(b"\n")
    with pytest.raises(ProcessLookupError, match=str(child.pid)):
        cpu_seconds(child.pid)


def test_what_decides_is_timed_and_a_gateway_goes_through_every_state() -> None:
    messages = [Message(row.text, row.teacher or "", row.gold) for row in read_recording(PARCELS).rows]
    release = learned(messages)
    texts = [message.text for message in messages[:30]]
    steps = decisions(release, texts, 200)
    assert len(steps) == 7 and all(seconds > 0 for seconds in steps.values())
    assert decisions_table(steps).row_count == 7

    began = time.monotonic()
    spent = gateway(PARCELS, release, texts, 60)
    assert len(spent) == 3
    for one in spent.values():
        assert one.rate > 0 and 0 < one.p50_s < time.monotonic() - began
        assert one.cpu_s >= 0
    assert gateway_table({"a": Spent(0.001, 100.0, 0.01)}, 60).row_count == 1


def test_a_stream_without_a_release_is_refused_by_name() -> None:
    with pytest.raises(NothingToMeasure, match="20 messages gave no release"):
        learned([Message(str(number), str(number)) for number in range(20)])


def test_the_timed_confidence_asks_every_signal() -> None:
    confidence = hinges({"a": 1.0, "b": 2.0})
    assert confidence.rank(1.0, {"a": 1.0, "b": 2.0}) == pytest.approx(0.5 + 0.1 * 4.0)
    assert confidence.rank(1.0, {"a": 1.0}) == float("-inf")
