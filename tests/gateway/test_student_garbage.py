"""A student's broken server never breaks a client: the teacher answers, or, after the commit point, an error frame."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from routers.confidence import Confidence
from routers.router import Router
from serving.lm_plan import LmPlan
from serving.releases import ReleaseStore

Start = Callable[..., Any]
Json = dict[str, Any]
TEACHERS = "The teacher says this."


def told(delta: Json, *, index: int = 0, finish: object = None, sure: bool = True, **more: Any) -> bytes:
    entries = [{"token": "late", "logprob": -0.01, "top_logprobs": []}] if sure else []
    choice = {
        "index": index,
        "delta": delta,
        "logprobs": {"content": entries},
        "finish_reason": finish,
        **more,
    }
    return b"data: " + json.dumps({"id": "1", "choices": [choice]}).encode() + b"\n\n"


LATE = told({"content": "late"})
END = told({}, finish="stop", sure=False) + b"data: [DONE]\n\n"


def deep(levels: int) -> object:
    made: object = "x"
    for _ in range(levels):
        made = {"a": made}
    return made


class Saying:
    """A student's server that answers with these bytes."""

    def __init__(self) -> None:
        self.body = b""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        while (await receive()).get("more_body", False):
            pass
        headers = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": self.body})


@pytest.fixture
def made(serve: Start, stand_in: Start, gateway: Start, tmp_path: Path) -> Start:
    def start(**changes: Any) -> tuple[Saying, Any]:
        student = Saying()
        given = {"base_url": f"{serve(student)}/v1", "model": "small", "checkpoints": (), "commit_tokens": 1}
        plan = LmPlan(**{**given, "hold_back_s": 10.0, **changes})
        store = ReleaseStore(tmp_path / "state")
        router = Router(Confidence.of_score(1.0, 0.0), rank_threshold=1.0)
        files = {**plan.files(), "router.json": router.dump()}
        store.set_live("intents", store.write("intents", files, {"student": "lm"}))
        big = stand_in({}, model="big", default=TEACHERS)
        task = {"name": "intents", "match": {"model": "intents"}, "audit_rate": 1e-9}
        return student, gateway(big.url, task=[task])

    return start


def test_a_student_that_is_away_is_told_of_now_and_then(
    made: Start, caplog: pytest.LogCaptureFixture
) -> None:
    _, running = made(base_url="http://127.0.0.1:9/v1")
    for _ in range(20):
        raw, text = asked(running, stream=False)
        assert (text, raw.headers["x-understudy-reason"]) == (TEACHERS, "student_error")
    told = [said for said in caplog.messages if "the student of release" in said]
    assert 1 <= len(told) <= 6, "away, then left alone: each is told at once, and again every few seconds"
    failed = running.metric("understudy_upstream_errors_total", upstream="student", kind="unavailable")
    assert failed == 20


def asked(running: Any, *, stream: bool) -> tuple[Any, str]:
    body = {"model": "intents", "messages": [{"role": "user", "content": "where"}], "stream": stream}
    raw = running.post(json=body)
    assert raw.status_code == 200, raw.text
    if not stream:
        return raw, raw.json()["choices"][0]["message"]["content"]
    events = [line.removeprefix("data: ") for line in raw.text.splitlines() if line]
    read = [json.loads(event) for event in events if event != "[DONE]"]
    return raw, "".join(
        choice["delta"].get("content") or "" for chunk in read for choice in chunk.get("choices", [])
    )


@pytest.mark.parametrize(
    "garbage",
    [
        told({"content": "lost"}, index=1),
        told({"content": 5}),
        told({"content": "late"}, finish={"a": 1}),
        told({"tool_calls": ["late"]}),
    ],
    ids=["another choice", "no text", "no reason", "no call"],
)
def test_what_is_no_answer_is_the_teachers_or_an_error(made: Start, garbage: bytes) -> None:
    student, running = made()
    student.body = garbage + END
    for stream in (False, True):
        raw, said = asked(running, stream=stream)
        assert (said, raw.headers["x-understudy-reason"]) == (TEACHERS, "student_error")
    student.body = LATE + garbage + END
    raw, said = asked(running, stream=False)
    assert (said, raw.headers["x-understudy-reason"]) == (TEACHERS, "student_error")
    raw, said = asked(running, stream=True)
    assert (said, raw.headers["x-understudy-route"]) == ("late", "student")
    assert json.loads(raw.text.splitlines()[-2].removeprefix("data: "))["error"]["type"] == "upstream_error"
    assert "[DONE]" not in raw.text


@pytest.mark.parametrize("levels", [300, 900])
def test_what_is_nested_too_deeply_to_be_written_is_left_out(made: Start, levels: int) -> None:
    student, running = made()
    student.body = told({"content": "late", "odd": deep(levels)}, odd=deep(levels)) + LATE + END
    for stream in (False, True):
        raw, said = asked(running, stream=stream)
        assert (said, raw.headers["x-understudy-reason"]) == ("latelate", "confident")
        assert "odd" not in raw.text


def test_no_tokens_are_less_than_none(made: Start) -> None:
    student, running = made()
    usage = {"prompt_tokens": -5, "completion_tokens": -7, "total_tokens": -12}
    student.body = LATE + b"data: " + json.dumps({"choices": [], "usage": usage}).encode() + b"\n\n" + END
    raw, _ = asked(running, stream=False)
    assert raw.json()["usage"] == {"prompt_tokens": 2, "completion_tokens": 1, "total_tokens": 3}
    (exchange,) = running.exchanges()
    assert exchange.student.usage["completion_tokens"] == 1


@pytest.mark.parametrize("base_url", ["http://127.0.0.1:99999/v1", "http://me:s3cret@127.0.0.1:9/v1"])
def test_a_student_that_cant_be_asked_at_all_isnt_the_clients_fault(
    made: Start, monkeypatch: pytest.MonkeyPatch, base_url: str
) -> None:
    monkeypatch.setenv("STUDENT_KEY", "k")
    _, running = made(base_url=base_url, api_key_env="STUDENT_KEY")
    for stream in (False, True):
        raw, said = asked(running, stream=stream)
        assert (said, raw.headers["x-understudy-reason"]) == (TEACHERS, "student_error")
