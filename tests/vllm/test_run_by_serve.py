"""A real vLLM run by `understudy serve --vllm`: ready by itself, killed in mid-stream, back by itself, gone."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest

from routers.confidence import Confidence
from routers.router import Router
from serving.lm_plan import LmPlan
from serving.releases import ReleaseStore
from serving.vllm_place import read_place

Make = Callable[..., Any]
ROUTER = Router(Confidence.of_score(slope=1.0, offset=2.0), rank_threshold=-1e9)
PATIENCE_S = 400.0


def until(holds: Callable[[], bool], running: Any) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < deadline, running.stderr[-4000:]
        time.sleep(0.5)


def group_of(pid: int) -> dict[int, str]:
    """The living processes of a process group, and what they are called."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            name, _, rest = (folder / "stat").read_text().rpartition(")")
        except OSError:
            continue
        state, _, group = rest.split()[:3]
        if int(group) == pid and state != "Z":
            found[int(folder.name)] = name.partition("(")[2]
    return found


def server_on(port: str) -> int:
    """The process that was started to listen on a port, and leads a group; what holds it on a leash isn't that."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            line = (folder / "cmdline").read_text().split("\0")
            group = int((folder / "stat").read_text().rpartition(")")[2].split()[2])
        except OSError:
            continue
        leads = group == int(folder.name) and not any(part.endswith("leash.py") for part in line)
        if leads and f"--port {port}" in " ".join(line):
            return group
    raise AssertionError(f"nothing was started on port {port}")


@pytest.mark.kills
def test_the_whole_life_of_one(
    torch_python: Path,
    tiny_models: Any,
    serving: Make,
    stand_in: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    environment = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TEACHER_KEY": "sk-teacher",
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    state_dir = tmp_path / "state"
    plan = LmPlan(
        None, "tiny", checkpoints=(), commit_tokens=2, hold_back_s=60.0, timeout_s=60.0, max_tokens=900
    )
    store = ReleaseStore(state_dir)
    store.set_live(
        "replies", store.write("replies", {**plan.files(), "router.json": ROUTER.dump()}, {"student": "lm"})
    )
    teacher = stand_in({}, default="the teacher")
    args = ["--enforce-eager", "--dtype", "float32", "--max-num-seqs", "8", "--generation-config", "vllm"]
    running = serving(
        f'state_dir = "{state_dir}"\nlearning.interval_s = 0\nserver.grace_s = 1\n'
        f'[teacher]\nbase_url = "{teacher.url}/v1"\napi_key_env = "TEACHER_KEY"\n'
        f'[student.vllm]\npython = "{torch_python}"\nmodel = "{tiny_models.lm}"\nserved_model_name = "tiny"\n'
        f"max_model_len = 1024\nargs = {args}\n"
        '[[task]]\nname = "replies"\nmatch = { model = "replies" }\nstudent = { kind = "lm", model = "tiny" }\n',
        "--vllm",
    )
    client = openai.OpenAI(base_url=f"{running.url}/v1", api_key="k", max_retries=0, timeout=120)

    def ask(number: int, **options: Any) -> Any:
        messages: Any = [{"role": "user", "content": f"Where is parcel {number}?"}]
        return client.chat.completions.with_raw_response.create(model="replies", messages=messages, **options)

    def route(number: int) -> str:
        told: str = ask(number).headers["x-understudy-route"]
        return told

    def port() -> str:
        place = read_place(state_dir)
        assert place is not None
        return place.url.rpartition(":")[2]

    with client:
        assert route(1) == "teacher", "nobody waits for it"
        until(lambda: route(time.monotonic_ns()) == "student", running)
        first = server_on(port())
        assert len(group_of(first)) >= 2, "its engine is a process of its own"
        stream = ask(2, stream=True).parse()
        heard = next(stream)
        os.kill(first, signal.SIGKILL)
        ended_whole = False
        try:
            for heard in stream:
                ended_whole = bool(heard.choices) and heard.choices[0].finish_reason is not None
        except openai.APIError as error:
            assert not ended_whole, f"an end, and then {error}"
        else:
            assert ended_whole, "never an end that looks whole"
        until(lambda: not group_of(first), running)
        assert route(3) == "teacher"
        until(lambda: route(time.monotonic_ns()) == "student", running)
        assert "vLLM has ended, by SIGKILL" in running.stderr
        assert "sk-teacher" not in running.stderr
        second = server_on(port())
        assert second != first
        running.child.kill()
        running.child.wait(timeout=30)
        until(lambda: not group_of(second), running)
