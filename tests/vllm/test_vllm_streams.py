"""Long answers of a model on vLLM: streamed on from the commit point, given up with their client, ended by a crash."""

from __future__ import annotations

import asyncio
import http.client
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest

from routers.confidence import Confidence
from routers.meter import TokenMeter
from routers.router import Router
from serving.lm import LmStudent
from serving.lm_plan import LmPlan
from serving.releases import ReleaseStore

Make = Callable[..., Any]
PROMPT = Path(__file__).with_name("reply_prompt.txt").read_text(encoding="utf-8").strip()
TEXT = "Where is my parcel?"
TEACHERS = "A colleague looks for it."
RUNNING = "vllm:num_requests_running"
# It goes round in circles with this until it may say no more: seconds of tokens.
LONG = {"frequency_penalty": -2.0, "max_tokens": 900}


def asked(**more: Any) -> dict[str, Any]:
    messages = [{"role": "system", "content": PROMPT}, {"role": "user", "content": TEXT}]
    return {"model": "replies", "messages": messages, **more}


def fresh(**more: Any) -> dict[str, Any]:
    """The same for the gateway, which is to ask each time."""
    return asked(extra_headers={"cache-control": "no-store"}, **more)


@pytest.fixture
def live(stand_in: Make, gateway: Make, tmp_path: Path) -> Make:
    """Start a gateway with a live release of the model on a vLLM, which accepts whatever it says."""

    def start(vllm: Any, commit_tokens: int = 8) -> Any:
        plan = LmPlan(
            f"{vllm.url}/v1",
            vllm.model,
            checkpoints=(),
            commit_tokens=commit_tokens,
            hold_back_s=60.0,
            timeout_s=60.0,
        )
        router = Router(Confidence.of_score(1.0, 0.0), rank_threshold=-1000.0)
        store = ReleaseStore(tmp_path / "state")
        files = {**LmStudent.of(plan, TokenMeter).files(), "router.json": router.dump()}
        store.set_live("replies", store.write("replies", files, {"student": "lm"}))
        teacher = stand_in({TEXT: TEACHERS}, model="big")
        return gateway(
            teacher.url, task=[{"name": "replies", "match": {"model": "replies"}, "audit_rate": 0.0001}]
        )

    return start


def test_a_long_answer_is_streamed_as_the_model_says_it(vllm: Any, live: Make) -> None:
    running = live(vllm)
    direct = vllm.post("/v1/chat/completions", asked(model=vllm.model, temperature=0)).json()
    expected = direct["choices"][0]["message"]["content"]
    with running.client(timeout=120) as client:
        raw = client.chat.completions.with_raw_response.create(
            **fresh(stream=True, stream_options={"include_usage": True})
        )
        chunks = list(raw.parse())
    assert raw.headers["x-understudy-route"] == "student"
    said = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(said) == expected
    assert len([piece for piece in said if piece]) > 20, "not all in one piece"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == direct["usage"]["completion_tokens"]


def test_many_streams_at_once_are_not_mixed_up(vllm: Any, live: Make) -> None:
    running = live(vllm)
    direct = vllm.post("/v1/chat/completions", asked(model=vllm.model, temperature=0)).json()
    options: dict[str, Any] = {"base_url": f"{running.url}/v1", "api_key": "client-key", "timeout": 120}

    async def all_of_them() -> list[str]:
        async with openai.AsyncOpenAI(max_retries=0, **options) as client:

            async def one(limit: int) -> str:
                stream = await client.chat.completions.create(**fresh(stream=True, max_tokens=limit))
                return "".join([each.choices[0].delta.content or "" async for each in stream if each.choices])

            return await asyncio.gather(*(one(limit) for limit in range(20, 36)))

    whole = direct["choices"][0]["message"]["content"]
    replies = asyncio.run(all_of_them())
    assert all(whole.startswith(reply) for reply in replies)
    assert [len(reply) for reply in replies] == sorted({len(reply) for reply in replies})


@pytest.mark.parametrize("committed", [True, False], ids=["in its middle", "before its first byte"])
def test_a_client_that_leaves_is_no_longer_worked_for(
    vllm: Any, live: Make, patiently: Make, committed: bool
) -> None:
    running = live(vllm)
    before = finished(vllm)
    with vllm.slowed():
        if committed:
            with running.client(timeout=120) as client:
                stream = client.chat.completions.create(**fresh(stream=True, **LONG))
                assert next(iter(stream)).choices
                stream.close()
        else:
            # A whole answer: nothing is sent while it is made.
            connection = http.client.HTTPConnection("127.0.0.1", int(running.url.rpartition(":")[2]))
            request = json.dumps(asked(**LONG))
            connection.request("POST", "/v1/chat/completions", request, {"authorization": "Bearer k"})
            patiently(lambda: vllm.metric(RUNNING) > 0)
            connection.close()
        patiently(lambda: vllm.metric(RUNNING) == 0)
    assert finished(vllm) == before, "what nobody reads isn't made"


def finished(vllm: Any) -> float:
    """How many answers it has made as long as they might become."""
    return float(vllm.metric("vllm:request_success_total", finished_reason="length"))


@pytest.mark.kills
def test_one_that_dies_before_a_byte_is_the_teachers_turn_until_it_is_back(
    revived: Any, live: Make, patiently: Make
) -> None:
    running = live(revived, commit_tokens=800)
    answers: list[tuple[str, str]] = []
    waiting = threading.Thread(target=lambda: answers.append(streamed(running, **LONG)))
    with revived.slowed():
        waiting.start()
        patiently(lambda: revived.metric(RUNNING) > 0)
        revived.kill()
    waiting.join(120)
    assert answers == [(TEACHERS, "student_error")], "its client saw nothing of it"
    for _ in range(3):
        assert streamed(running) == (TEACHERS, "student_error")
    revived.start()
    revived.wait()
    patiently(lambda: streamed(running)[1] == "confident")
    said, _ = streamed(running)
    assert said.startswith("Thank you")


@pytest.mark.kills
def test_one_that_dies_in_its_middle_ends_the_stream_with_an_error(revived: Any, live: Make) -> None:
    running = live(revived)
    with running.client(timeout=120) as client:
        with revived.slowed():
            stream = client.chat.completions.create(**fresh(stream=True, **LONG))
            pieces = iter(stream)
            said = next(pieces).choices[0].delta.content
            revived.kill()
        with pytest.raises(openai.APIError) as caught:
            for chunk in pieces:
                assert chunk.choices[0].finish_reason is None, "a broken answer isn't whole"
    assert said is not None
    assert not isinstance(caught.value, openai.APIConnectionError), "the gateway said so itself"
    assert streamed(running) == (TEACHERS, "student_error")


def streamed(running: Any, **more: Any) -> tuple[str, str]:
    """What a client reads of a stream, and for what reason it came from where it came from."""
    with running.client(timeout=120) as client:
        raw = client.chat.completions.with_raw_response.create(**fresh(stream=True, **more))
        said = "".join(chunk.choices[0].delta.content or "" for chunk in raw.parse() if chunk.choices)
    return said, raw.headers["x-understudy-reason"]
