"""A live `lm` student, for whole answers: what it answers, what goes to the teacher, and how its failures end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from routers.confidence import Confidence
from routers.meter import TokenMeter
from routers.router import Router
from serving.lm import LmStudent
from serving.lm_plan import LmPlan
from serving.recording import Recorded, Recording
from serving.releases import ReleaseStore
from serving.stand_in import create_stand_in
from serving.stand_in_call import StandInHttp

Start = Callable[..., Any]
ROWS = (
    Recorded("parcel lost", "lost", confidence=0.95),
    Recorded("what", "cancel", confidence=0.4),
    Recorded("silent", "lost"),
)
TEACHER = {"parcel lost": "lost", "what": "unclear", "silent": "lost"}
ROUTER = Router(Confidence.of_score(1.0, 0.0), rank_threshold=1.0)


def body(text: str, **more: Any) -> dict[str, Any]:
    return {"model": "intents", "messages": [{"role": "user", "content": text}], **more}


@pytest.fixture
def live(serve: Start, stand_in: Start, gateway: Start, tmp_path: Path) -> Start:
    """Start a gateway with a live `lm` release before a teacher; gives both. `url`: another student's."""

    def start(url: str | None = None, **task: Any) -> Any:
        small = serve(create_stand_in(Recording(Path("student.csv"), ROWS), model="small"), http=StandInHttp)
        student = LmStudent.of(LmPlan(base_url=f"{url or small}/v1", model="small"), TokenMeter)
        store = ReleaseStore(tmp_path / "state")
        name = store.write("intents", {**student.files(), "router.json": ROUTER.dump()}, {"student": "lm"})
        store.set_live("intents", name)
        teacher = stand_in(TEACHER, model="big")
        return gateway(
            teacher.url,
            task=[{"name": "intents", "match": {"model": "intents"}, "audit_rate": 0.0001, **task}],
        ), teacher

    return start


def test_a_sure_answer_is_served_and_an_unsure_one_escalated(live: Start) -> None:
    running, teacher = live()
    with running.client() as client:
        sure = client.chat.completions.with_raw_response.create(**body("parcel lost"))
        unsure = client.chat.completions.with_raw_response.create(**body("what"))
    assert sure.parse().choices[0].message.content == "lost"
    assert sure.parse().choices[0].logprobs is None
    assert sure.headers["x-understudy-route"] == "student"
    assert float(sure.headers["x-understudy-confidence"]) == pytest.approx(0.95, abs=1e-3)
    assert unsure.parse().choices[0].message.content == "unclear"
    assert unsure.headers["x-understudy-reason"] == "low_confidence"
    assert teacher.stats()["chat"] == 1
    accepted, escalated = running.exchanges()
    assert accepted.student.model == "small"
    assert accepted.student.usage["completion_tokens"] == 1
    assert escalated.student.choices[0]["message"]["content"] == "cancel"
    assert escalated.agreement is False
    assert escalated.cost_usd == pytest.approx(escalated.teacher.cost_usd + escalated.student.cost_usd)


def test_one_without_log_probabilities_is_never_trusted(live: Start) -> None:
    running, _ = live()
    answer = running.post(json=body("silent"))
    assert answer.headers["x-understudy-route"] == "teacher"
    assert answer.headers["x-understudy-reason"] == "no_signals"
    (exchange,) = running.exchanges()
    assert exchange.eligible
    assert exchange.propensity == 1.0


def test_one_that_isnt_there_costs_nothing_but_the_teacher(live: Start) -> None:
    running, _ = live(url="http://127.0.0.1:9")
    for _ in range(30):
        answer = running.post(json=body("parcel lost"))
        assert answer.json()["choices"][0]["message"]["content"] == "lost"
        assert answer.headers["x-understudy-reason"] == "student_error"
    assert not any(exchange.eligible for exchange in running.exchanges())
    assert running.metric("understudy_upstream_errors_total", upstream="student", kind="unavailable") > 0
