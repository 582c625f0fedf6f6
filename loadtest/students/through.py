"""The same student through a real gateway on one core, with the load on the others."""

from __future__ import annotations

import itertools
import statistics
import urllib.request
from collections.abc import Sequence
from pathlib import Path

import orjson
import uvloop

from loadtest.processes import pinned
from loadtest.stack import start_gateway
from loadtest.students.candidates import Means
from loadtest.students.lesson import Learned, configuration
from loadtest.students.outcome import Through
from loadtest.students.split import TASK, TEACHER
from loadtest.throughput.hammer import Volley, fire
from loadtest.throughput.scene import teacher
from serving.exchange import Json

_ROUNDS = 3
_CONNECTIONS = 64
"""As many as `make bench-gateway` has: fewer wait for the disk together, and leave the core idle meanwhile."""
_WAIT_S = 2.0
"""A slow student has fewer: who comes last waits so long, and none of its 5 s of patience end."""
_FEWEST, _MOST = 48, 20_000
_DEVICE = "understudy_student_device_seconds_total"
_ANSWERS = "understudy_student_answers_total"


def through_a_gateway(
    learned: Learned,
    choice: Json,
    means: Means,
    work: Path,
    requests: Sequence[Json],
    *,
    expected_per_s: float,
    seconds: float,
    usd_per_hour: float,
) -> Through:
    """Fire for about three times `seconds`, by what the student alone does; the middle of three rounds counts.

    Raises what a gateway that doesn't start, takes more than a minute, or loses a connection, raises.
    """
    count = max(_FEWEST, min(_MOST, round(expected_per_s * seconds)))
    connections = max(1, min(_CONNECTIONS, round(expected_per_s * _WAIT_S)))
    with teacher(TEACHER) as teacher_url:  # one by another name would suspend the release
        config = work / "gateway.toml"
        config.write_text(configuration(learned.state_dir, choice, means, teacher_url), encoding="utf-8")
        with pinned(means.core):
            child, base_url = start_gateway(config, work / "gateway.log")
        try:
            port = int(base_url.rpartition(":")[2].partition("/")[0])
            bodies = itertools.cycle([orjson.dumps(request) for request in requests])
            volleys = uvloop.run(_volleys(port, bodies, count, connections))
            took = _metric(port, _DEVICE) / max(1.0, _metric(port, _ANSWERS))
            child.check()
        finally:
            child.stop()
    return Through(
        per_s=statistics.median(count / volley.seconds for volley in volleys),
        p50_s=statistics.median(volley.quantile(0.5) for volley in volleys),
        device_s=took,
        usd_per_1000=1000 * took * usd_per_hour / 3600,
        others=sum(volley.odd for volley in volleys) / (count * _ROUNDS),
    )


async def _volleys(port: int, bodies: itertools.cycle[bytes], count: int, connections: int) -> list[Volley]:
    head = (
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1:%d\r\ncontent-type: application/json\r\n"
        b"authorization: Bearer unused\r\naccept: application/json\r\ncontent-length: %d\r\n\r\n"
    )

    def some(count: int) -> list[bytes]:
        return [head % (port, len(body)) + body for body in itertools.islice(bodies, count)]

    await fire(port, some(min(count, 200)), b" 200 ", connections=connections)  # a warm-up
    return [
        await fire(port, some(count), b" 200 ,route: student", connections=connections)
        for _ in range(_ROUNDS)
    ]


def _metric(port: int, name: str) -> float:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(f'{name}{{task="{TASK}"'))
