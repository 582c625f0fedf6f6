"""`understudy serve --vllm` as people run it: the teacher answers until the student is there, and whenever it isn't."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from typer.testing import CliRunner

import understudy
from routers.confidence import Confidence
from routers.router import Router
from serving.errors import ConfigError
from serving.lm_plan import LmPlan
from serving.releases import ReleaseStore

Make = Callable[..., Any]
ROUTER = Router(Confidence.of_score(slope=1.0, offset=2.0), rank_threshold=0.5)


@pytest.fixture
def toml(pretend_vllm: Any, stand_in: Make, monkeypatch: pytest.MonkeyPatch) -> str:
    """A task whose live student names no server of its own."""
    plan = LmPlan(None, "small", checkpoints=(), commit_tokens=2, hold_back_s=10.0)
    store = ReleaseStore(pretend_vllm.state_dir)
    store.set_live(
        "intents", store.write("intents", {**plan.files(), "router.json": ROUTER.dump()}, {"student": "lm"})
    )
    teacher = stand_in({}, default="the teacher")
    monkeypatch.setenv("TEACHER_KEY", "sk-teacher")
    return (
        f'state_dir = "{pretend_vllm.state_dir}"\nlearning.interval_s = 0\nserver.grace_s = 1\n'
        f'[teacher]\nbase_url = "{teacher.url}/v1"\napi_key_env = "TEACHER_KEY"\n'
        f'[student.vllm]\npython = "{pretend_vllm.python}"\nmodel = "{pretend_vllm.folder}"\n'
        'served_model_name = "small"\n[[task]]\nname = "intents"\nmatch = { model = "intents" }\n'
        'student = { kind = "lm", model = "small" }\n'
    )


class Client:
    def __init__(self, url: str) -> None:
        self._client = openai.OpenAI(base_url=f"{url}/v1", api_key="k", max_retries=0, timeout=30)
        self._number = 0

    def ask(self, **options: Any) -> Any:
        self._number += 1  # never from the cache
        messages: Any = [{"role": "user", "content": f"hello {self._number}"}]
        return self._client.chat.completions.with_raw_response.create(
            model="intents", messages=messages, **options
        )

    def asked(self) -> tuple[str, str]:
        """Route and reason of one request, whose answer is that route's."""
        raw = self.ask()
        route, reason = raw.headers["x-understudy-route"], raw.headers["x-understudy-reason"]
        assert raw.parse().choices[0].message.content == {"student": "yes", "teacher": "the teacher"}[route]
        return route, reason

    def close(self) -> None:
        self._client.close()


@pytest.fixture
def client_of() -> Iterator[Callable[[str], Client]]:
    made: list[Client] = []

    def make(url: str) -> Client:
        made.append(Client(url))
        return made[-1]

    yield make
    for client in made:
        client.close()


@pytest.mark.parametrize("workers", [1, 2])
def test_it_is_killed_in_the_middle_and_comes_back_by_itself(
    pretend_vllm: Any, serving: Make, toml: str, eventually: Make, client_of: Make, workers: int
) -> None:
    pretend_vllm.behaves(ready_after_s=600, children=True)
    running = serving(toml, "--vllm", "--workers", str(workers))
    client = client_of(running.url)
    assert client.asked() == ("teacher", "student_error"), "nobody waits for it"
    pretend_vllm.behaves()
    eventually(lambda: client.asked() == ("student", "confident"))
    # The commit point is far behind when it is killed: what was sent can't be taken back.
    pretend_vllm.behaves(answer=["one ", "two ", "three ", *["more "] * 500], token_s=0.05)
    stream = client.ask(stream=True).parse()
    heard = [next(stream).choices[0].delta.content for _ in range(4)]
    assert "three " in heard
    (first,) = pretend_vllm.starts()
    pretend_vllm.behaves()
    os.kill(first["pid"], signal.SIGKILL)
    with pytest.raises(openai.APIError):
        list(stream)
    assert client.asked() == ("teacher", "student_error")
    eventually(lambda: client.asked() == ("student", "confident"))
    assert len(pretend_vllm.starts()) == 2
    eventually(lambda: running.metric("understudy_student_server_up", server="vllm") == 1)
    assert running.metric("understudy_student_server_restarts", server="vllm") == 1
    # Each worker looks for itself, and whichever takes the connection answers.
    eventually(lambda: httpx.get(f"{running.url}/readyz").json()["student_servers"] == "ready")
    assert "vLLM has ended, by SIGKILL" in running.stderr
    running.child.send_signal(signal.SIGTERM)
    running.child.wait(timeout=30)
    assert not pretend_vllm.left()
    assert not (pretend_vllm.state_dir / "vllm.json").exists()


def test_killed_before_anything_was_sent_nobody_sees_it(
    pretend_vllm: Any, serving: Make, toml: str, eventually: Make, client_of: Make
) -> None:
    running = serving(toml, "--vllm")
    client = client_of(running.url)
    eventually(lambda: client.asked() == ("student", "confident"))
    pretend_vllm.behaves(answer=["one ", "two "], token_s=600)  # judged at the second
    asked = running.stderr.count("INFO answering")
    with ThreadPoolExecutor(1) as aside:
        answer = aside.submit(client.ask, stream=True)
        eventually(lambda: running.stderr.count("INFO answering") > asked)
        os.kill(pretend_vllm.starts()[0]["pid"], signal.SIGKILL)
        raw = answer.result(timeout=30)
    assert (raw.headers["x-understudy-route"], raw.headers["x-understudy-reason"]) == (
        "teacher",
        "student_error",
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in raw.parse()) == "the teacher"
    assert "sk-teacher" not in str(pretend_vllm.starts()[0]["environment"])


@pytest.mark.parametrize("workers", [1, 2])
def test_nothing_outlives_a_gateway_that_is_killed(
    pretend_vllm: Any, serving: Make, toml: str, eventually: Make, workers: int
) -> None:
    pretend_vllm.behaves(children=True)
    running = serving(toml, "--vllm", "--workers", str(workers))
    eventually(lambda: len(pretend_vllm.left()) == 2)
    running.child.kill()
    running.child.wait(timeout=20)
    eventually(lambda: not pretend_vllm.left())
    assert pretend_vllm.place() is None, "what is left of it counts for nothing"


@pytest.mark.parametrize("workers", [1, 2])
def test_a_reload_starts_it_anew_only_if_its_own_settings_change(
    pretend_vllm: Any, serving: Make, toml: str, eventually: Make, workers: int
) -> None:
    running = serving(toml, "--vllm", "--workers", str(workers))
    eventually(lambda: pretend_vllm.phase() == "ready")

    def reload(text: str, said: str) -> None:
        before = running.stderr.count(said)
        running.config.write_text(text)
        running.child.send_signal(signal.SIGHUP)
        eventually(lambda: running.stderr.count(said) > before)

    reload("cache.ttl_s = 5\n" + toml, "the configuration was reloaded")
    reload(toml.replace("[student.vllm]\n", '[student.vllm]\nurls = ["http://x"]\n'), "the old one stays")
    assert len(pretend_vllm.starts()) == 1
    reload(
        toml.replace("[student.vllm]\n", "[student.vllm]\nmax_model_len = 64\n"),
        "the configuration was reloaded",
    )
    eventually(lambda: len(pretend_vllm.starts()) == 2 and pretend_vllm.phase() == "ready")


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ("", "--vllm needs a section [student.vllm]"),
        (
            '[student.vllm]\nurls = ["http://127.0.0.1:9/v1"]\n',
            "names servers that others run: leave one of the two out",
        ),
    ],
)
def test_a_configuration_it_cant_be_run_with(tmp_path: Path, section: str, said: str) -> None:
    (tmp_path / "understudy.toml").write_text(section)
    result = CliRunner().invoke(
        understudy.app, ["serve", "--vllm", "--config", str(tmp_path / "understudy.toml")]
    )
    assert isinstance(result.exception, ConfigError)
    assert said in str(result.exception)


def test_doctor_finds_it(
    pretend_vllm: Any, serving: Make, toml: str, eventually: Make, tmp_path: Path
) -> None:
    root = Path(__file__).parents[2]

    def doctor() -> dict[str, Any]:
        done = subprocess.run(
            [sys.executable, "-m", "understudy", "doctor", "--json"],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(root)},
            capture_output=True,
            text=True,
            timeout=60,
        )
        findings = json.loads(done.stdout)["findings"]
        found: dict[str, Any] = next(each for each in findings if each["check"] == "student")
        return found

    (tmp_path / "understudy.toml").write_text(toml)
    assert doctor()["verdict"] == "problem"
    assert "not running: `understudy serve --vllm` runs it" in doctor()["said"]
    serving(toml, "--vllm")
    eventually(lambda: pretend_vllm.phase() == "ready")
    assert doctor()["verdict"] == "ok"
