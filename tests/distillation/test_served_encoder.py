"""A classifier behind a server as a task's student: from a log to a release, to a gateway that answers with it."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest

from distillation.economics import summarise
from distillation.evaluate import evaluate
from distillation.learning import Lesson, learn
from serving.classify_plan import ClassifyPlan
from serving.releases import ReleaseStore
from serving.settings import Settings
from serving.student_choice import StudentChoice
from serving.task_settings import TaskSettings

Make = Callable[..., Any]
LABELS = ("card", "parcel", "refund")
COUNT = 300


class Classifier:
    """Knows most of the messages, and is less sure where it is wrong. `asked` holds what it was asked."""

    def __init__(self, count: int = COUNT, wrong: float = 0.25) -> None:
        chance = random.Random(1)
        self.asked: list[str] = []
        self.broken = False
        self.teacher: dict[str, str] = {}
        self.probs: dict[str, list[float]] = {}
        for number in range(count):
            right = chance.randrange(len(LABELS))
            fails = chance.random() < wrong
            given = (right + 1) % len(LABELS) if fails else right
            sure = chance.uniform(0.4, 0.75) if fails else chance.uniform(0.6, 0.999)
            probs = [(1.0 - sure) / 2] * len(LABELS)
            probs[given] = sure
            text = f"message {number}"
            self.teacher[text], self.probs[text] = LABELS[right], probs

    def __call__(self, text: str) -> list[float] | tuple[int, Any]:
        self.asked.append(text)
        if self.broken:
            return 503, {"error": {"message": "dead"}}
        if len(text) > 1000:
            return 400, {"error": {"message": "maximum context length"}}
        return self.probs.get(text, [0.4, 0.3, 0.3])


def settings(state: Path, url: str, **student: Any) -> Settings:
    choice = StudentChoice(kind="encoder", base_url=url, model="bert", **student)
    task = TaskSettings(
        name="intents", match={"model": "intents"}, max_disagreement=0.1, certainty=0.9, student=choice
    )
    return Settings(state_dir=state, task=[task])


def lesson(configured: Settings) -> Lesson:
    (found,) = learn(configured, "intents")
    return found


def test_from_a_log_to_a_release_and_its_evaluation(
    write_log: Make, exchanges: Make, classifier: Make
) -> None:
    model = Classifier()
    state = write_log(exchanges(model.teacher.items()))
    configured = settings(state, classifier(model, LABELS))
    (summary,) = summarise(configured)
    assert (summary.labels, summary.outlook, summary.sees) == (COUNT, "yes: a look is due", "message")
    found = lesson(configured)
    assert (found.outcome, found.release) == ("released", "r0001"), found.message
    assert found.look is not None
    assert 0.3 < found.look["coverage"] < 0.9
    about = {name: found.look[name] for name in ("student", "model", "sees", "refused", "gives_up")}
    assert about == {"student": "encoder", "model": "bert", "sees": "message", "refused": 0, "gives_up": None}
    assert len(model.asked) == COUNT
    release = ReleaseStore(state).read("intents", "r0001")
    assert set(release.files) == {"student.json", "router.json", "held_out.json"}
    plan = ClassifyPlan.of(configured.for_task("intents").student)
    plan = replace(plan, classes=3, labels=tuple(enumerate(LABELS)))
    assert ClassifyPlan.load(release.files) == plan
    judged = evaluate(configured, "intents")
    assert (judged.student, judged.live) == ("encoder", True)
    assert judged.log is not None
    assert judged.log.labels == COUNT
    assert judged.log.agreement.value == pytest.approx(found.look["agreement"])
    write_log(exchanges(model.teacher.items(), start=2_000_000.0))
    assert lesson(configured).outcome == "released", "past decisions are redone"
    assert len(model.asked) == 2 * COUNT, "nobody is asked twice"


def test_what_it_was_trained_on_is_no_label(write_log: Make, exchanges: Make, classifier: Make) -> None:
    model = Classifier(count=100)
    state = write_log(exchanges(model.teacher.items(), start=1_000_000.0))
    until = datetime.fromtimestamp(1_000_019.5, UTC)
    found = lesson(settings(state, classifier(model, LABELS), trained_until=until))
    assert found.labels == 80
    assert not {f"message {number}" for number in range(20)} & set(model.asked)


def test_a_server_that_fails_holds_the_look(write_log: Make, exchanges: Make, classifier: Make) -> None:
    model = Classifier(count=80)
    model.broken = True
    state = write_log(exchanges(model.teacher.items()))
    found = lesson(settings(state, classifier(model, LABELS)))
    assert found.outcome == "held"
    assert "status 503" in found.message


def test_a_model_without_names_is_told(write_log: Make, exchanges: Make, classifier: Make) -> None:
    model = Classifier(count=80)
    state = write_log(exchanges(model.teacher.items()))
    found = lesson(settings(state, classifier(model, ("LABEL_0", "LABEL_1", "LABEL_2"))))
    assert found.outcome == "held"
    assert "must carry id2label" in found.message


def test_a_gateway_answers_with_it(
    write_log: Make, exchanges: Make, classifier: Make, stand_in: Make, gateway: Make
) -> None:
    model = Classifier()
    url = classifier(model, LABELS)
    state = write_log(exchanges(model.teacher.items()))
    configured = settings(state, url)
    assert lesson(configured).release == "r0001"
    sure = max(model.probs, key=lambda text: max(model.probs[text]))
    long = "x" * 2000
    teacher = stand_in({**model.teacher, long: "card"}, model="big")
    running = gateway(teacher.url, task=[task.model_dump(exclude_unset=True) for task in configured.task])
    with running.client() as client:
        answer = client.chat.completions.with_raw_response.create(**body(sure))
        assert answer.headers["x-understudy-route"] == "student"
        assert answer.parse().choices[0].message.content == model.teacher[sure]
        streamed = client.chat.completions.create(**body(sure), stream=True)
        pieces = [chunk.choices[0].delta.content or "" for chunk in streamed if chunk.choices]
        assert "".join(pieces) == model.teacher[sure]
        unsure = client.chat.completions.with_raw_response.create(**body("message 1"))
        assert unsure.headers["x-understudy-route"] in ("student", "teacher")
        refused = client.chat.completions.with_raw_response.create(**body(long))
        assert refused.headers["x-understudy-reason"] == "unsupported:refused"
        tools = running.post(json=body(sure, tools=[{"type": "function", "function": {"name": "f"}}]))
        assert tools.headers["x-understudy-reason"] == "unsupported:tools"
        model.broken = True
        failed = client.chat.completions.with_raw_response.create(**body(sure))
        assert failed.headers["x-understudy-reason"] == "student_error"
        assert failed.headers["x-understudy-route"] == "teacher"
    served = next(exchange for exchange in running.exchanges() if exchange.by_student)
    assert (served.student.model, served.student.signals.keys()) == ("bert", {"probability", "entropy"})
    assert running.metric("understudy_upstream_errors_total", upstream="student", kind="unavailable") == 1
    assert httpx.get(f"{running.url}/readyz", verify=False).status_code == 200


def test_another_model_under_its_name_is_believed_by_no_gateway_and_judged_by_no_look(
    write_log: Make, exchanges: Make, classifier: Make, stand_in: Make, gateway: Make
) -> None:
    model, labels = Classifier(), [*LABELS]
    state = write_log(exchanges(model.teacher.items()))
    configured = settings(state, classifier(model, labels))
    assert lesson(configured).release == "r0001"
    labels[:] = [
        "parcel",
        "refund",
        "card",
    ]  # what is served now, before anybody of the new processes has asked
    sure = max(model.probs, key=lambda text: max(model.probs[text]))
    teacher = stand_in(model.teacher, model="big")
    running = gateway(teacher.url, task=[task.model_dump(exclude_unset=True) for task in configured.task])
    with running.client() as client:
        answer = client.chat.completions.with_raw_response.create(**body(sure))
    assert answer.headers["x-understudy-reason"] == "student_error"
    assert answer.parse().choices[0].message.content == model.teacher[sure]
    more = exchanges(
        ((f"another {number}", "card") for number in range(200)), start=2_000_000.0, release="r0001"
    )
    write_log(more)
    found = lesson(configured)
    assert found.outcome == "held"
    assert "is it another model?" in found.message


def body(text: str, **more: Any) -> dict[str, Any]:
    return {"model": "intents", "messages": [{"role": "user", "content": text}], **more}
