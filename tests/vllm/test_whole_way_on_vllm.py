"""The demo's messages, a language model on vLLM as student, the whole way: day 0, `understudy learn`, live."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest

from loadtest.stack import command, environment
from routers.promise import binomial_tail
from serving.recording import Recorded, read_recording
from serving.releases import ReleaseStore

Make = Callable[..., Any]
EXAMPLES = Path(__file__).parents[2] / "examples"
PROMPT = (EXAMPLES / "system_prompt.txt").read_text(encoding="utf-8").strip()
DAY_ZERO, LATER = 400, 160
DISAGREEMENT = 0.05
STUDENT = {"kind": "lm", "checkpoints": [2], "commit_tokens": 16, "hold_back_s": 60.0, "timeout_s": 60.0}


def asked(text: str) -> dict[str, Any]:
    messages = [{"role": "system", "content": PROMPT}, {"role": "user", "content": text}]
    return {"model": "parcels", "messages": messages}


def test_from_day_zero_to_answers_of_a_model_on_vllm(
    vllm: Any, stand_in: Make, gateway: Make, patiently: Make, tmp_path: Path
) -> None:
    rows = read_recording(EXAMPLES / "parcels.csv").rows[: DAY_ZERO + LATER]
    teacher = stand_in({row.text: row.teacher for row in rows}, model="big")
    student = {**STUDENT, "base_url": f"{vllm.url}/v1", "model": vllm.model}
    task = {
        "name": "parcels",
        "match": {"model": "parcels"},
        "max_disagreement": DISAGREEMENT,
        "audit_rate": 0.2,
    }
    running = gateway(teacher.url, task=[{**task, "student": student}])
    before, after = rows[:DAY_ZERO], rows[DAY_ZERO:]
    asyncio.run(all_at_once(running.url, before))
    said = learned(tmp_path, teacher.url, student)
    assert said.startswith("parcels: released: r0001 is live: answers about "), said
    patiently(lambda: running.metric("understudy_release_info", task="parcels", release="r0001") == 1)
    card = ReleaseStore(running.state_dir).read("parcels", "r0001").card
    assert (card["student"], card["model"], card["labels"]) == ("lm", vllm.model, DAY_ZERO)

    answered = [*whole(running, after[0::3]), *streamed(running, after[1::3])]
    answered += asyncio.run(all_at_once(running.url, after[2::3]))
    routes: dict[str, list[bool]] = {"student": [], "teacher": []}
    for row, said, route in answered:
        routes[route].append(said == row.teacher)
    assert all(routes["teacher"]), "what was escalated is the teacher's answer, whole"
    accepted = routes["student"]
    assert len(accepted) > 0.4 * LATER
    assert len(routes["teacher"]) > 0.03 * LATER
    # A promise kept would look as bad as this in less than one of a thousand runs.
    assert binomial_tail(accepted.count(True), len(accepted), 1 - DISAGREEMENT) > 0.001

    patiently(lambda: all(each.audit != "pending" for each in running.exchanges()))
    live = [exchange for exchange in running.exchanges() if exchange.release == "r0001"]
    assert len(live) == LATER
    assert all(exchange.eligible for exchange in live)
    escalated = {exchange.reason for exchange in live if exchange.route == "teacher"}
    assert "low_confidence" in escalated
    for exchange in live:
        if exchange.student is not None:
            assert exchange.student.usage["prompt_tokens"] > 10, "as vLLM counted them"
            assert exchange.student.signals, "log-probabilities of its tokens were there"


def whole(running: Any, rows: tuple[Recorded, ...]) -> list[tuple[Recorded, str, str]]:
    with running.client(timeout=120) as client:
        answers = [client.chat.completions.with_raw_response.create(**asked(row.text)) for row in rows]
    return [
        (row, answer.parse().choices[0].message.content, answer.headers["x-understudy-route"])
        for row, answer in zip(rows, answers, strict=True)
    ]


def streamed(running: Any, rows: tuple[Recorded, ...]) -> list[tuple[Recorded, str, str]]:
    found = []
    with running.client(timeout=120) as client:
        for row in rows:
            raw = client.chat.completions.with_raw_response.create(**asked(row.text), stream=True)
            chunks = [chunk for chunk in raw.parse() if chunk.choices]
            said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
            assert chunks[-1].choices[0].finish_reason == "stop"
            found.append((row, said, raw.headers["x-understudy-route"]))
    return found


async def all_at_once(url: str, rows: tuple[Recorded, ...]) -> list[tuple[Recorded, str, str]]:
    """Eight requests at a time, streams and whole answers in turn."""
    places = asyncio.Semaphore(8)
    options: dict[str, Any] = {
        "base_url": f"{url}/v1",
        "api_key": "client-key",
        "max_retries": 0,
        "timeout": 120,
    }

    async with openai.AsyncOpenAI(**options) as client:

        async def ask(number: int, row: Recorded) -> tuple[Recorded, str, str]:
            async with places:
                create: Any = client.chat.completions.with_raw_response.create
                if number % 2:
                    raw = await create(**asked(row.text))
                    said = raw.parse().choices[0].message.content
                else:
                    raw = await create(**asked(row.text), stream=True)
                    said = "".join([c.choices[0].delta.content or "" async for c in raw.parse() if c.choices])
                return row, said, raw.headers["x-understudy-route"]

        return await asyncio.gather(*(ask(number, row) for number, row in enumerate(rows)))


def learned(folder: Path, teacher_url: str, student: dict[str, Any]) -> str:
    """Run `understudy learn` as an operator does, on a file that says what the gateway was told."""
    given = ", ".join(
        f'{key} = "{v}"' if isinstance(v, str) else f"{key} = {v}" for key, v in student.items()
    )
    config = folder / "understudy.toml"
    config.write_text(
        f'state_dir = "{folder / "state"}"\n[teacher]\nbase_url = "{teacher_url}/v1"\ntrainable = true\n'
        f'[[task]]\nname = "parcels"\nmatch = {{ model = "parcels" }}\nstudent = {{ {given} }}\n'
        f"max_disagreement = {DISAGREEMENT}\n"
    )
    done = subprocess.run(
        command("learn", "--config", str(config)),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(autouse=True)
def no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
