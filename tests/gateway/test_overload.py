"""More than a worker can bear: what it takes on keeps its pace, the rest is told so at once."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import httpx
import openai
import pytest

from gateway.admission import Admission
from gateway.metrics import Metrics

Start = Callable[..., Any]
LATENCY_S = 0.2


def body(text: str) -> dict[str, Any]:
    return {"model": "intents", "messages": [{"role": "user", "content": text}]}


def test_five_times_too_many_are_told_so_and_the_others_keep_their_pace(
    stand_in: Start, gateway: Start
) -> None:
    teacher = stand_in({}, default="x", latency_ms=LATENCY_S * 1000, latency_spread=0)
    running = gateway(teacher.url, server={"max_concurrency": 12}, teacher={"timeout_s": 20.0})
    seen: list[httpx.Response] = []

    async def overload() -> None:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(verify=False, limits=limits, timeout=30) as client:

            async def one(name: int) -> None:
                for number in range(3):
                    asked = body(f"{name} {number}")
                    answer = await client.post(f"{running.url}/v1/chat/completions", json=asked)
                    seen.append(answer)

            await asyncio.gather(*(one(name) for name in range(60)))

    asyncio.run(overload())
    refused = [answer for answer in seen if answer.status_code == 429]
    assert {answer.status_code for answer in seen} == {200, 429}
    assert len(refused) > 30  # more, the faster the clients get to ask
    for answer in refused:
        assert answer.json()["error"]["code"] == "overloaded"
        assert answer.json()["error"]["type"] == "rate_limit_error"
        assert (answer.headers["retry-after"], answer.headers["x-should-retry"]) == ("1", "true")
        assert answer.headers["x-request-id"]
    assert running.metric("understudy_requests_total", reason="overloaded", code="429") == len(refused)
    accepted = running.metric("understudy_request_duration_seconds_sum", route="teacher")
    count = running.metric("understudy_request_duration_seconds_count", route="teacher")
    assert count >= 9
    # Nine are at the teacher at most and none waits; the rest is for a busy machine.
    assert accepted / count < LATENCY_S + 1.5
    assert running.post(json=body("again"), timeout=30).status_code == 200, "it is over at once"


def test_openais_client_gets_through_by_itself(stand_in: Start, gateway: Start) -> None:
    teacher = stand_in({}, default="x", latency_ms=100, latency_spread=0)
    running = gateway(teacher.url, server={"max_concurrency": 4}, teacher={"timeout_s": 20.0})

    async def ask() -> list[str | None]:
        async with openai.AsyncOpenAI(
            base_url=f"{running.url}/v1", api_key="k", max_retries=8, timeout=60
        ) as client:
            answers = await asyncio.gather(
                *(client.chat.completions.create(**body(f"{n}")) for n in range(12))
            )
        return [answer.choices[0].message.content for answer in answers]

    assert asyncio.run(ask()) == ["x"] * 12
    assert running.metric("understudy_requests_total", reason="overloaded") > 0


def test_a_slow_teacher_holds_up_no_student(
    stand_in: Start, gateway: Start, publish: Start, tmp_path: Any, eventually: Start
) -> None:
    publish(
        tmp_path / "state", "intents", {"parcel lost": "lost", "parcel late": "late", "refund now": "cancel"}
    )
    teacher = stand_in({}, default="x", latency_ms=60_000, latency_spread=0)
    running = gateway(
        teacher.url,
        server={"max_concurrency": 10},
        teacher={"timeout_s": 60.0, "max_concurrency": 4},
        task=[{"name": "intents", "match": {"model": "intents"}, "audit_rate": 1e-9}],
    )

    async def fill() -> None:
        async with httpx.AsyncClient(verify=False, timeout=60) as client:
            url = f"{running.url}/v1/chat/completions"
            waiting = [asyncio.create_task(client.post(url, json=body(f"slow {n}"))) for n in range(10)]
            # Four are at the teacher, four wait for it, two have been turned away.
            await asyncio.wait(waiting[:9], return_when=asyncio.FIRST_COMPLETED, timeout=10)
            for _ in range(5):
                answer = await client.post(url, json=body("parcel lost"))
                assert answer.headers["x-understudy-route"] == "student"
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)

    asyncio.run(asyncio.wait_for(fill(), 30))
    eventually(lambda: running.metric("understudy_requests_total", code="499") == 8)


def test_a_body_that_doesnt_fit_is_turned_away_unread(stand_in: Start, gateway: Start) -> None:
    teacher = stand_in({}, default="x", latency_ms=400, latency_spread=0)
    running = gateway(
        teacher.url,
        server={"max_held_bytes": 100_000, "max_body_bytes": 90_000},
        teacher={"timeout_s": 20.0},
    )
    address = urlsplit(running.url)
    place = (address.hostname or "", address.port or 0)
    head = "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\n"
    with (
        socket.create_connection(place, timeout=10) as slow,
        socket.create_connection(place, timeout=10) as next_one,
    ):
        slow.sendall(f"{head}content-length: 80000\r\n\r\n{{".encode())
        deadline = time.monotonic() + 10
        refused = b""
        while b" 429 " not in refused:
            assert time.monotonic() < deadline
            next_one.sendall(f"{head}content-length: 30000\r\n\r\n".encode() + b"x" * 30000)
            refused = next_one.recv(65536)
        assert b"server.max_held_bytes" in refused
        assert b"connection: close" not in refused
        next_one.sendall(f"{head}transfer-encoding: chunked\r\n\r\n".encode())
        endless = next_one.recv(65536)
        assert b" 429 " in endless and b"connection: close" in endless, "as long as the longest"
        small = running.post(json=body("slow"), timeout=20)
        assert small.status_code == 200
    assert running.post(json=body("slow"), timeout=20).status_code == 200


@pytest.mark.parametrize("size", [0, 10, 5000])
def test_places_are_given_back(size: int) -> None:
    admission = Admission(Metrics(), max_requests=3, max_bytes=1000)
    for _ in range(50):
        taken = 0
        while admission.enter(size) is None:
            taken += 1
        assert taken == (1 if size > 1000 else 3)
        for _ in range(taken):
            admission.leave(size)


def test_who_has_no_key_takes_up_no_room(stand_in: Start, gateway: Start) -> None:
    """What is refused is read on for a moment, so that its client sees why; it isn't held meanwhile."""
    running = gateway(
        stand_in({}, default="x").url,
        server={"api_keys": ["right"], "max_held_bytes": 100_000, "max_concurrency": 4},
    )
    address = urlsplit(running.url)
    with contextlib.ExitStack() as stack:
        for _ in range(4):
            stranger = stack.enter_context(
                socket.create_connection((address.hostname or "", address.port or 0), timeout=10)
            )
            stranger.sendall(
                b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer wrong\r\n"
                b"content-length: 90000\r\n\r\n{"
            )
            assert b" 401 " in stranger.recv(65536)
        answer = running.post(json=body("hello"), headers={"authorization": "Bearer right"}, timeout=20)
        assert answer.status_code == 200, answer.text
