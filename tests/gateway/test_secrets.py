"""No key and no password ever leaves the gateway but on its way to the teacher or to Redis."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

Start = Callable[..., Any]
BODY = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}
TEACHER, ADMIN, CLIENT, WRONG, PASSWORD = (
    f"planted-{who}-secret" for who in ("teacher", "admin", "client", "wrong", "redis")
)


def config(teacher: str, redis: str, *, format: str, api_keys: str, more: str = "") -> str:
    return f"""
state_dir = "here"
learning.interval_s = 0
observe = {{log_format = "{format}", access_log_sample = 1.0}}
[server]
host = "0.0.0.0"
admin_key = "{ADMIN}"
api_keys = {api_keys}
{more}
[teacher]
base_url = "{teacher}/v1"
api_key_env = "TEACHER_KEY"
max_retries = 0
[cache]
url = "{redis}"
"""


@pytest.mark.parametrize("mode", ["gateway keys", "client keys", "open"])
def test_planted_secrets_are_found_nowhere(
    serving: Start, stand_in: Start, redis: Start, eventually: Start, tmp_path: Path, mode: str
) -> None:
    server = redis(password=PASSWORD)
    expected = CLIENT if mode == "client keys" else TEACHER
    teacher = stand_in({"hello": "x"}, api_key=expected)
    api_keys = f'["{CLIENT}"]' if mode == "gateway keys" else "[]"
    options = {"format": "json" if mode == "open" else "text", "api_keys": api_keys}
    env = {} if mode == "client keys" else {"TEACHER_KEY": TEACHER}
    running = serving(config(teacher.url, server.url, **options), env=env)
    seen: list[str] = []

    def ask(method: str, path: str, key: str | None, **rest: Any) -> int:
        headers = {"authorization": f"Bearer {key}"} if key else {}
        answer = httpx.request(
            method,
            f"{running.url}{path}",
            headers={**headers, **rest.pop("headers", {})},
            verify=False,
            **rest,
        )
        seen.extend([answer.text, str(answer.headers)])
        return answer.status_code

    bodies: list[dict[str, Any]] = [BODY, {**BODY, "stream": True}, {"messages": []}]
    for key in (CLIENT, WRONG, None):
        for body in bodies:
            ask("POST", "/v1/chat/completions", key, json=body)
        ask("GET", f"/v1/models?api_key={CLIENT}", key)
        ask("GET", "/metrics", key)
        ask("GET", "/readyz", key)
        ask("GET", f"/{CLIENT}", key)
    assert ask("POST", "/v1/chat/completions", CLIENT, json=BODY) == 200
    assert ask("GET", "/metrics", ADMIN) == 200
    assert ask("GET", "/v1/models", CLIENT, headers={"x-long": WRONG * 5000}) == 431
    with socket.create_connection(("127.0.0.1", int(running.url.rpartition(":")[2])), timeout=10) as raw:
        raw.sendall(f"GET / HTTP/1.1\r\nauthorization : Bearer {CLIENT}\r\n\r\n".encode())
        seen.append(b"".join(iter(lambda: raw.recv(65536), b"")).decode())
    # What goes wrong is talked about most.
    server.kill()
    running.config.write_text(config("http://127.0.0.1:9", server.url, **options))
    running.child.send_signal(signal.SIGHUP)
    eventually(lambda: "the configuration was reloaded" in running.stderr)
    assert ask("POST", "/v1/chat/completions", CLIENT, json={**BODY, "user": "u"}) == 502
    for mistake in (f'admin_kye = "{ADMIN}"', f'api_keys = "{CLIENT}"', 'port = "many"\nworkers = []'):
        text = config(teacher.url, server.url, **{**options, "api_keys": "[]"}, more=mistake)
        running.config.write_text(text.replace("api_keys = []\n", "") if "api_keys" in mistake else text)
        before = running.stderr.count("the configuration can't be used")
        running.child.send_signal(signal.SIGHUP)
        eventually(
            lambda before=before: running.stderr.count("the configuration can't be used") == before + 1
        )
    running.config.write_text(config(teacher.url, server.url, **options))
    for command in (["doctor"], ["doctor", "--json", "--ask"], ["tasks"], ["serve", "--help"]):
        done = subprocess.run(
            [sys.executable, "-m", "understudy", *command],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), **env},
            capture_output=True,
            text=True,
            timeout=60,
        )
        seen += [done.stdout, done.stderr]
    running.child.send_signal(signal.SIGTERM)
    out, _ = running.child.communicate(timeout=30)
    seen += [out, running.stderr]
    files = [path for path in (tmp_path / "here").rglob("*") if path.is_file()]
    assert any(path.suffix == ".jsonl" for path in files)
    seen += [path.read_bytes().decode("latin-1") for path in files]
    everything = "\n".join(seen)
    found = [secret for secret in (TEACHER, ADMIN, CLIENT, WRONG, PASSWORD) if secret in everything]
    assert found == []
