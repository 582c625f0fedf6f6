"""A language model as student, the whole way: day 0, `understudy learn`, live; streams accepted and escalated."""

from __future__ import annotations

import random
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest

from loadtest.stack import command, environment
from routers.promise import binomial_tail
from serving.recording import Recorded, Recording
from serving.releases import ReleaseStore
from serving.stand_in import create_stand_in
from serving.stand_in_call import StandInHttp

Make = Callable[..., Any]
REPLY = "Your {0} is being looked into; a colleague writes to you about the {0} by tomorrow at noon."
THINGS = ("card", "parcel", "refund")
DAY_ZERO, LATER = 220, 150


def drawn() -> tuple[dict[str, str], list[Recorded]]:
    """What teacher and student answer to each of so many messages; the student is less sure where it errs."""
    chance = random.Random(4)
    teacher, student = {}, []
    for number in range(DAY_ZERO + LATER):
        text, right = f"message {number}", chance.choice(THINGS)
        errs = chance.random() < 0.35
        given = chance.choice([each for each in THINGS if each != right]) if errs else right
        confidence = chance.uniform(0.35, 0.8) if errs else chance.uniform(0.65, 0.99)
        teacher[text] = REPLY.format(right)
        student.append(Recorded(text, REPLY.format(given), confidence=confidence))
    return teacher, student


def test_from_day_zero_to_streams_of_a_model(
    serve: Make, stand_in: Make, gateway: Make, eventually: Make, tmp_path: Path
) -> None:
    answers, rows = drawn()
    teacher = stand_in(answers, model="big")
    small = serve(
        create_stand_in(Recording(Path("student.csv"), tuple(rows)), model="small"), http=StandInHttp
    )
    task = {
        "name": "support",
        "match": {"model": "support"},
        "max_disagreement": 0.1,
        "audit_rate": 0.2,
        "student": {
            "kind": "lm",
            "base_url": f"{small}/v1",
            "model": "small",
            "checkpoints": [4],
            "commit_tokens": 8,
            "hold_back_s": 20.0,
        },
    }
    running = gateway(teacher.url, task=[task])
    texts = list(answers)
    with running.client() as client:
        for text in texts[:DAY_ZERO]:
            assert streamed(client, text)[1]["x-understudy-reason"] == "no_release"
        assert learned(tmp_path, teacher.url, task).startswith(
            "support: released: r0001 is live: answers about "
        )
        eventually(lambda: running.metric("understudy_release_info", task="support", release="r0001") == 1)
        card = ReleaseStore(running.state_dir).read("support", "r0001").card
        assert (card["student"], card["model"], card["labels"]) == ("lm", "small", DAY_ZERO)
        routes: dict[str, list[bool]] = {"student": [], "teacher": []}
        for text, row in zip(texts[DAY_ZERO:], rows[DAY_ZERO:], strict=True):
            said, headers = streamed(client, text)
            route = headers["x-understudy-route"]
            assert said == (row.teacher if route == "student" else answers[text]), "never a mix of the two"
            routes[route].append(row.teacher == answers[text])
    accepted = routes["student"]
    assert len(accepted) > 0.25 * LATER
    assert len(routes["teacher"]) > 0.1 * LATER
    assert sum(routes["teacher"]) / len(routes["teacher"]) < 0.9, "where it errs it is escalated more often"
    # A promise kept would look as bad as this in less than one of a thousand runs.
    assert binomial_tail(accepted.count(True), len(accepted), 0.9) > 0.001
    eventually(lambda: all(each.audit != "pending" for each in running.exchanges()))
    live = [exchange for exchange in running.exchanges() if exchange.release == "r0001"]
    assert all(exchange.eligible for exchange in live)
    assert {exchange.propensity for exchange in live if exchange.route == "student"} == {0.2}
    for exchange in live:
        assert [point["tokens"] for point in exchange.student.checkpoints] == [4, 8]
        assert exchange.student.complete or exchange.route == "teacher"


def streamed(client: openai.OpenAI, text: str) -> tuple[str, Any]:
    """What a client reads of a stream, and its headers."""
    raw = client.chat.completions.with_raw_response.create(
        model="support", messages=[{"role": "user", "content": text}], stream=True
    )
    said = "".join(chunk.choices[0].delta.content or "" for chunk in raw.parse() if chunk.choices)
    return said, raw.headers


def learned(folder: Path, teacher_url: str, task: dict[str, Any]) -> str:
    """Run `understudy learn` as an operator does, on a file that says what the gateway was told."""
    student = ", ".join(f"{key} = {toml(value)}" for key, value in task["student"].items())
    config = folder / "understudy.toml"
    config.write_text(
        f'state_dir = "{folder / "state"}"\n[teacher]\nbase_url = "{teacher_url}/v1"\ntrainable = true\n'
        f'[[task]]\nname = "support"\nmatch = {{ model = "support" }}\nstudent = {{ {student} }}\n'
        f"max_disagreement = {task['max_disagreement']}\n"
    )
    done = subprocess.run(
        command("learn", "--config", str(config)),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def toml(value: object) -> str:
    return f'"{value}"' if isinstance(value, str) else str(value)


@pytest.fixture(autouse=True)
def no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
