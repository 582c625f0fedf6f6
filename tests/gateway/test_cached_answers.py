"""Answers that come from the cache: which requests, in which form, and what is left behind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest

from serving.releases import ReleaseStore

Start = Callable[..., Any]
TEACHER = {"parcel lost": "lost", "parcel late": "late", "refund now": "refund", "what": "is unclear to me"}
STUDENT = {"parcel lost": "lost", "parcel late": "late", "refund now": "cancel"}
PER_TOKEN = {"input": 10e-6, "output": 30e-6}


def body(text: str = "what", **more: Any) -> dict[str, Any]:
    return {
        "model": "intents",
        "messages": [{"role": "user", "content": text}],
        "temperature": 0,
        **more,
    }


def told(answer: httpx.Response) -> tuple[str, str]:
    return answer.headers["x-understudy-route"], answer.headers["x-understudy-reason"]


@pytest.fixture
def day_0(stand_in: Start, gateway: Start) -> Start:
    """Start a gateway before a teacher, without a student."""

    def start(task: dict[str, Any] | None = None, **sections: Any) -> Any:
        teacher = stand_in(TEACHER, model="big")
        policy = {"name": "intents", "match": {"model": "intents"}, **(task or {})}
        return gateway(teacher.url, task=[policy], **sections), teacher

    return start


@pytest.fixture
def live(day_0: Start, publish: Start, tmp_path: Any) -> Start:
    """Start a gateway with a live release that is sure of some texts, wrong about `refund now`."""

    def start(task: dict[str, Any] | None = None, **sections: Any) -> Any:
        publish(tmp_path / "state", "intents", STUDENT)
        return day_0(task, **sections)

    return start


def test_the_teacher_is_asked_once(day_0: Start, eventually: Start) -> None:
    running, teacher = day_0()
    first, second = running.post(json=body()), running.post(json=body())
    assert told(first) == ("teacher", "no_release")
    assert told(second) == ("cache", "hit:teacher")
    assert teacher.stats()["chat"] == 1
    assert int(second.headers["age"]) >= 0
    assert "age" not in first.headers
    assert float(second.headers["x-understudy-cost-usd"]) == 0
    one, two = first.json(), second.json()
    assert one["id"] != two["id"] == f"chatcmpl-{running.exchanges()[-1].id}"
    assert {**one, "id": None} == {**two, "id": None}
    eventually(lambda: len(running.exchanges()) == 2)
    asked, hit = running.exchanges()
    assert (hit.route, hit.reason, hit.origin) == ("cache", "hit:teacher", "teacher")
    assert hit.teacher == asked.teacher
    assert hit.propensity == 1.0
    assert (hit.eligible, hit.cost_usd) == (True, 0.0)
    assert running.metric("understudy_requests_total", route="cache", reason="hit", code="200") == 1
    assert running.metric("understudy_cache_requests_total", outcome="hit") == 1
    assert running.metric("understudy_cache_requests_total", outcome="miss") == 1
    assert running.metric("understudy_cost_usd_total", route="cache") == 0
    avoided = running.metric("understudy_cost_avoided_usd_total", route="cache")
    assert avoided == pytest.approx(asked.teacher.cost_usd)


def test_a_hit_on_the_students_answer_is_the_students(live: Start, eventually: Start) -> None:
    running, teacher = live(task={"audit_rate": 1e-9})
    first, second = running.post(json=body("parcel lost")), running.post(json=body("parcel lost"))
    assert told(first) == ("student", "confident")
    assert told(second) == ("cache", "hit:student")
    for name in ("release", "confidence", "task"):
        assert first.headers[f"x-understudy-{name}"] == second.headers[f"x-understudy-{name}"]
    assert teacher.stats()["chat"] == 0
    eventually(lambda: len(running.exchanges()) == 2)
    answered, hit = running.exchanges()
    assert hit.by_student
    assert hit.propensity == 1e-9
    assert hit.student == answered.student
    assert (hit.confidence, hit.threshold) == (answered.confidence, answered.threshold)
    assert hit.teacher is None
    assert running.metric("understudy_cost_avoided_usd_total", route="cache") > 0


def test_a_hit_has_a_coin_of_its_own_and_is_audited(live: Start, eventually: Start) -> None:
    running, teacher = live(task={"audit_rate": 1.0})
    for _ in range(3):
        running.post(json=body("refund now"))

    def audits() -> list[str]:
        return [exchange.audit for exchange in running.exchanges()]

    eventually(lambda: audits() == ["answered"] * 3)
    assert teacher.stats()["chat"] == 3, "every coin asks the teacher, wherever the answer came from"
    assert [exchange.route for exchange in running.exchanges()] == ["student", "cache", "cache"]
    assert [exchange.agreement for exchange in running.exchanges()] == [False] * 3
    assert running.metric("understudy_audits_total", outcome="disagreed") == 3
    paid = sum(exchange.teacher.cost_usd for exchange in running.exchanges()[1:])
    assert running.metric("understudy_cost_usd_total", route="cache") == pytest.approx(paid)


@pytest.mark.parametrize(
    ("task", "request_", "cached"),
    [
        ({}, {}, True),
        ({}, {"temperature": 0.0}, True),
        ({}, {"temperature": 0.01}, False),
        ({}, {"temperature": False}, False),
        ({}, {"temperature": None}, False),
        ({}, {"seed": 7}, True),
        ({"cache": True}, {"temperature": 1}, True),
        ({"cache": False}, {}, False),
        ({}, {"store": False}, False),
        ({}, {"store": True}, True),
    ],
)
def test_what_is_cached(day_0: Start, task: dict[str, Any], request_: dict[str, Any], cached: bool) -> None:
    running, teacher = day_0(task)
    for _ in range(2):
        assert running.post(json=body(**request_)).status_code == 200
    assert teacher.stats()["chat"] == (1 if cached else 2)
    if not cached:
        assert running.metric("understudy_cache_requests_total", outcome="bypass") == 2


def test_without_a_temperature_nothing_is_cached(day_0: Start) -> None:
    running, teacher = day_0()
    asked = body()
    del asked["temperature"]
    for _ in range(2):
        running.post(json=asked)
    assert teacher.stats()["chat"] == 2


@pytest.mark.parametrize("route", ["teacher", "student"])
def test_a_forced_route_neither_reads_nor_writes(live: Start, route: str) -> None:
    running, _ = live()
    forced = {"x-understudy-route": route}
    assert told(running.post(json=body("parcel lost"), headers=forced)) == (route, "forced")
    assert told(running.post(json=body("parcel lost"))) == ("student", "confident")
    assert told(running.post(json=body("parcel lost"), headers=forced)) == (route, "forced")


@pytest.mark.parametrize(
    ("header", "routes"),
    [
        ("no-cache", ["teacher", "teacher", "cache"]),
        ("no-store", ["teacher", "teacher", "teacher"]),
        ("No-Store, max-age=600", ["teacher", "teacher", "teacher"]),
        ("max-age=600", ["teacher", "cache", "cache"]),
        ("max-age=0", ["teacher", "teacher", "cache"]),
        ("max-age=soon, speed=high", ["teacher", "cache", "cache"]),
    ],
)
def test_what_the_client_says(day_0: Start, header: str, routes: list[str]) -> None:
    running, _ = day_0()
    sent: list[dict[str, str]] = [{"cache-control": header}, {"cache-control": header}, {}]
    assert [told(running.post(json=body(), headers=headers))[0] for headers in sent] == routes


def test_an_interim_answer_is_never_kept(live: Start) -> None:
    running, _ = live(task={"on_teacher_failure": "student", "audit_rate": 1e-9})
    failing = {"stand_in": "status=503;times=1"}
    assert told(running.post(json=body(metadata=failing))) == ("student", "teacher_unavailable")
    assert told(running.post(json=body(metadata=failing))) == ("teacher", "low_confidence")
    assert told(running.post(json=body())) == ("cache", "hit:teacher")


def test_a_failure_is_never_kept(day_0: Start) -> None:
    running, _ = day_0()
    failing = {"stand_in": "status=400;times=1"}
    assert running.post(json=body(metadata=failing)).status_code == 400
    assert told(running.post(json=body(metadata=failing))) == ("teacher", "no_release")


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_broke_off_is_never_kept(day_0: Start, stream: bool) -> None:
    running, _ = day_0()
    running.post(json=body(stream=stream, metadata={"stand_in": "break-after=2;times=1"}))
    again = running.post(json=body())
    assert told(again) == ("teacher", "no_release")
    assert again.json()["choices"][0]["message"]["content"] == TEACHER["what"]


def test_nothing_is_shown_to_a_key_the_teacher_hasnt_accepted(day_0: Start) -> None:
    running, teacher = day_0(teacher_key=None, cache={"share": "task"})

    def route(key: str) -> str:
        return told(running.post(json=body(), headers={"authorization": f"Bearer {key}"}))[0]

    assert [route("a"), route("a"), route("a")] == ["teacher", "teacher", "cache"]
    assert [route("b"), route("b")] == ["teacher", "cache"]
    assert teacher.stats()["chat"] == 3


def test_tenants_share_only_what_they_are_told_to(day_0: Start) -> None:
    running, _ = day_0()

    def route(key: str) -> str:
        return told(running.post(json=body(), headers={"authorization": f"Bearer {key}"}))[0]

    assert [route("a"), route("b"), route("a"), route("b")] == ["teacher", "teacher", "cache", "cache"]


def test_a_new_generation_leaves_the_old_answers_behind(
    live: Start, publish: Start, eventually: Start
) -> None:
    running, _ = live()

    def ask() -> tuple[str, str]:
        answer = running.post(json=body("refund now"))
        return answer.json()["choices"][0]["message"]["content"], answer.headers["x-understudy-route"]

    def live_now() -> str:
        return str(running.post(json=body(temperature=1)).headers.get("x-understudy-release", "none"))

    assert [ask(), ask()] == [("cancel", "student"), ("cancel", "cache")]
    publish(running.state_dir, "intents", {"refund now": "refund", "parcel lost": "lost"})
    eventually(lambda: live_now() == "r0002")
    assert [ask(), ask()] == [("refund", "student"), ("refund", "cache")]
    store = ReleaseStore(running.state_dir)
    store.set_live("intents", "r0001")
    eventually(lambda: live_now() == "r0001")
    assert [ask(), ask()] == [("cancel", "student"), ("cancel", "cache")]
    store.set_live("intents", None)
    eventually(lambda: live_now() == "none")
    assert [ask(), ask()] == [("refund", "teacher"), ("refund", "cache")]


def test_a_prompt_that_becomes_a_task_is_cached_from_its_first_answer_on(
    stand_in: Start, gateway: Start
) -> None:
    running = gateway(stand_in(TEACHER).url)
    answers = [running.post(json=body()) for _ in range(2)]
    assert [told(answer)[0] for answer in answers] == ["teacher", "cache"]
    assert len({answer.headers["x-understudy-task"] for answer in answers}) == 1


@pytest.mark.parametrize("stream_first", [False, True])
@pytest.mark.parametrize("text", ["what", "parcel lost"])
def test_streams_and_whole_answers_serve_each_other(live: Start, text: str, stream_first: bool) -> None:
    running, _ = live()

    def ask(client: openai.OpenAI, stream: bool) -> tuple[str | None, str, int | None]:
        if not stream:
            whole = client.chat.completions.create(**body(text))
            return whole.choices[0].message.content, whole.choices[0].finish_reason, whole.usage.total_tokens
        asked = body(text, stream=True, stream_options={"include_usage": True})
        chunks = list(client.chat.completions.create(**asked))
        assert len({chunk.id for chunk in chunks}) == 1
        said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        (finish,) = [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason]
        return said, finish, chunks[-1].usage.total_tokens

    with running.client() as client:
        first, second = ask(client, stream_first), ask(client, not stream_first)
        third = ask(client, stream_first)
    assert first == second == third
    assert running.metric("understudy_cache_requests_total", outcome="hit") == 2


def test_usage_is_shown_to_those_who_asked_only(day_0: Start) -> None:
    running, _ = day_0()
    running.post(json=body())
    silent = running.post(json=body(stream=True))
    asking = running.post(json=body(stream=True, stream_options={"include_usage": True}))
    assert told(silent) == told(asking) == ("cache", "hit:teacher")
    assert '"usage"' not in silent.text
    assert '"prompt_tokens"' in asking.text
    assert silent.text.endswith("data: [DONE]\n\n")


def test_a_retry_that_finds_the_answer_takes_the_place_of_the_first_attempt(
    day_0: Start, eventually: Start
) -> None:
    running, _ = day_0()
    running.post(json=body())
    running.post(json=body(), headers={"x-stainless-retry-count": "1"})
    eventually(lambda: len(running.exchanges()) == 2)
    first, retry = running.exchanges()
    assert (retry.route, first.superseded_by) == ("cache", retry.id)
