"""With a live release: what the student answers, what it leaves to the teacher, and the audits."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx
import orjson
import pytest

from serving.events import answered, cancelled
from serving.exchange import Exchange, StudentAnswer
from serving.log import EventLog, LogReader
from serving.log_settings import LogSettings
from serving.releases import ReleaseStore

Start = Callable[..., Any]
TEACHER = {"parcel lost": "lost", "parcel late": "late", "refund now": "refund", "what": "unclear"}
"""The student of these tests is sure of the first three, wrong about `refund now`, unsure about `what`."""
STUDENT = {"parcel lost": "lost", "parcel late": "late", "refund now": "cancel"}
TASK = {"name": "intents", "match": {"model": "intents"}}


def body(text: str, **more: Any) -> dict[str, Any]:
    return {"model": "intents", "messages": [{"role": "user", "content": text}], **more}


@pytest.fixture
def live(stand_in: Start, gateway: Start, publish: Start, tmp_path: Any) -> Start:
    """Start a gateway with a live release for the task `intents`; `.teacher` is its stand-in."""

    def start(task: dict[str, Any] | None = None, **sections: Any) -> Any:
        publish(tmp_path / "state", "intents", STUDENT)
        teacher = stand_in(TEACHER, model="big")
        running = gateway(teacher.url, task=[{**TASK, **(task or {})}], **sections)
        return running, teacher

    return start


def test_a_sure_student_answers_and_the_teacher_isnt_asked(live: Start) -> None:
    running, teacher = live(task={"audit_rate": 1e-9})
    with running.client() as client:
        raw = client.chat.completions.with_raw_response.create(**body("parcel lost"))
        answer = raw.parse()
    assert answer.choices[0].message.content == "lost"
    assert answer.model == "intents"
    assert answer.id.startswith("chatcmpl-")
    assert raw.headers["x-understudy-route"] == "student"
    assert raw.headers["x-understudy-release"] == "r0001"
    assert 0.5 < float(raw.headers["x-understudy-confidence"]) <= 1
    assert 0 < float(raw.headers["x-understudy-cost-usd"]) < 1e-4
    assert teacher.stats()["chat"] == 0
    (exchange,) = running.exchanges()
    assert exchange.route == "student"
    assert exchange.teacher is None
    assert exchange.student.choices[0]["message"]["content"] == "lost"
    assert exchange.propensity == exchange.audit_rate == 1e-9
    assert exchange.audit == "none"
    assert exchange.confidence >= exchange.threshold
    assert running.metric("understudy_requests_total", task="intents", route="student", code="200") == 1
    assert running.metric("understudy_cost_avoided_usd_total", task="intents") > 0
    assert running.metric("understudy_release_info", task="intents", release="r0001") == 1


def test_a_student_streams_like_a_teacher(live: Start) -> None:
    running, _ = live()
    with running.client() as client:
        chunks = list(
            client.chat.completions.create(
                **body("parcel late", stream=True, stream_options={"include_usage": True})
            )
        )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "late"
    assert chunks[-1].usage is not None
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"
    raw = running.post(json=body("parcel late", stream=True))
    assert raw.headers["x-understudy-route"] == "student"
    assert "usage" not in raw.text
    assert raw.text.endswith("data: [DONE]\n\n")
    assert [exchange.route for exchange in running.exchanges()] == ["student", "student"]


def test_an_answer_that_was_vetoed_or_has_yet_to_prove_itself_is_the_teachers(
    stand_in: Start, gateway: Start, publish: Start, tmp_path: Any
) -> None:
    rules = {"vetoed": frozenset({"cancel"}), "unproven": frozenset({"late"}), "proven": {"lost": 0.0}}
    publish(tmp_path / "state", "intents", STUDENT, **rules)
    running = gateway(stand_in(TEACHER).url, task=[TASK])
    for text, route, reason in (
        ("refund now", "teacher", "vetoed_answer"),
        ("parcel late", "teacher", "unproven_answer"),
        ("parcel lost", "student", "confident"),
    ):
        for stream in (False, True):
            headers = running.post(json=body(text, stream=stream)).headers
            assert (headers["x-understudy-route"], headers["x-understudy-reason"]) == (route, reason)
        assert running.metric("understudy_requests_total", route=route, reason=reason) == 2
    exchanges = [one for one in running.exchanges() if one.reason == "vetoed_answer"]
    assert [one.propensity for one in exchanges] == [1.0, 1.0]
    assert all(one.student is not None and one.agreement is False for one in exchanges), "both are labels"


def test_an_unsure_student_leaves_it_to_the_teacher(live: Start) -> None:
    running, _ = live(task={"audit_rate": 1.0})
    answer = running.post(json=body("what"))
    assert answer.json()["choices"][0]["message"]["content"] == "unclear"
    assert answer.headers["x-understudy-reason"] == "low_confidence"
    (exchange,) = running.exchanges()
    assert exchange.student is not None
    assert exchange.propensity == 1.0
    assert exchange.agreement is False
    assert exchange.coin
    assert exchange.audit == "answered", "the coin asks for both answers, and both are there"
    assert exchange.cost_usd == pytest.approx(exchange.teacher.cost_usd + exchange.student.cost_usd)


def test_what_the_student_doesnt_support_goes_to_the_teacher(live: Start) -> None:
    running, _ = live()
    answer = running.post(json=body("parcel lost", n=2))
    assert answer.headers["x-understudy-route"] == "teacher"
    assert answer.headers["x-understudy-reason"].startswith("unsupported:")
    (exchange,) = running.exchanges()
    assert exchange.eligible
    assert exchange.propensity == 1.0
    assert running.metric("understudy_requests_total", reason="unsupported") == 1
    refused = running.post(json=body("parcel lost", n=2), headers={"x-understudy-route": "student"})
    assert refused.status_code == 400
    assert refused.json()["error"]["code"] == "unsupported"


def test_forcing_the_student_and_the_teacher(live: Start) -> None:
    running, teacher = live()
    unsure = running.post(json=body("what"), headers={"x-understudy-route": "student"})
    assert unsure.headers["x-understudy-route"] == "student"
    assert unsure.headers["x-understudy-reason"] == "forced"
    assert teacher.stats()["chat"] == 0
    sure = running.post(json=body("parcel lost"), headers={"x-understudy-route": "teacher"})
    assert sure.headers["x-understudy-route"] == "teacher"
    assert [exchange.eligible for exchange in running.exchanges()] == [False, False]


def test_an_audit_asks_the_teacher_after_the_answer(live: Start, eventually: Start) -> None:
    running, teacher = live(task={"audit_rate": 1.0})
    for text in ("parcel lost", "refund now"):
        assert (
            running.post(json=body(text, stream=text == "refund now")).headers["x-understudy-route"]
            == "student"
        )
    eventually(lambda: all(exchange.audit == "answered" for exchange in running.exchanges()))
    agreed, wrong = running.exchanges()
    assert agreed.agreement is True
    assert wrong.agreement is False
    assert wrong.teacher.choices[0]["message"]["content"] == "refund"
    assert agreed.propensity == agreed.audit_rate == 1.0
    assert teacher.stats()["chat"] == 2
    assert running.metric("understudy_audits_total", task="intents", outcome="agreed") == 1
    assert running.metric("understudy_audits_total", task="intents", outcome="disagreed") == 1
    assert running.metric("understudy_cost_usd_total", route="student") > wrong.teacher.cost_usd


def test_an_audit_that_the_teacher_refuses_is_missing(live: Start, eventually: Start) -> None:
    running, _ = live(task={"audit_rate": 1.0})
    running.post(json=body("parcel lost", metadata={"stand_in": "status=422"}))
    eventually(lambda: running.exchanges()[0].audit == "missing")
    (exchange,) = running.exchanges()
    assert exchange.teacher is None
    assert exchange.agreement is None
    assert running.metric("understudy_audits_total", outcome="missing") == 1


def test_no_audit_without_a_place_in_the_log(live: Start) -> None:
    running, teacher = live(task={"audit_rate": 1.0})
    assert running.post(json=body("parcel lost", store=False)).headers["x-understudy-route"] == "student"
    time.sleep(0.3)
    assert teacher.stats()["chat"] == 0
    assert running.exchanges() == []


def test_the_rate_of_the_coin_falls_after_enough_audits(live: Start, tmp_path: Any) -> None:
    async def audit_often() -> None:
        log = EventLog(tmp_path / "state", LogSettings(durability="relaxed"))
        for number in range(300):
            await log.append("intents", answered(pending(f"{number:03}", time.time())))
        await log.aclose()

    asyncio.run(audit_often())
    running, _ = live()
    running.post(json=body("parcel lost"))
    assert running.exchanges()[-1].audit_rate == 0.02


@pytest.mark.parametrize("stream", [False, True])
def test_the_student_steps_in_for_a_teacher_that_cant_answer(live: Start, stream: bool) -> None:
    running, _ = live(task={"on_teacher_failure": "student", "audit_rate": 1.0})
    failing = running.post(json=body("what", metadata={"stand_in": "status=503"}, stream=stream))
    assert failing.status_code == 200
    assert failing.headers["x-understudy-route"] == "student"
    assert failing.headers["x-understudy-reason"] == "teacher_unavailable"
    (exchange,) = running.exchanges()
    assert not exchange.eligible
    assert exchange.audit == "none"
    wrong = running.post(json=body("what", metadata={"stand_in": "status=400"}, stream=stream))
    assert wrong.status_code == 400, "a request that is wrong stays wrong"


def test_by_default_the_teachers_error_is_the_clients(live: Start) -> None:
    running, _ = live()
    assert running.post(json=body("what", metadata={"stand_in": "status=503"})).status_code == 503


def test_an_unverified_key_gets_nothing_from_the_student(live: Start, eventually: Start) -> None:
    running, teacher = live(teacher_key=None, task={"audit_rate": 1.0})

    def reason(key: str) -> str:
        answer = running.post(json=body("parcel lost"), headers={"authorization": f"Bearer {key}"})
        return str(answer.headers["x-understudy-reason"])

    assert reason("a") == "unverified_key"
    assert reason("a") == "confident"
    assert reason("b") == "unverified_key"
    eventually(lambda: teacher.stats()["chat"] == 3)


def test_releases_come_and_go_without_a_failed_request(
    live: Start, publish: Start, eventually: Start
) -> None:
    running, _ = live()
    outcomes: list[tuple[int, str]] = []
    stop = threading.Event()

    def ask() -> None:
        with httpx.Client() as client:
            while not stop.is_set():
                answer = client.post(f"{running.url}/v1/chat/completions", json=body("parcel lost"))
                outcomes.append((answer.status_code, answer.headers.get("x-understudy-release", "none")))

    def release_now() -> str:
        return outcomes[-1][1]

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        eventually(lambda: bool(outcomes) and release_now() == "r0001")
        publish(running.state_dir, "intents", STUDENT)
        eventually(lambda: release_now() == "r0002")
        store = ReleaseStore(running.state_dir)
        store.set_live("intents", None)
        eventually(lambda: release_now() == "none")
        store.set_live("intents", "r0001")
        eventually(lambda: release_now() == "r0001")
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert {status for status, _ in outcomes} == {200}
    assert running.metric("understudy_release_info", release="r0002") == 0


def test_a_damaged_release_leaves_the_one_before(
    live: Start, publish: Start, eventually: Start, caplog: pytest.LogCaptureFixture
) -> None:
    running, _ = live()
    publish(running.state_dir, "intents", STUDENT, live=False)
    folder = running.state_dir / "tasks" / "intents" / "releases" / "r0002"
    (folder / "router.json").write_bytes(b"{}")
    # `set_live` would refuse it; a disk that goes bad afterwards doesn't ask.
    replacement = running.state_dir / "live"
    replacement.write_bytes(orjson.dumps({"release": "r0002", "generation": 2, "previous": ["r0001"]}))
    replacement.replace(running.state_dir / "tasks" / "intents" / "live")
    eventually(lambda: "can't be loaded" in caplog.text)
    answer = running.post(json=body("parcel lost"))
    assert answer.headers["x-understudy-release"] == "r0001"
    publish(running.state_dir, "intents", STUDENT)
    eventually(lambda: running.post(json=body("parcel lost")).headers["x-understudy-release"] == "r0003")


def test_a_release_that_was_put_back_is_taken_in(
    live: Start, publish: Start, eventually: Start, caplog: pytest.LogCaptureFixture
) -> None:
    running, _ = live()
    publish(running.state_dir, "intents", STUDENT, live=False)
    router = running.state_dir / "tasks" / "intents" / "releases" / "r0002" / "router.json"
    backup = running.state_dir / "backup"
    router.rename(backup)
    replacement = running.state_dir / "live"
    replacement.write_bytes(orjson.dumps({"release": "r0002", "generation": 2, "previous": ["r0001"]}))
    replacement.replace(running.state_dir / "tasks" / "intents" / "live")
    eventually(lambda: "can't be loaded" in caplog.text)
    backup.rename(router)
    eventually(lambda: running.post(json=body("parcel lost")).headers["x-understudy-release"] == "r0002")


def pending(id: str, created: float) -> Exchange:
    choices = [{"index": 0, "message": {"role": "assistant", "content": "lost"}, "finish_reason": "stop"}]
    return Exchange(
        id=id,
        request_id=f"req_{id}",
        created=created,
        task="intents",
        tenant="t",
        request=body("parcel lost", stream=True),
        route="student",
        reason="confident",
        release="r0001",
        student=StudentAnswer(model="linear", choices=choices, usage=None, latency_s=0.0, score=1.0),
        coin=True,
        audit_rate=0.05,
        audit="pending",
        propensity=0.05,
    )


@pytest.mark.parametrize(("teacher_key", "outcome"), [("teacher-key", "answered"), (None, "missing")])
def test_audits_of_a_process_that_died_are_taken_up(
    live: Start, eventually: Start, tmp_path: Any, teacher_key: str | None, outcome: str
) -> None:
    async def leave_behind() -> None:
        log = EventLog(tmp_path / "state", LogSettings())
        await log.append("intents", answered(pending("old", time.time() - 3600)))
        await log.append("intents", answered(pending("young", time.time())))
        await log.append("intents", answered(pending("left", time.time() - 3600)))
        await log.append("intents", cancelled("left", teacher=None, at=time.time()))
        await log.aclose()

    asyncio.run(leave_behind())
    running, _ = live(teacher_key=teacher_key)

    def audits() -> dict[str, str]:
        found = LogReader(running.state_dir).exchanges("intents").exchanges
        return {exchange.id: exchange.audit for exchange in found}

    eventually(lambda: audits()["old"] == outcome)
    assert audits()["young"] == "pending", "somebody may still be at it"
    assert audits()["left"] == "pending", "the client never had that answer"
