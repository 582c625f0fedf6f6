"""`understudy serve` as a command: a child process, as people run it."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from gateway.server import is_exposed, serve
from serving.errors import ConfigError
from serving.server_settings import ServerSettings
from serving.settings import Settings

Start = Callable[..., Any]
ROOT = Path(__file__).parents[2]
BODY = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Start]:
    """Run `understudy serve` with a configuration; gives the process, once it has said where it listens."""
    children: list[subprocess.Popen[str]] = []

    def start(config: str, *options: str, env: dict[str, str] | None = None) -> subprocess.Popen[str]:
        (tmp_path / "understudy.toml").write_text(config)
        child = subprocess.Popen(
            [sys.executable, "-m", "understudy", "serve", *options],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([*_import_path()]), **(env or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        children.append(child)
        return child

    yield start
    for child in children:
        child.kill()
        child.communicate()


def _import_path() -> list[str]:
    return [*os.environ.get("PYTHONPATH", "").split(os.pathsep), str(ROOT)]


def address_of(child: subprocess.Popen[str]) -> str:
    assert child.stdout is not None
    line = child.stdout.readline()
    found = re.search(r"http://[^ ]+", line)
    assert found, f"no address in {line!r}: {child.stderr.read() if child.stderr else ''}"
    return found.group()


def wait_until_ready(url: str, within_s: float = 20.0) -> None:
    deadline = time.monotonic() + within_s
    while True:
        try:
            if httpx.get(f"{url}/readyz", timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            pass
        assert time.monotonic() < deadline, "not ready in time"
        time.sleep(0.05)


def config(teacher: str, more: str = "") -> str:
    return f'state_dir = "here"\n{more}\n[teacher]\nbase_url = "{teacher}/v1"\n[[task]]\nname = "intents"\n'


def test_it_ends_when_requests_are_over(run: Start, stand_in: Start, tmp_path: Path) -> None:
    teacher = stand_in({"hello": "greeting"}, latency_ms=700, latency_spread=0)
    child = run(config(teacher.url), "--port", "0")
    url = address_of(child)
    wait_until_ready(url)
    ready = httpx.get(f"{url}/readyz").json()
    assert ready == {"status": "ready", "log": "writable", "tasks": 1, "live_releases": 0}
    with httpx.stream("POST", f"{url}/v1/chat/completions", json={**BODY, "stream": True}) as answer:
        child.send_signal(signal.SIGTERM)
        text = answer.read().decode()
    assert text.endswith("data: [DONE]\n\n"), "a request under way is finished"
    assert child.wait(timeout=20) in (0, -signal.SIGTERM)
    segments = list((tmp_path / "here").rglob("*.jsonl*"))
    assert [segment.suffix for segment in segments] == [".jsonl"], "sealed on the way out"


def test_it_takes_its_learner_along(
    run: Start, require: Start, write_log: Start, exchanges: Start, stand_in: Start, tmp_path: Path
) -> None:
    require("ps")

    def learners(parent: int | None = None) -> list[int]:
        listed = subprocess.run(
            ["ps", "-A", "-o", "pid=,ppid=,stat=,args="], capture_output=True, text=True, check=True
        ).stdout
        found = [line.split(maxsplit=3) for line in listed.splitlines()]
        return [
            int(words[0])
            for words in found
            if "understudy learn" in words[3] and not words[2].startswith("Z") and words[1] == str(parent)
        ]

    (tmp_path / "here").symlink_to(write_log(exchanges([("a parcel", "lost")])))
    child = run(config(stand_in({}).url, "learning.interval_s = 0.1"), "--port", "0")
    wait_until_ready(address_of(child))
    deadline = time.monotonic() + 20
    while not (started := learners(child.pid)):
        assert time.monotonic() < deadline, "it never began to learn"
        time.sleep(0.01)
    child.send_signal(signal.SIGTERM)
    assert child.wait(timeout=20) in (0, -signal.SIGTERM)
    with pytest.raises(ProcessLookupError):
        os.kill(started[0], 0)


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_teachers_key_that_cant_be_sent_is_said_in_one_line(run: Start, workers: str) -> None:
    child = run(config("http://127.0.0.1:9"), "--workers", workers, env={"OPENAI_API_KEY": "sk-tëacher"})
    out, err = child.communicate(timeout=30)
    assert child.returncode == 2
    assert out == ""
    assert err.startswith("understudy: the teacher's key in the environment variable OPENAI_API_KEY has")
    assert err.count("\n") == 1
    assert "sk-t" not in err


def test_what_isnt_http_is_told_so_in_the_envelope(run: Start, stand_in: Start) -> None:
    url = address_of(run(config(stand_in({}).url), "--port", "0"))
    wait_until_ready(url)
    with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=10) as connection:
        connection.sendall(b"this is not HTTP\r\n\r\n")
        answer = b"".join(iter(lambda: connection.recv(65536), b""))
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    assert b"\r\nx-request-id: req_" in head
    assert json.loads(body)["error"]["type"] == "invalid_request_error"


def test_several_workers_count_together(run: Start, stand_in: Start) -> None:
    child = run(config(stand_in({"hello": "greeting"}).url), "--port", "0", "--workers", "2")
    url = address_of(child)
    wait_until_ready(url, within_s=60)
    for _ in range(20):
        # A connection each, so that the kernel hands them to both workers.
        assert httpx.post(f"{url}/v1/chat/completions", json=BODY).status_code == 200
    for _ in range(4):
        text = httpx.get(f"{url}/metrics").text
        counted = re.findall(r"^understudy_requests_total{.*} (\S+)$", text, re.M)
        assert [float(value) for value in counted] == [20.0]
    child.send_signal(signal.SIGTERM)
    assert child.wait(timeout=20) in (0, -signal.SIGTERM)


def test_workers_end_with_a_supervisor_that_was_killed(run: Start, stand_in: Start) -> None:
    child = run(config(stand_in({"hello": "greeting"}).url), "--port", "0", "--workers", "2")
    url = address_of(child)
    wait_until_ready(url, within_s=60)
    child.kill()
    child.wait(timeout=10)
    deadline = time.monotonic() + 20
    while True:
        try:
            httpx.get(f"{url}/healthz", timeout=5)
        except httpx.TransportError:
            break
        assert time.monotonic() < deadline, "somebody still serves"
        time.sleep(0.1)
    # Nobody holds the pipes any more; workers that live on would keep this waiting.
    child.communicate(timeout=20)


def test_workers_that_take_long_to_start_are_waited_for(run: Start, stand_in: Start, tmp_path: Path) -> None:
    slow = tmp_path / "slow"
    slow.mkdir()
    (slow / "sitecustomize.py").write_text(
        "import sys, time\nif '--multiprocessing-fork' in sys.orig_argv:\n    time.sleep(6)\n"
    )
    path = os.pathsep.join([str(slow), *_import_path()])
    child = run(
        config(stand_in({"hello": "greeting"}).url), "--port", "0", "--workers", "2", env={"PYTHONPATH": path}
    )
    url = address_of(child)
    wait_until_ready(url, within_s=60)
    child.send_signal(signal.SIGTERM)
    _, err = child.communicate(timeout=30)
    assert len(re.findall("worker [0-9]+ starts", err)) == 2, "none was killed and replaced"


def test_the_first_line_says_what_runs(run: Start, tmp_path: Path) -> None:
    child = run('state_dir = "here"\n[teacher]\nbase_url = "http://127.0.0.1:9/v1"\n', "--port", "0")
    assert child.stdout is not None
    line = child.stdout.readline()
    assert line.endswith(
        " · tasks: found in the traffic · teacher: 127.0.0.1:9 · state: here · configuration: understudy.toml\n"
    )


def test_what_is_wrong_is_said_in_one_line(run: Start) -> None:
    child = run("[server]\nprot = 1\n")
    out, err = child.communicate(timeout=30)
    assert child.returncode == 2
    assert out == ""
    assert err == "understudy: understudy.toml: unknown key server.prot: did you mean server.port?\n"


def test_a_port_that_is_taken_is_said(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        settings = Settings(state_dir=tmp_path, server=ServerSettings(port=port))
        with pytest.raises(
            ConfigError, match=rf"can't listen on 127\.0\.0\.1:{port}: Address already in use;"
        ):
            serve(settings)


def test_a_host_or_folder_that_cant_be_used_is_said(tmp_path: Path) -> None:
    nowhere = Settings(state_dir=tmp_path, server=ServerSettings(host="no.such.host.invalid"))
    with pytest.raises(ConfigError, match=r"can't listen on no\.such\.host\.invalid"):
        serve(nowhere)
    (tmp_path / "file").write_text("")
    blocked = Settings(state_dir=tmp_path / "file" / "state", server=ServerSettings(port=0))
    with pytest.raises(ConfigError, match=r"the state directory .* can't be written"):
        serve(blocked)


def test_an_open_door_to_the_teachers_key_is_warned_about(run: Start, stand_in: Start) -> None:
    env = {"OPENAI_API_KEY": "sk-very-secret"}
    child = run(config(stand_in({}).url), "--port", "0", "--host", "0.0.0.0", env=env)
    assert child.stdout is not None
    line = child.stdout.readline()
    assert "tasks: intents" in line
    assert "teacher: 127.0.0.1:" in line
    assert "state: here" in line
    wait_until_ready(line.split()[3].replace("0.0.0.0", "127.0.0.1"))
    child.send_signal(signal.SIGTERM)
    _, err = child.communicate(timeout=20)
    assert "SPENDS YOUR MONEY" in err
    assert "sk-very-secret" not in err + line


def test_a_door_is_open_only_without_keys_and_from_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    def exposed(key: str, **server: Any) -> bool:
        monkeypatch.setenv("OPENAI_API_KEY", key)
        return is_exposed(Settings(server=ServerSettings(**server)))

    assert exposed("k", host="0.0.0.0")
    assert exposed("k", host="gateway.internal")
    assert not exposed("k", host="0.0.0.0", api_keys=["own"])
    assert not exposed("", host="0.0.0.0")
    assert not exposed("k", host="127.0.0.1")
    assert not exposed("k", host="::1")
    assert not exposed("k", host="localhost")


def test_the_gateway_is_light_to_import() -> None:
    heavy = "sklearn", "scipy", "openai", "pandas", "torch", "matplotlib", "distillation", "httpx"
    code = f"import sys, gateway.server; print([m for m in {heavy!r} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(_import_path())},
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    assert done.stdout.strip() == "[]"


def test_the_gateway_takes_all_the_files_it_may_have(serving: Start) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard // 2, hard))
    try:
        child = serving("[teacher]\nbase_url = 'http://127.0.0.1:9/v1'")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert resource.prlimit(child.child.pid, resource.RLIMIT_NOFILE) == (hard, hard)
