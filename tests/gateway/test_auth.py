from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import openai
import pytest
from pydantic import SecretStr

from gateway.auth import VERIFIED_FOR_S, Gate
from serving.errors import RequestError

Start = Callable[..., Any]
BODY = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}


def key(value: str) -> dict[str, str]:
    return {"authorization": f"Bearer {value}"}


def test_only_known_keys_are_let_in_and_they_stay_inside(stand_in: Start, gateway: Start) -> None:
    digest = hashlib.sha256(b"hashed-key").hexdigest()
    running = gateway(
        stand_in({"hello": "x"}, api_key="teacher-key").url,
        server={"api_keys": ["plain-key", f"sha256:{digest}"]},
    )
    for path in ("/v1/chat/completions", "/v1/echo"):
        for good in ("plain-key", "hashed-key"):
            assert running.post(path, json=BODY, headers=key(good)).status_code == 200
        refusable = [
            {},
            key("wrong"),
            key(digest),
            {"authorization": "Bearer"},
            {"authorization": "Basic plain-key"},
        ]
        for headers in refusable:
            refused = running.post(path, json=BODY, headers=headers)
            assert refused.status_code == 401
            assert refused.json()["error"]["code"] == "invalid_api_key"
    with running.client("wrong") as client, pytest.raises(openai.AuthenticationError):
        client.models.list()
    tenants = {exchange.tenant for exchange in running.exchanges()}
    assert len(tenants) == 2
    assert running.metric("understudy_requests_total", code="401") == 11
    assert running.get("/healthz").status_code == 200, "health needs no key"


def test_without_keys_of_its_own_the_clients_key_is_forwarded(stand_in: Start, gateway: Start) -> None:
    running = gateway(stand_in({"hello": "x"}, api_key="client-key").url, teacher_key=None)
    assert running.post(json=BODY, headers=key("client-key")).status_code == 200
    assert running.post(json=BODY, headers=key("made-up")).status_code == 401
    assert running.get("/v1/models", headers=key("client-key")).status_code == 200


def test_credentials_that_are_no_bearer_key_are_told_apart() -> None:
    gate = Gate([], None)
    gate.teacher_accepted(gate.admit("Basic good"))
    assert gate.verified(gate.admit("Basic good"))
    assert not gate.verified(gate.admit("Basic made-up"))
    assert not gate.verified(gate.admit(None))


def test_a_key_is_verified_for_a_while_by_the_teachers_yes() -> None:
    now = [0.0]
    gate = Gate([], None, clock=lambda: now[0])
    caller = gate.admit("Bearer a")
    assert caller.authorization == "Bearer a"
    assert not gate.verified(caller)
    gate.teacher_accepted(caller)
    assert gate.verified(caller)
    assert not gate.verified(gate.admit("Bearer b"))
    now[0] = VERIFIED_FOR_S
    assert not gate.verified(caller)
    gate.teacher_accepted(caller)
    gate.teacher_refused(caller)
    assert not gate.verified(caller)


def test_with_the_teachers_key_everyone_is_served_and_told_apart() -> None:
    gate = Gate([], SecretStr("teacher"))
    one, two, nobody = gate.admit("Bearer 1"), gate.admit("Bearer 2"), gate.admit(None)
    assert len({one.tenant, two.tenant, nobody.tenant}) == 3
    assert nobody.tenant == "anonymous"
    assert gate.verified(nobody)
    assert one.authorization is None


def test_a_gateways_own_key_never_becomes_the_teachers() -> None:
    gate = Gate([SecretStr("own")], None)
    assert gate.admit("Bearer own").authorization is None
    assert not gate.client_keys
    with pytest.raises(RequestError) as caught:
        gate.admit("Bearer sk-secret-of-somebody")
    assert "secret" not in str(caught.value)
