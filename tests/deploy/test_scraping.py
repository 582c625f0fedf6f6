"""A real Prometheus, with the configuration and the rules as they are shipped, before a real gateway."""

from __future__ import annotations

import re
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

Start = Callable[..., Any]
SHIPPED = Path(__file__).parents[2] / "deploy" / "prometheus"


@pytest.fixture
def prometheus(require: Start, tmp_path: Path) -> Iterator[Callable[[str, str], str]]:
    """Start Prometheus for a gateway (`host:port`) with its admin key; gives its address."""
    require("prometheus")
    children: list[subprocess.Popen[bytes]] = []

    def start(gateway: str, key: str) -> str:
        config = (SHIPPED / "prometheus.yml").read_text()
        for shipped, here in (
            ("gateway:8080", gateway),
            ("/etc/prometheus/understudy-admin-key", str(tmp_path / "key")),
            ("interval: 15s", "interval: 1s"),
        ):
            assert shipped in config
            config = config.replace(shipped, here)
        (tmp_path / "prometheus.yml").write_text(config)
        # Their first round comes within an interval, and some are of five minutes.
        rules = re.sub(r"interval: \w+", "interval: 1s", (SHIPPED / "rules.yml").read_text())
        (tmp_path / "rules.yml").write_text(rules)
        (tmp_path / "key").write_text(key)
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        children.append(
            subprocess.Popen(
                [
                    "prometheus",
                    f"--config.file={tmp_path / 'prometheus.yml'}",
                    f"--storage.tsdb.path={tmp_path / 'data'}",
                    f"--web.listen-address=127.0.0.1:{port}",
                ],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        )
        return f"http://127.0.0.1:{port}"

    yield start
    for child in children:
        child.terminate()
        try:
            child.wait(timeout=20)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def test_prometheus_scrapes_with_the_admin_key_and_evaluates_every_rule(
    prometheus: Start, stand_in: Start, gateway: Start
) -> None:
    running = gateway(stand_in({"hello": "x"}).url, server={"admin_key": "of-prometheus"})
    assert running.get("/metrics").status_code == 401
    body = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}
    assert running.post(json=body).status_code == 200
    url = prometheus(running.url.removeprefix("http://"), "of-prometheus\n")

    def asked(path: str, **query: str) -> Any:
        try:
            answer = httpx.get(f"{url}/api/v1/{path}", params=query, timeout=10)
        except httpx.TransportError:
            return None
        # While it starts it says 503, and not in JSON.
        return answer.json()["data"] if answer.status_code == 200 else None

    deadline = time.monotonic() + 60
    while not (asked("query", query="sum(understudy_requests_total)") or {}).get("result"):
        assert time.monotonic() < deadline, "nothing was scraped"
        time.sleep(0.2)
    (target,) = asked("targets")["activeTargets"]
    assert (target["health"], target["labels"]["job"]) == ("up", "understudy")
    while True:
        rules = [rule for group in asked("rules")["groups"] for rule in group["rules"]]
        if all(rule["health"] != "unknown" for rule in rules):
            break
        assert time.monotonic() < deadline, "rules weren't evaluated"
        time.sleep(0.2)
    assert len(rules) > 20
    assert [(rule["name"], rule["lastError"]) for rule in rules if rule["health"] != "ok"] == []
