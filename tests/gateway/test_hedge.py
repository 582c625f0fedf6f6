"""Hedges: the teacher beside the student where an escalation is foreseen; needed or thrown away, and paid for."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from routers.confidence import Confidence
from routers.foresight import FORESIGHT_FILE, WIDTH, Foresight, features
from routers.meter import TokenMeter
from routers.router import Router
from serving.lm import LmStudent
from serving.lm_plan import LmPlan
from serving.recording import Recorded, Recording
from serving.releases import ReleaseStore
from serving.stand_in import create_stand_in
from serving.stand_in_call import StandInHttp
from serving.student_choice import StudentChoice

Start = Callable[..., Any]
ROWS = (
    Recorded("poem sure", "roses", confidence=0.99),
    Recorded("poem unsure", "violets", confidence=0.2),
    Recorded("parcel sure", "late", confidence=0.99),
    Recorded("parcel unsure", "lost", confidence=0.2),
)
TEACHER = {row.text: f"the teacher's {row.teacher}" for row in ROWS}
LM = {"kind": "lm", "base_url": "http://127.0.0.1:9/v1", "model": "small"}


def body(text: str, **more: Any) -> dict[str, Any]:
    return {"model": "intents", "messages": [{"role": "user", "content": text}], **more}


def foresees_poems() -> Foresight:
    (place, sign), *_ = ((p, 1 if v > 0 else -1) for p, v in features("poem").items())
    weights = [0.0] * WIDTH
    weights[place] = -1.0 * sign
    return Foresight(tuple(weights), bias=1.0, slope=4.0, offset=-2.0, skip_below=None, student_s=0.2)


class Live:
    def __init__(self, running: Any, teacher: Any, student: str) -> None:
        self.running, self.teacher, self._student = running, teacher, student

    def student_stats(self) -> dict[str, int]:
        stats: dict[str, int] = httpx.get(f"{self._student}/stats").json()
        return stats

    def hedges(self, outcome: str) -> float:
        return float(self.running.metric("understudy_hedges_total", task="intents", outcome=outcome))

    def first_token_s(self, text: str) -> float:
        with self.running.client() as client:
            began = time.perf_counter()
            for chunk in client.chat.completions.create(**body(text, stream=True)):
                if chunk.choices and chunk.choices[0].delta.content:
                    return time.perf_counter() - began
        raise AssertionError("no token came")


@pytest.fixture
def live(serve: Start, stand_in: Start, gateway: Start, tmp_path: Path) -> Start:
    def start(
        student_ms: int = 0,
        teacher_ms: int = 0,
        *,
        hedge: bool = True,
        teacher_limit: int = 50,
        task: dict[str, Any] | None = None,
    ) -> Live:
        app = create_stand_in(
            Recording(Path("student.csv"), ROWS),
            model="small",
            latency_ms=student_ms,
            latency_spread=0.0,
            tokens_per_s=1000,
        )
        small = serve(app, http=StandInHttp)
        plan = LmPlan(
            base_url=f"{small}/v1",
            model="small",
            checkpoints=(),
            commit_tokens=8,
            hold_back_s=20.0,
            timeout_s=20.0,
        )
        files = {
            **LmStudent.of(plan, TokenMeter).files(),
            "router.json": Router(Confidence.of_score(1.0, 0.0), rank_threshold=1.0).dump(),
            FORESIGHT_FILE: foresees_poems().dump(),
        }
        store = ReleaseStore(tmp_path / "state")
        store.set_live("intents", store.write("intents", files, {"student": "lm"}))
        big = stand_in(TEACHER, model="big", latency_ms=teacher_ms, latency_spread=0.0, tokens_per_s=1000)
        settings = {
            "name": "intents",
            "match": {"model": "intents"},
            "audit_rate": 1e-9,
            "student": {**LM, "hedge": hedge},
            **(task or {}),
        }
        teacher = {"max_concurrency": teacher_limit}
        return Live(gateway(big.url, task=[settings], teacher=teacher), big, small)

    return start


@pytest.mark.parametrize("stream", [False, True])
def test_an_escalation_takes_what_the_hedge_brings(live: Start, stream: bool) -> None:
    made = live()
    answer = made.running.post(json=body("poem unsure", stream=stream))
    assert "the teacher's violets" in answer.text.replace('"},"', "") or stream
    assert answer.headers["x-understudy-route"] == "teacher"
    assert answer.headers["x-understudy-reason"] == "low_confidence"
    assert made.teacher.stats()["chat"] == 1
    (exchange,) = made.running.exchanges()
    assert exchange.teacher.choices[0]["message"]["content"] == "the teacher's violets"
    assert exchange.propensity == 1.0
    assert made.hedges("used") == 1


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("student_ms", "teacher_ms"), [(0, 3000), (600, 0)])
def test_an_accepted_answer_drops_the_hedge_and_its_cost_is_counted(
    live: Start, eventually: Start, stream: bool, student_ms: int, teacher_ms: int
) -> None:
    """Whether the teacher was done or not: its answer is thrown away, and is no label."""
    made = live(student_ms, teacher_ms)
    answer = made.running.post(json=body("poem sure", stream=stream))
    assert answer.headers["x-understudy-route"] == "student"
    assert "roses" in answer.text and "the teacher" not in answer.text
    assert made.hedges("dropped") == 1
    (exchange,) = made.running.exchanges()
    assert exchange.teacher is None
    assert exchange.propensity == 1e-9
    spent = made.running.metric("understudy_cost_usd_total", task="intents", route="teacher")
    if teacher_ms:
        eventually(lambda: made.teacher.stats()["disconnected"] == made.teacher.stats()["chat"])
        assert made.teacher.stats()["chat"] <= 1
    else:
        assert spent > 0
    assert exchange.cost_usd == pytest.approx(exchange.student.cost_usd + spent)


def test_only_foreseen_escalations_are_hedged(live: Start) -> None:
    made = live()
    assert made.running.post(json=body("parcel sure")).headers["x-understudy-route"] == "student"
    assert made.running.post(json=body("parcel unsure")).headers["x-understudy-route"] == "teacher"
    assert made.hedges("used") == made.hedges("dropped") == 0
    assert made.teacher.stats()["chat"] == 1


def test_it_is_off_by_default(live: Start) -> None:
    made = live(hedge=False)
    made.running.post(json=body("poem sure"))
    assert made.teacher.stats()["chat"] == 0
    assert StudentChoice(**LM).hedge is False


def test_a_linear_student_has_none() -> None:
    with pytest.raises(ValueError, match=r'"linear" has no hedge: .*"lm"'):
        StudentChoice(hedge=True)


def test_a_teacher_that_fails_costs_an_accepted_answer_nothing(live: Start) -> None:
    made = live(student_ms=200)
    made.teacher.fail({"status": 503})
    answer = made.running.post(json=body("poem sure"))
    assert answer.status_code == 200 and answer.headers["x-understudy-route"] == "student"
    (exchange,) = made.running.exchanges()
    assert exchange.cost_usd == exchange.student.cost_usd


def test_a_teacher_that_fails_an_escalation_says_so(live: Start) -> None:
    made = live()
    made.teacher.fail({"status": 503})
    assert made.running.post(json=body("poem unsure")).status_code == 503


def test_a_student_that_fails_leaves_it_to_the_hedge(live: Start) -> None:
    made = live()
    httpx.post(f"{made._student}/failures", content='{"status": 500}').raise_for_status()
    answer = made.running.post(json=body("poem sure"))
    assert answer.headers["x-understudy-reason"] == "student_error"
    assert "the teacher's roses" in answer.text
    assert made.teacher.stats()["chat"] == 1


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_both(live: Start, eventually: Start, stream: bool) -> None:
    made = live(student_ms=20_000, teacher_ms=20_000)

    def leave() -> None:
        with pytest.raises(httpx.ReadTimeout):
            made.running.post(json=body("poem sure", stream=stream), timeout=1.0)

    thread = threading.Thread(target=leave)
    thread.start()
    eventually(lambda: made.teacher.stats()["chat"] == 1 and made.student_stats()["chat"] == 1)
    thread.join()
    eventually(lambda: made.teacher.stats()["disconnected"] == 1)
    eventually(lambda: made.student_stats()["disconnected"] == 1)


def test_an_escalated_stream_begins_with_the_slower_of_the_two(live: Start) -> None:
    """A student of 400 ms before a teacher of 600 ms: one after the other that is a second."""
    made = live(400, 600)
    hedged = statistics.median(made.first_token_s("poem unsure") for _ in range(3))
    plain = statistics.median(made.first_token_s("parcel unsure") for _ in range(3))
    assert plain >= 1.0
    assert 0.6 <= hedged < plain - 0.2, f"{hedged:.3f} s with a hedge, {plain:.3f} s without"
