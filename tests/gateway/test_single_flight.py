"""Identical requests at the same time: one answer, made once, for all of them, whatever becomes of whom."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import openai
import pytest

Start = Callable[..., Any]
ANSWER = " ".join(f"word{i}" for i in range(40))
TEXT = "parcel lost"


def body(stream: bool = False, **more: Any) -> dict[str, Any]:
    asked = {"model": "intents", "messages": [{"role": "user", "content": TEXT}], "temperature": 0}
    return {**asked, **({"stream": True} if stream else {}), **more}


@pytest.fixture
def started(stand_in: Start, gateway: Start) -> Start:
    """Start a gateway before a teacher that takes `latency_ms`."""

    def start(*, latency_ms: float = 600, failures: Any = None, **sections: Any) -> Any:
        teacher = stand_in({TEXT: ANSWER}, latency_ms=latency_ms, latency_spread=0.0, failures=failures)
        return gateway(
            teacher.url, task=[{"name": "intents", "match": {"model": "intents"}}], **sections
        ), teacher

    return start


class Crowd:
    """Many clients of one gateway. What each of them got is a pair of its reason and its text."""

    def __init__(self, url: str) -> None:
        self.client = openai.AsyncOpenAI(
            base_url=f"{url}/v1",
            api_key="client-key",
            max_retries=0,
            timeout=60,
            # Nothing is encrypted here, and reading the certificates takes its time.
            http_client=openai.DefaultAsyncHttpxClient(verify=False),
        )

    async def whole(self, **more: Any) -> tuple[str, str]:
        raw = await self.client.chat.completions.with_raw_response.create(**body(**more))
        return raw.headers["x-understudy-reason"], raw.parse().choices[0].message.content

    async def streamed(self, leave_after: int | None = None, **more: Any) -> tuple[str, str]:
        said, number = "", 0
        opened = self.client.chat.completions.with_streaming_response.create(**body(stream=True, **more))
        async with opened as raw:
            reason = raw.headers["x-understudy-reason"]
            async for chunk in await raw.parse():
                number += 1
                said += chunk.choices[0].delta.content or "" if chunk.choices else ""
                if leave_after is not None and number >= leave_after:
                    break
        return str(reason), said

    async def aclose(self) -> None:
        await self.client.close()


def together(url: str, work: Callable[[Crowd], Awaitable[Any]]) -> Any:
    async def run() -> Any:
        crowd = Crowd(url)
        try:
            return await work(crowd)
        finally:
            await crowd.aclose()

    return asyncio.run(run())


def reasons(outcomes: list[tuple[str, str]]) -> Counter[str]:
    return Counter(reason for reason, _ in outcomes)


@pytest.mark.parametrize(("kinds", "size"), [("whole", 20), ("streamed", 20), ("mixed", 200)])
def test_a_crowd_is_one_call(started: Start, eventually: Start, kinds: str, size: int) -> None:
    running, teacher = started()

    async def all_at_once(crowd: Crowd) -> list[tuple[str, str]]:
        streams = {"whole": (False, False), "streamed": (True, True), "mixed": (True, False)}[kinds]
        asked = [crowd.streamed() if streams[i % 2] else crowd.whole() for i in range(size)]
        return await asyncio.gather(*asked)

    outcomes = together(running.url, all_at_once)
    assert {text for _, text in outcomes} == {ANSWER}
    assert teacher.stats()["chat"] == 1
    counted = reasons(outcomes)
    assert counted["no_release"] == 1
    assert counted["joined:teacher"] + counted["hit:teacher"] == size - 1
    eventually(lambda: len(running.exchanges()) == size)
    logged = running.exchanges()
    assert sum(exchange.cost_usd for exchange in logged) == pytest.approx(logged[0].teacher.cost_usd)
    assert running.metric("understudy_cost_usd_total") == pytest.approx(logged[0].teacher.cost_usd)
    assert {exchange.teacher.choices[0]["message"]["content"] for exchange in logged} == {ANSWER}
