"""Who may see the metrics and the details of readiness."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import pytest

from gateway.auth import AdminGate, is_loopback
from serving.errors import RequestError

Start = Callable[..., Any]
DIGEST = hashlib.sha256(b"admin").hexdigest()


@pytest.mark.parametrize("configured", ["admin", f"sha256:{DIGEST}"])
def test_with_a_key_only_admins_see_metrics_and_details(
    stand_in: Start, gateway: Start, configured: str
) -> None:
    running = gateway(stand_in({}).url, server={"admin_key": configured, "api_keys": ["a-clients"]})
    for authorization in (None, "Bearer wrong", f"Bearer {DIGEST}", "Basic admin", "Bearer a-clients"):
        headers = {} if authorization is None else {"authorization": authorization}
        refused = running.get("/metrics", headers=headers)
        assert refused.status_code == 401
        assert refused.headers["www-authenticate"] == "Bearer"
        assert refused.json()["error"]["code"] == "invalid_api_key"
        assert "admin_key" in refused.json()["error"]["message"]
        ready = running.get("/readyz", headers=headers)
        assert (ready.status_code, ready.json()) == (200, {"status": "ready"})
    admin = {"authorization": "Bearer admin"}
    assert "understudy_requests_total" in running.get("/metrics", headers=admin).text
    assert running.get("/readyz", headers=admin).json()["log"] == "writable"
    assert running.get("/healthz").json() == {"status": "alive"}
    assert running.post("/v1/models", headers=admin).status_code == 401, "an admin's key is no client's"


def test_without_a_key_loopback_is_open_and_everything_else_shut() -> None:
    AdminGate(None, "127.0.0.1").admit(None)
    shut = AdminGate(None, "0.0.0.0")
    assert not shut.admits("Bearer anything")
    with pytest.raises(RequestError, match=r"has no server\.admin_key: set one") as caught:
        shut.admit(None)
    assert caught.value.status == 401


def test_a_gateway_that_others_can_reach_shows_strangers_nothing(stand_in: Start, gateway: Start) -> None:
    running = gateway(stand_in({}).url, server={"host": "0.0.0.0"})
    assert running.get("/metrics").status_code == 401
    assert running.get("/readyz").json() == {"status": "ready"}


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("127.0.0.1", True),
        ("127.8.8.8", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("10.0.0.1", False),
        ("localhost.example.com", False),
        ("", False),
    ],
)
def test_loopback_is_told_from_the_rest(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


def test_a_log_that_cant_be_written_takes_no_gateway_out(
    stand_in: Start, gateway: Start, eventually: Start
) -> None:
    running = gateway(stand_in({"hello": "x"}).url)
    tasks = running.state_dir / "tasks"
    tasks.rename(running.state_dir / "away")
    try:
        ready = running.get("/readyz")
        assert ready.status_code == 200
        assert ready.json()["status"] == "degraded"
        assert ready.json()["log"].startswith("the state directory isn't writable: ")
    finally:
        (running.state_dir / "away").rename(tasks)
    eventually(lambda: running.get("/readyz").json()["status"] == "ready")
