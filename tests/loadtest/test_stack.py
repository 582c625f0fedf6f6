from __future__ import annotations

import dataclasses
from pathlib import Path

import httpx
import pytest

from loadtest.stack import KEY_VARIABLE, Plan, StackError, configuration, environment, running
from serving.configuration import load_settings


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    recording = tmp_path / "r.csv"
    recording.write_text("text,teacher\nhello,greeting\n")
    return Plan(recording, tmp_path / "work", "greetings", 0.1, 0.9, (2.5, 10.0))


def test_the_configuration_is_one_the_gateway_reads(plan: Plan, tmp_path: Path) -> None:
    odd = tmp_path / 'a "quoted" näme'
    file = tmp_path / "understudy.toml"
    file.write_text(configuration(dataclasses.replace(plan, port=1234), "http://127.0.0.1:1/v1", odd))
    settings = load_settings(file)
    assert (settings.state_dir, settings.server.port) == (odd, 1234)
    assert settings.teacher.trainable
    assert settings.teacher.price is not None
    assert (settings.teacher.price.input, settings.teacher.price.output) == (2.5, 10.0)
    task = settings.for_task("greetings")
    assert (task.max_disagreement, task.certainty) == (0.1, 0.9)
    assert task.match is not None
    assert task.match.model == "stand-in"


def test_settings_from_the_environment_are_kept_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNDERSTUDY_STATE_DIR", "/elsewhere")
    assert "UNDERSTUDY_STATE_DIR" not in environment()
    assert environment(bare=False)["UNDERSTUDY_STATE_DIR"] == "/elsewhere"
    assert environment()[KEY_VARIABLE]


def test_a_stack_answers_and_is_gone_afterwards(plan: Plan) -> None:
    with running(plan) as stack:
        body = {"model": "stand-in", "messages": [{"role": "user", "content": "hello"}]}
        reply = httpx.post(f"{stack.base_url}/chat/completions", json=body, timeout=20)
        assert reply.json()["choices"][0]["message"]["content"] == "greeting"
        assert reply.headers["x-understudy-task"] == "greetings"
        assert httpx.get(f"{stack.stand_in_url.removesuffix('/v1')}/stats").json()["chat"] == 1
        stack.check()
        assert all(child.alive for child in stack.children)
    assert not any(child.alive for child in stack.children)
    with pytest.raises(StackError, match="the stand-in ended with exit code 0"):
        stack.check()


def test_a_process_that_dies_is_quoted(plan: Plan) -> None:
    says = r"the gateway ended with exit code 2; it said: .*max_disagreement"
    with (
        pytest.raises(StackError, match=says) as raised,
        running(dataclasses.replace(plan, max_disagreement=7.0)),
    ):
        pass
    assert "\n" not in str(raised.value)
    with pytest.raises(StackError, match=r"the stand-in ended .*there is no column `text`"):
        plan.recording.write_text("a,b\nc,d\n")
        with running(plan):
            pass
