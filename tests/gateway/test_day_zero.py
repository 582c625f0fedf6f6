"""Before any release: everything goes to the teacher, and an existing client notices nothing."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest

Start = Callable[..., Any]
ANSWERS = {"where is it": "delivery", "money back": "refund", "long one": "one two three four five six"}


def asks(text: str) -> list[Any]:
    return [{"role": "system", "content": "Label."}, {"role": "user", "content": text}]


def body(text: str, **more: Any) -> dict[str, Any]:
    return {"model": "gpt-4o-mini", "messages": asks(text), **more}


def test_a_client_gets_the_teachers_answer(stand_in: Start, gateway: Start) -> None:
    running = gateway(stand_in(ANSWERS, api_key="teacher-key").url)
    with running.client() as client:
        raw = client.chat.completions.with_raw_response.create(model="m", messages=asks("money back"))
        answer = raw.parse()
    assert answer.choices[0].message.content == "refund"
    assert answer.usage is not None
    assert raw.headers["x-understudy-route"] == "teacher"
    assert raw.headers["x-understudy-reason"] == "no_release"
    assert re.fullmatch(r"auto-[0-9a-f]{12}", raw.headers["x-understudy-task"])
    assert raw.headers["x-request-id"].startswith("req_")
    cost = answer.usage.prompt_tokens * 10e-6 + answer.usage.completion_tokens * 30e-6
    assert float(raw.headers["x-understudy-cost-usd"]) == pytest.approx(cost)
    assert "x-understudy-release" not in raw.headers


def test_a_stream_is_the_teachers_stream(stand_in: Start, gateway: Start) -> None:
    running = gateway(stand_in(ANSWERS).url)
    with running.client() as client:
        plain = list(client.chat.completions.create(model="m", messages=asks("long one"), stream=True))
        asked = list(
            client.chat.completions.create(
                model="m", messages=asks("long one"), stream=True, stream_options={"include_usage": True}
            )
        )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in plain)
    assert text == ANSWERS["long one"]
    assert all(chunk.choices for chunk in plain), "usage is only for those who asked for it"
    assert asked[-1].choices == []
    assert asked[-1].usage is not None
    first, second = running.exchanges()
    assert first.teacher.choices[0]["message"]["content"] == ANSWERS["long one"]
    assert first.teacher.usage == second.teacher.usage == asked[-1].usage.model_dump(exclude_none=True)


def test_the_log_has_the_exchange_before_the_answer_ends(stand_in: Start, gateway: Start) -> None:
    running = gateway(stand_in(ANSWERS).url)
    whole = running.post(json=body("money back", temperature=0), headers={"authorization": "Bearer k"})
    (exchange,) = running.exchanges()
    assert exchange.request == body("money back", temperature=0)
    assert exchange.request_id == whole.headers["x-request-id"]
    assert exchange.task == whole.headers["x-understudy-task"]
    assert exchange.route == "teacher"
    assert exchange.reason == "no_release"
    assert exchange.eligible
    assert exchange.propensity == 1.0
    assert exchange.teacher.choices == whole.json()["choices"]
    assert exchange.teacher.trainable
    assert exchange.cost_usd == pytest.approx(float(whole.headers["x-understudy-cost-usd"]))
    assert "Bearer k" not in str(exchange) and exchange.tenant != "k"
    logged_at_done = None
    with httpx.stream(
        "POST", f"{running.url}/v1/chat/completions", verify=False, json=body("where is it", stream=True)
    ) as r:
        for line in r.iter_lines():
            if line == "data: [DONE]":
                logged_at_done = len(running.exchanges())
    assert logged_at_done == 2
    assert "x-understudy-cost-usd" not in r.headers


def test_unknown_fields_reach_the_teacher(serve: Start, gateway: Start) -> None:
    import json

    seen: list[dict[str, Any]] = []

    async def teacher(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        raw = b""
        while True:
            message = await receive()
            raw += message["body"]
            if not message["more_body"]:
                break
        seen.append(json.loads(raw))
        answer = {
            "id": "x",
            "object": "chat.completion",
            "created": 1,
            "model": "m",
            "choices": [
                {"index": 0, "message": {"role": "assistant", "content": "a"}, "finish_reason": "stop"}
            ],
            "surprise": {"kept": True},
        }
        await send({"type": "http.response.start", "status": 200, "headers": [(b"x-ratelimit-left", b"7")]})
        await send({"type": "http.response.body", "body": json.dumps(answer).encode()})

    running = gateway(serve(teacher))
    sent = body("hello", store=True, made_up={"deep": [1, None]}, metadata={"a": "b"})
    answer = running.post(json=sent)
    assert seen == [sent]
    assert answer.json()["surprise"] == {"kept": True}
    assert answer.headers["x-ratelimit-left"] == "7"


def test_store_false_leaves_nothing_in_the_log_and_still_reaches_the_teacher(
    stand_in: Start, gateway: Start
) -> None:
    running = gateway(stand_in(ANSWERS).url)
    assert running.post(json=body("money back", store=False)).status_code == 200
    assert running.post(json=body("money back", store=True)).status_code == 200
    assert [exchange.request["store"] for exchange in running.exchanges()] == [True]
    assert running.metric("understudy_exchanges_logged_total") == 1
    assert running.metric("understudy_requests_total", code="200") == 2


def test_prompts_with_other_numbers_are_one_task_and_other_prompts_another(
    stand_in: Start, gateway: Start
) -> None:
    running = gateway(stand_in(ANSWERS, default="x").url, server={"max_tasks": 2})
    tasks = [
        running.post(
            json={"model": "m", "messages": [{"role": "system", "content": system}, *asks("hi")[1:]]}
        ).headers["x-understudy-task"]
        for system in ("Today is day 1.", "Today is day 2.", "Translate.", "Translate.", "Summarise.")
    ]
    assert tasks[0] == tasks[1]
    assert tasks[2] == "other", "the last place takes more than one answer"
    assert tasks[3] not in ("other", tasks[0])
    assert tasks[4] == "other"


def test_a_configured_task_is_found_by_header_and_rule(stand_in: Start, gateway: Start) -> None:
    running = gateway(
        stand_in(ANSWERS).url,
        task=[
            {"name": "intents", "match": {"model": "intents-alias"}},
            {"name": "tagged", "match": {"metadata": {"job": "tag"}}},
            {"name": "prompted", "match": {"system": "^Lab.l"}},
        ],
    )

    def task_of(headers: dict[str, str] | None = None, **more: Any) -> str:
        answer = running.post(json={**body("money back"), **more}, headers=headers)
        return str(answer.headers["x-understudy-task"])

    assert task_of() == "prompted"
    assert task_of(model="intents-alias") == "intents"
    assert task_of(metadata={"job": "tag"}) == "tagged"
    assert task_of({"x-understudy-task": "intents"}) == "intents"
    assert task_of({"x-understudy-task": "made-up-by-client"}) == "prompted"


def test_forcing_a_route(stand_in: Start, gateway: Start) -> None:
    running = gateway(stand_in(ANSWERS).url)
    forced = running.post(json=body("money back"), headers={"x-understudy-route": "teacher"})
    assert forced.headers["x-understudy-reason"] == "forced"
    (exchange,) = running.exchanges()
    assert not exchange.eligible
    assert exchange.propensity is None
    refused = running.post(json=body("money back"), headers={"x-understudy-route": "student"})
    assert refused.status_code == 400
    assert "no live release" in refused.json()["error"]["message"]
    assert refused.headers["x-understudy-reason"] == "refused", "nobody was asked"
    nonsense = running.post(json=body("money back"), headers={"x-understudy-route": "both"})
    assert nonsense.status_code == 400
    assert nonsense.json()["error"]["param"] == "x-understudy-route"


def test_a_retry_takes_the_place_of_the_first_attempt(
    stand_in: Start, gateway: Start, eventually: Start
) -> None:
    running = gateway(stand_in(ANSWERS).url, task_defaults={"audit_rate": 1.0})
    running.post(json=body("money back"))
    running.post(json=body("money back"), headers={"x-stainless-retry-count": "1"})
    eventually(lambda: running.exchanges()[0].superseded_by is not None)
    first, second = running.exchanges()
    assert first.superseded_by == second.id
    assert second.superseded_by is None
    assert second.eligible
    assert second.coin
    running.post(json=body("where is it"), headers={"x-stainless-retry-count": "2"})
    assert not running.exchanges()[2].eligible, "what it repeats was never seen"


def test_a_log_that_fails_fails_no_request(stand_in: Start, gateway: Start) -> None:
    running = gateway(stand_in(ANSWERS).url)
    task = running.post(json=body("money back")).headers["x-understudy-task"]
    other = body("where is it")
    other["messages"][0]["content"] = "Another prompt."
    # A file where the next task's folder should be: even root can't write below it.
    from serving.fingerprint import fingerprint

    blocked = running.state_dir / "tasks" / f"auto-{fingerprint(other)}"
    blocked.write_text("")
    for stream in (False, True):
        answer = running.post(json={**other, "stream": stream})
        assert answer.status_code == 200
    assert answer.text.endswith("data: [DONE]\n\n")
    assert running.metric("understudy_exchanges_lost_total", task=blocked.name) == 2
    assert running.metric("understudy_exchanges_logged_total", task=task) == 1


def test_models_come_from_the_teacher(stand_in: Start, gateway: Start) -> None:
    running = gateway(stand_in(ANSWERS, model="big", api_key="teacher-key").url)
    with running.client() as client:
        assert [model.id for model in client.models.list()] == ["big"]
        assert client.models.retrieve("big").id == "big"
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("absent")
