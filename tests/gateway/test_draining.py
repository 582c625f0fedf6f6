"""Stopping and reloading under load: clients with kept connections see no failed request."""

from __future__ import annotations

import json
import signal
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest

Start = Callable[..., Any]
BODY = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}


def config(teacher: str, workers: int = 1, more: str = "") -> str:
    return f'''
state_dir = "here"
learning.interval_s = 0
[server]
workers = {workers}
{more}
[teacher]
base_url = "{teacher}/v1"
api_key_env = "TEACHER_KEY"
'''


@dataclass
class Load:
    """Clients that send one request after the other, each over its kept connections, until refused."""

    url: str
    clients: int
    headers: dict[str, str] = field(default_factory=dict)
    pause_s: float = 0.0
    answered: int = 0
    refused: int = 0
    failures: list[str] = field(default_factory=list)
    over: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Load:
        self._threads = [threading.Thread(target=self._send, args=(i,)) for i in range(self.clients)]
        for thread in self._threads:
            thread.start()
        deadline = time.monotonic() + 20
        while self.answered < 3 * self.clients:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        for thread in self._threads:
            thread.join(timeout=60)

    def wait(self) -> None:
        for thread in self._threads:
            thread.join(timeout=60)

    def _send(self, number: int) -> None:
        with httpx.Client(timeout=30, verify=False, headers=self.headers) as client:
            while not self.over.is_set():
                try:
                    self._ask(client, stream=number % 2 == 1)
                except httpx.ConnectError:
                    self.refused += 1
                    return
                except Exception as error:
                    self.failures.append(repr(error))
                    return
                time.sleep(self.pause_s)

    def _ask(self, client: httpx.Client, *, stream: bool) -> None:
        answer = client.post(f"{self.url}/v1/chat/completions", json={**BODY, "stream": stream})
        whole = answer.text.endswith("data: [DONE]\n\n") if stream else "choices" in answer.json()
        if answer.status_code != 200 or not whole:
            self.failures.append(f"{answer.status_code}: {answer.text}")
        self.answered += 1


def rest_of(connection: socket.socket) -> bytes:
    return b"".join(iter(lambda: connection.recv(65536), b""))


@pytest.mark.parametrize("workers", [1, 2])
def test_a_gateway_that_stops_under_load_fails_no_request(
    serving: Start, stand_in: Start, workers: int
) -> None:
    teacher = stand_in({"hello": "greeting"}, latency_ms=30)
    running = serving(config(teacher.url, workers))
    with Load(running.url, clients=8, pause_s=0.01) as load:
        running.child.send_signal(signal.SIGTERM)
        assert running.child.wait(timeout=30) == 0, running.stderr
        load.wait()
    assert load.failures == []
    assert load.refused == 8, "each went on until nobody listened any more"
    assert "Traceback" not in running.stderr


def test_a_kept_connection_is_answered_after_the_stop_and_then_closed(
    serving: Start, stand_in: Start
) -> None:
    running = serving(config(stand_in({"hello": "x"}).url))
    with httpx.Client(base_url=running.url, verify=False) as client:
        assert "connection" not in client.get("/readyz").headers
        running.child.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + 10
        while True:  # until the gateway has noticed
            answer = client.get("/readyz")
            if answer.status_code == 503:
                break
            assert time.monotonic() < deadline
    assert answer.json()["status"] == "draining"
    assert answer.headers["connection"] == "close"
    assert running.child.wait(timeout=10) == 0


def test_an_idle_connection_holds_nobody_up_for_long(serving: Start, stand_in: Start) -> None:
    running = serving(config(stand_in({"hello": "x"}).url))
    with socket.create_connection(("127.0.0.1", int(running.url.rpartition(":")[2])), timeout=20) as idle:
        began = time.monotonic()
        running.child.send_signal(signal.SIGTERM)
        assert idle.recv(1) == b""
        assert time.monotonic() - began < 10
    assert running.child.wait(timeout=10) == 0


def test_at_the_end_of_the_grace_time_clients_are_told(serving: Start, stand_in: Start) -> None:
    running = serving(config(stand_in({"hello": "one two three four"}).url, more="grace_s = 0.5"))
    address = ("127.0.0.1", int(running.url.rpartition(":")[2]))
    said = {}
    with socket.create_connection(address, timeout=20) as whole, socket.create_connection(address) as stream:
        stream.settimeout(20)
        for connection, more in (
            (whole, {"metadata": {"stand_in": "stall=60"}}),
            (stream, {"metadata": {"stand_in": "hang-after=3"}, "stream": True}),
        ):
            body = json.dumps({**BODY, **more}).encode()
            head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\ncontent-length: %d\r\n\r\n" % len(body)
            connection.sendall(head + body)
        said[stream] = b""
        while b"one" not in said[stream]:
            said[stream] += stream.recv(65536)
        running.child.send_signal(signal.SIGTERM)
        for connection in (whole, stream):
            said[connection] = said.get(connection, b"") + rest_of(connection)
    assert said[whole].startswith(b"HTTP/1.1 503 ")
    assert json.loads(said[whole].partition(b"\r\n\r\n")[2])["error"]["code"] == "stopping"
    last = said[stream].rpartition(b"data: ")[2].partition(b"\n")[0]
    assert json.loads(last)["error"]["code"] == "stopping"
    assert b"[DONE]" not in said[stream]
    assert not said[stream].endswith(b"0\r\n\r\n"), "and it isn't ended as if it were whole"
    assert running.child.wait(timeout=20) == 0


@pytest.mark.parametrize("workers", [1, 2])
def test_the_second_signal_means_at_once(serving: Start, stand_in: Start, workers: int) -> None:
    teacher = stand_in({"hello": "x"}, latency_ms=60_000, latency_spread=0)
    running = serving(config(teacher.url, workers))
    address = ("127.0.0.1", int(running.url.rpartition(":")[2]))
    body = json.dumps(BODY).encode()
    with socket.create_connection(address, timeout=20) as waiting:
        waiting.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\ncontent-length: %d\r\n\r\n%s"
            % (len(body), body)
        )
        time.sleep(0.3)
        running.child.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        assert running.child.poll() is None, "the request is waited for"
        began = time.monotonic()
        running.child.send_signal(signal.SIGTERM)
        assert running.child.wait(timeout=20) == 0
    assert time.monotonic() - began < 8


@pytest.mark.parametrize("workers", [1, 2])
def test_a_gateway_that_is_reloaded_under_load_fails_no_request(
    serving: Start, stand_in: Start, eventually: Start, workers: int
) -> None:
    env = {"TEACHER_KEY": "sk-teacher"}
    teachers = [stand_in({"hello": "x"}, latency_ms=20, api_key="sk-teacher") for _ in range(2)]
    running = serving(config(teachers[0].url, workers, 'api_keys = ["old", "both"]'), env=env)
    with Load(running.url, clients=6, headers={"authorization": "Bearer both"}) as load:
        for turn in range(1, 9):
            running.config.write_text(
                config(teachers[turn % 2].url, workers, f'api_keys = ["key-{turn}", "both"]')
            )
            before = running.stderr.count("the configuration was reloaded")
            running.child.send_signal(signal.SIGHUP)
            eventually(
                lambda before=before: (
                    running.stderr.count("the configuration was reloaded") == before + workers
                )
            )
    assert load.failures == []
    assert load.refused == 0
    asked = [teacher.stats()["answered"] for teacher in teachers]
    assert min(asked) > 0, "both teachers were asked"
    for key, status in (("old", 401), ("key-7", 401), ("key-8", 200), ("both", 200)):
        headers = {"authorization": f"Bearer {key}"}
        for _ in range(2 * workers):
            answer = httpx.post(
                f"{running.url}/v1/chat/completions", json=BODY, headers=headers, verify=False
            )
            assert answer.status_code == status
    assert running.metric("understudy_requests_total", code="200") == load.answered + 4 * workers


@pytest.mark.parametrize("workers", [1, 2])
def test_a_configuration_that_cant_be_used_changes_nothing(
    serving: Start, stand_in: Start, eventually: Start, workers: int
) -> None:
    teacher = stand_in({"hello": "x"})
    running = serving(config(teacher.url, workers))
    running.config.write_text(config(teacher.url, workers, "prot = 1"))
    running.child.send_signal(signal.SIGHUP)
    eventually(lambda: "unknown key server.prot: did you mean server.port?" in running.stderr)
    assert httpx.post(f"{running.url}/v1/chat/completions", json=BODY, verify=False).status_code == 200
    running.config.write_text(config(teacher.url, workers + 1, "max_body_bytes = 1024"))
    running.child.send_signal(signal.SIGHUP)
    eventually(lambda: running.stderr.count("only a restart changes server.workers") == workers)
    large = {**BODY, "user": "u" * 2000}
    answer = httpx.post(f"{running.url}/v1/chat/completions", json=large, verify=False)
    assert answer.status_code == 413


@pytest.mark.parametrize("workers", [1, 2])
def test_a_configuration_that_changes_while_the_gateway_starts_is_taken_in(
    serving: Start, stand_in: Start, eventually: Start, workers: int
) -> None:
    teacher = stand_in({"hello": "x"})
    running = serving(config(teacher.url, workers), wait=False)
    running.config.write_text(config(teacher.url, workers, "max_body_bytes = 1024"))
    running.child.send_signal(signal.SIGHUP)
    eventually(lambda: running.stderr.count("the configuration was reloaded") == workers)
    large = {**BODY, "user": "u" * 2000}
    answer = httpx.post(f"{running.url}/v1/chat/completions", json=large, verify=False)
    assert answer.status_code == 413
