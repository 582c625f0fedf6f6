"""Several gateways before one Redis: what one was told the others know, and one asks for all of them."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from serving.failures import Failure, Failures, Rule

Start = Callable[..., Any]
TEXT = "parcel lost"
BODY: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": TEXT}], "temperature": 0}
STREAMED = {**BODY, "stream": True}


@pytest.fixture
def replicas(stand_in: Start, gateway: Start, redis: Start) -> Start:
    """Start two gateways that share a Redis; gives them, their teacher and the Redis."""

    def start(*, failures: Failures | None = None, latency_ms: float = 0, **cache: Any) -> Any:
        teacher = stand_in({TEXT: "lost"}, latency_ms=latency_ms, latency_spread=0.0, failures=failures)
        shared = redis()
        given = {"url": shared.url, "single_flight": "replicas", **cache}
        return [gateway(teacher.url, cache=given) for _ in range(2)], teacher, shared

    return start


def told(answer: httpx.Response) -> str:
    assert answer.status_code == 200
    assert "lost" in answer.text
    return answer.headers["x-understudy-reason"]


def at_once(urls: list[str], bodies: list[dict[str, Any]]) -> list[httpx.Response]:
    async def run() -> list[httpx.Response]:
        async with httpx.AsyncClient(timeout=30, verify=False) as client:
            asked = [
                client.post(f"{url}/v1/chat/completions", json=body)
                for url, body in zip(urls, bodies, strict=True)
            ]
            return await asyncio.gather(*asked)

    return asyncio.run(run())


def test_what_one_was_told_the_other_knows(replicas: Start, eventually: Start) -> None:
    (one, other), teacher, _ = replicas()
    assert told(one.post(json=STREAMED)) == "no_release"
    eventually(lambda: told(other.post(json=BODY)) == "hit:teacher")
    assert told(other.post(json=STREAMED)) == "hit:teacher"
    assert teacher.stats()["chat"] <= 2


@pytest.mark.parametrize("streams", [False, True])
def test_one_asks_for_all(replicas: Start, eventually: Start, streams: bool) -> None:
    (one, other), teacher, _ = replicas(latency_ms=700)
    urls = [one.url, other.url] * 10
    answers = at_once(urls, [STREAMED if streams and i % 4 < 2 else BODY for i in range(20)])
    assert teacher.stats()["chat"] == 1
    counted = Counter(told(answer) for answer in answers)
    assert counted["no_release"] == 1
    assert set(counted) <= {"no_release", "joined:teacher", "hit:teacher"}
    eventually(lambda: len(one.exchanges()) == 20)
    assert Counter(exchange.route for exchange in one.exchanges()) == {"teacher": 1, "cache": 19}
    paid = [exchange.teacher.cost_usd for exchange in one.exchanges() if exchange.route == "teacher"]
    spent = sum(replica.metric("understudy_cost_usd_total") for replica in (one, other))
    assert spent == pytest.approx(paid[0])


def test_a_replica_whose_teacher_fails_costs_the_others_little(replicas: Start) -> None:
    (one, other), teacher, _ = replicas(failures=Failures((Rule(Failure(status=503, stall=0.5, times=1)),)))
    answers = at_once([one.url, other.url] * 3, [BODY] * 6)
    assert sorted(answer.status_code for answer in answers) == [200] * 5 + [503]
    assert teacher.stats()["chat"] <= 3


def test_a_replica_that_is_too_slow_is_not_waited_for(replicas: Start) -> None:
    slow = Failures((Rule(Failure(stall=5, times=1)),))
    (one, other), teacher, _ = replicas(failures=slow, lease_s=0.7)

    async def run() -> tuple[float, str]:
        async with httpx.AsyncClient(timeout=30, verify=False) as client:
            leader = asyncio.create_task(client.post(f"{one.url}/v1/chat/completions", json=BODY))
            async with asyncio.timeout(10):
                while (await asyncio.to_thread(teacher.stats))["chat"] < 1:  # noqa: ASYNC110 - in another thread
                    await asyncio.sleep(0.01)
            began = asyncio.get_running_loop().time()
            answer = await client.post(f"{other.url}/v1/chat/completions", json=BODY)
            took = asyncio.get_running_loop().time() - began
            await leader
            return took, told(answer)

    took, reason = asyncio.run(run())
    assert reason == "no_release"
    assert took < 4


def test_without_redis_everything_is_answered(replicas: Start) -> None:
    (one, other), _, redis = replicas()
    redis.kill()
    assert told(one.post(json=BODY)) == "no_release"
    assert told(other.post(json=BODY)) == "no_release"
    assert told(one.post(json=STREAMED)) == "hit:teacher", "the first level is its own"
