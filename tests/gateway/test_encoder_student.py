"""A gateway whose task's student is an encoder in process: what it answers, and what it leaves to the teacher."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest

from routers.confidence import Confidence
from routers.router import Router
from serving.closed_answers import AnswerSpace, KnownAnswer, TokenEstimate
from serving.encoder import Encoder
from serving.engines import Engines
from serving.releases import ReleaseStore
from serving.text_thread import LIMIT

Start = Callable[..., Any]
Files = dict[str, bytes]
RUSH = 4 * LIMIT
TEACHER = {
    "lost card": "teacher's lost",
    "late": "teacher's late",
    "what": "unclear",
    "boom": "teacher's boom",
}
TEACHER |= {"lost " * 33: "teacher's long", **{f"lost {number}": "teacher's rush" for number in range(RUSH)}}
WORDS = {"lost": [9.0, 0.0], "late": [0.0, 9.0], "boom": [0.0, 0.0], "card": [9.0, 1.0]}
SPACE = AnswerSpace(
    [
        KnownAnswer(
            key, [{"index": 0, "message": {"role": "assistant", "content": key}, "finish_reason": "stop"}], 2
        )
        for key in ("lost", "late")
    ],
    TokenEstimate(8.0, 0.25),
)
TASK = {"name": "intents", "match": {"model": "intents"}, "audit_rate": 1e-9}


def body(text: str, **more: Any) -> dict[str, Any]:
    return {"model": "intents", "messages": [{"role": "user", "content": text}], **more}


@pytest.fixture
def live(
    stand_in: Start, gateway: Start, text_files: Callable[..., Files], tmp_path: Path
) -> Callable[..., tuple[Any, Any]]:
    """Start a gateway with a live release of an encoder, and its teacher."""

    def start(**model: Any) -> tuple[Any, Any]:
        encoder = Encoder.of(SPACE, text_files(WORDS, fails_on="boom", **model), Engines())
        router = Router(Confidence.of_score(slope=1.0, offset=-2.0), rank_threshold=1.0)
        store = ReleaseStore(tmp_path / "state")
        files = {**encoder.files(), "router.json": router.dump()}
        store.set_live("intents", store.write("intents", files, {"student": "encoder"}))
        teacher = stand_in(TEACHER, model="big")
        return gateway(teacher.url, task=[TASK], teacher={"timeout_s": 60.0}), teacher

    return start


def said(response: Any) -> tuple[str, str, str]:
    """The answer of a response, by whom, and why."""
    content: str = response.json()["choices"][0]["message"]["content"]
    return content, response.headers["x-understudy-route"], response.headers["x-understudy-reason"]


def test_it_answers_what_it_is_sure_of(live: Start) -> None:
    running, teacher = live()
    with running.client() as client:
        raw = client.chat.completions.with_raw_response.create(**body("lost card"))
        assert raw.parse().choices[0].message.content == "lost"
        assert raw.headers["x-understudy-route"] == "student"
        pieces = list(client.chat.completions.create(**body("late", stream=True)))
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices) == "late"
    assert teacher.stats()["chat"] == 0
    first = running.exchanges()[0]
    assert (first.student.model, first.student.usage["completion_tokens"]) == ("encoder", 2)
    assert 0 < first.student.device_s <= first.student.latency_s
    assert set(first.student.signals) == {"probability", "entropy", "seen"}
    assert first.cost_usd > 0


def test_what_it_isnt_sure_of_is_the_teachers(live: Start) -> None:
    running, _ = live()
    assert said(running.post(json=body("what"))) == ("unclear", "teacher", "low_confidence")


def test_a_text_that_is_too_long_is_none_it_supports(live: Start) -> None:
    running, teacher = live()
    text = "lost " * 33
    assert running.post(json=body(text)).headers["x-understudy-reason"] == "unsupported:length"
    assert teacher.stats()["chat"] == 1
    (exchange,) = running.exchanges()
    assert exchange.eligible
    assert exchange.student is None
    forced = running.post(json=body(text), headers={"x-understudy-route": "student"})
    assert forced.status_code == 400
    assert "(length)" in forced.json()["error"]["message"]


def test_a_text_it_breaks_on_is_the_teachers(live: Start, caplog: pytest.LogCaptureFixture) -> None:
    running, _ = live()
    with caplog.at_level(logging.ERROR):
        assert said(running.post(json=body("boom"))) == ("teacher's boom", "teacher", "student_error")
    assert "the student of release r0001 failed" in caplog.text
    assert said(running.post(json=body("lost card"))) == ("lost", "student", "confident")
    assert running.metric("understudy_upstream_errors_total", upstream="student", kind="broken") == 1


def test_whom_a_full_line_turns_away_the_teacher_answers(live: Start) -> None:
    running, teacher = live(slow=3)

    async def rush() -> list[tuple[str, str]]:
        async with openai.AsyncOpenAI(
            base_url=f"{running.url}/v1", api_key="any", max_retries=0, timeout=60
        ) as client:

            async def ask(number: int) -> tuple[str, str]:
                raw = await client.chat.completions.with_raw_response.create(**body(f"lost {number}"))
                return raw.headers["x-understudy-route"], raw.headers["x-understudy-reason"]

            return await asyncio.gather(*(ask(number) for number in range(RUSH)))

    counted = Counter(asyncio.run(rush()))
    assert set(counted) <= {("student", "confident"), ("teacher", "student_busy")}
    assert counted["teacher", "student_busy"] > 0
    assert counted["student", "confident"] >= LIMIT
    assert teacher.stats()["chat"] == counted["teacher", "student_busy"]
    busy = [one for one in running.exchanges() if one.reason == "student_busy"]
    assert len(busy) == counted["teacher", "student_busy"]
    assert not any(one.eligible for one in busy)
    assert running.metric("understudy_upstream_errors_total", upstream="student") == 0
    # It wasn't the student's fault: it is asked as before.
    assert said(running.post(json=body("lost card"))) == ("lost", "student", "confident")


def test_a_release_that_isnt_one_changes_nothing(
    live: Start, eventually: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    running, _ = live()
    assert said(running.post(json=body("lost card"))) == ("lost", "student", "confident")
    store = ReleaseStore(running.state_dir)
    files = store.read("intents", "r0001").files
    spoilt = {**files, "model.onnx": files["model.onnx"][:500]}
    with caplog.at_level(logging.ERROR):
        store.set_live("intents", store.write("intents", spoilt, {"student": "encoder"}))
        eventually(lambda: "can't load model.onnx" in caplog.text)
    assert said(running.post(json=body("late"))) == ("late", "student", "confident")
