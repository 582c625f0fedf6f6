"""Identical requests at the same time: one answer, made once, for all of them, whatever becomes of whom."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import openai
import pytest

from serving.failures import Failure, Failures, Rule

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
        headers = more.pop("extra_headers", None)
        asked = self.client.chat.completions.with_raw_response
        raw = await asked.create(**body(**more), extra_headers=headers)
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


@pytest.mark.parametrize(("kinds", "size"), [("whole", 20), ("streamed", 20), ("mixed", 60)])
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


def test_half_of_the_crowd_leaves(started: Start, eventually: Start) -> None:
    running, teacher = started(latency_ms=1500)

    async def all_at_once(crowd: Crowd) -> list[tuple[str, str]]:
        stay = [crowd.streamed() if i % 2 else crowd.whole() for i in range(20)]
        leave = [crowd.streamed(leave_after=1 + i % 3) for i in range(20)]
        return (await asyncio.gather(*leave, *stay))[20:]

    outcomes = together(running.url, all_at_once)
    assert {text for _, text in outcomes} == {ANSWER}
    assert teacher.stats()["chat"] == 1
    assert teacher.stats()["disconnected"] == 0
    eventually(lambda: running.metric("understudy_requests_total") == 40)
    eventually(lambda: len(running.exchanges()) >= 20)
    paid = next(exchange.teacher.cost_usd for exchange in running.exchanges())
    assert running.metric("understudy_cost_usd_total") == pytest.approx(paid)


@pytest.mark.parametrize("stream", [False, True])
def test_a_leader_that_leaves_takes_the_answer_from_nobody(
    started: Start, eventually: Start, stream: bool
) -> None:
    running, teacher = started(latency_ms=1500)

    async def leader_goes(crowd: Crowd) -> list[tuple[str, str]]:
        leader = asyncio.create_task(crowd.streamed() if stream else crowd.whole())
        await until(lambda: teacher.stats()["chat"] == 1)
        followers = [asyncio.create_task(crowd.streamed()), asyncio.create_task(crowd.whole())]
        await asyncio.sleep(0.2)
        leader.cancel()
        return await asyncio.gather(*followers)

    outcomes = together(running.url, leader_goes)
    assert outcomes == [("joined:teacher", ANSWER)] * 2
    assert teacher.stats()["chat"] == 1
    assert running.metric("understudy_requests_total", route="teacher", code="499") == 1
    eventually(lambda: len(running.exchanges()) == 3)
    assert Counter((one.route, one.cancelled) for one in running.exchanges()) == {
        ("teacher", True): 1,
        ("cache", False): 2,
    }
    paid = running.exchanges()[0].teacher.cost_usd
    assert running.metric("understudy_cost_usd_total") == pytest.approx(paid), "paid for, once, by who left"


@pytest.mark.parametrize("stream", [False, True])
def test_when_all_have_left_nobody_is_asked_any_more(started: Start, eventually: Start, stream: bool) -> None:
    running, teacher = started(latency_ms=20_000)

    async def all_go(crowd: Crowd) -> None:
        asked = [asyncio.create_task(crowd.streamed() if stream else crowd.whole()) for _ in range(10)]
        await until(lambda: teacher.stats()["chat"] == 1)
        await asyncio.sleep(0.3)
        for one in asked:
            one.cancel()
        await asyncio.gather(*asked, return_exceptions=True)

    together(running.url, all_go)
    eventually(lambda: teacher.stats()["disconnected"] == 1)
    eventually(lambda: running.metric("understudy_requests_total", code="499") == 10)
    assert teacher.stats()["chat"] == 1
    eventually(lambda: running.metric("understudy_cost_usd_total", route="teacher") > 0)
    assert running.exchanges() == []


def test_a_leader_that_fails_is_replaced(started: Start, eventually: Start) -> None:
    failures = Failures((Rule(Failure(status=503, stall=0.5, times=1)),))
    running, teacher = started(failures=failures)

    async def all_at_once(crowd: Crowd) -> list[Any]:
        asked = [crowd.streamed() if i % 2 else crowd.whole() for i in range(20)]
        return await asyncio.gather(*asked, return_exceptions=True)

    outcomes = together(running.url, all_at_once)
    failed = [one for one in outcomes if isinstance(one, BaseException)]
    assert [getattr(one, "status_code", one) for one in failed] == [503]
    assert {one[1] for one in outcomes if not isinstance(one, BaseException)} == {ANSWER}
    assert teacher.stats()["chat"] == 2
    assert running.metric("understudy_upstream_errors_total", upstream="teacher") == 1


def test_a_teacher_that_is_down_is_everybodys_own_to_find_out(started: Start) -> None:
    failures = Failures((Rule(Failure(status=503, stall=0.2)),))
    running, _ = started(failures=failures)

    async def all_at_once(crowd: Crowd) -> list[Any]:
        return await asyncio.gather(*(crowd.whole() for _ in range(6)), return_exceptions=True)

    assert [one.status_code for one in together(running.url, all_at_once)] == [503] * 6


def test_a_request_that_is_wrong_is_wrong_for_all(started: Start) -> None:
    failures = Failures((Rule(Failure(status=400, stall=0.5)),))
    running, teacher = started(failures=failures)

    async def all_at_once(crowd: Crowd) -> list[Any]:
        asked = [crowd.streamed() if i % 2 else crowd.whole() for i in range(10)]
        return await asyncio.gather(*asked, return_exceptions=True)

    assert [one.status_code for one in together(running.url, all_at_once)] == [400] * 10
    assert teacher.stats()["chat"] == 1


def test_a_stream_that_breaks_is_an_error_to_whom_it_was_shown(started: Start) -> None:
    failures = Failures((Rule(Failure(break_after=10, times=1)),))
    running, teacher = started(latency_ms=1500, failures=failures)

    async def all_at_once(crowd: Crowd) -> list[Any]:
        leader = asyncio.create_task(crowd.streamed())
        await until(lambda: teacher.stats()["chat"] == 1)
        return list(await asyncio.gather(leader, crowd.whole(), crowd.whole(), return_exceptions=True))

    leader, *others = together(running.url, all_at_once)
    assert isinstance(leader, openai.APIError)
    assert [text for _, text in others] == [ANSWER] * 2
    assert teacher.stats()["chat"] == 2


def test_a_slow_leader_costs_a_follower_its_lease(started: Start) -> None:
    failures = Failures((Rule(Failure(stall=4, times=1)),))
    running, teacher = started(latency_ms=0, failures=failures, cache={"lease_s": 0.5})

    async def all_at_once(crowd: Crowd) -> tuple[Any, list[Any], float]:
        began = asyncio.get_running_loop().time()
        leader = asyncio.create_task(crowd.whole())
        await until(lambda: teacher.stats()["chat"] == 1)
        followers = await asyncio.gather(*(crowd.whole() for _ in range(5)))
        took = asyncio.get_running_loop().time() - began
        return await leader, followers, took

    leader, followers, took = together(running.url, all_at_once)
    assert leader == ("no_release", ANSWER)
    assert {text for _, text in followers} == {ANSWER}
    assert 0.5 <= took < 3
    assert teacher.stats()["chat"] == 2, "one of them led the others"


def test_a_student_answers_a_crowd_once(
    stand_in: Start, gateway: Start, publish: Start, tmp_path: Any, eventually: Start
) -> None:
    publish(tmp_path / "state", "intents", {TEXT: "lost", "parcel late": "late"})
    teacher = stand_in({TEXT: "lost"})
    running = gateway(
        teacher.url, task=[{"name": "intents", "match": {"model": "intents"}, "audit_rate": 1.0}]
    )

    async def all_at_once(crowd: Crowd) -> list[tuple[str, str]]:
        return await asyncio.gather(*(crowd.streamed() if i % 2 else crowd.whole() for i in range(10)))

    outcomes = together(running.url, all_at_once)
    assert {text for _, text in outcomes} == {"lost"}
    assert set(reasons(outcomes)) <= {"confident", "joined:student", "hit:student"}
    assert reasons(outcomes)["confident"] == 1
    eventually(lambda: [one.audit for one in running.exchanges()] == ["answered"] * 10)
    assert all(one.by_student and one.agreement for one in running.exchanges())


def test_what_may_not_be_shared_is_asked_by_each(started: Start) -> None:
    running, teacher = started(latency_ms=300)

    async def all_at_once(crowd: Crowd) -> list[tuple[str, str]]:
        warm = [crowd.whole(temperature=1) for _ in range(3)]
        alone = [crowd.whole(extra_headers={"cache-control": "no-store"}) for _ in range(3)]
        return await asyncio.gather(*warm, *alone)

    assert set(reasons(together(running.url, all_at_once))) == {"no_release"}
    assert teacher.stats()["chat"] == 6


async def until(holds: Callable[[], bool]) -> None:
    """Wait until something holds; fail after ten seconds."""
    async with asyncio.timeout(10):
        while not await asyncio.to_thread(holds):  # noqa: ASYNC110 - it happens in another process or thread
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("latency_ms", [0, 300])
def test_streams_follow_an_answer_that_comes_whole(started: Start, latency_ms: float) -> None:
    running, teacher = started(latency_ms=latency_ms)

    async def all_at_once(crowd: Crowd) -> list[tuple[str, str]]:
        return await asyncio.gather(crowd.whole(), *(crowd.streamed() for _ in range(10)))

    assert {text for _, text in together(running.url, all_at_once)} == {ANSWER}
    assert teacher.stats()["chat"] == 1
