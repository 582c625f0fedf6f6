"""The watch as it is served: several workers, kills, and a release that goes bad in front of clients."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

from serving.releases import ReleaseStore

Start = Callable[..., Any]
TOML = """
[teacher]
base_url = "{url}/v1"
max_retries = 0
[learning]
interval_s = 0
[[task]]
name = "intents"
match = {{ model = "intents" }}
audit_rate = 1.0
"""


def ask(url: str, text: str) -> httpx.Response:
    body = {"model": "intents", "messages": [{"role": "user", "content": text}]}
    return httpx.post(f"{url}/v1/chat/completions", json=body, verify=False, timeout=30)


def kill(running: Any) -> None:
    """End the supervisor and every worker at once, as a loss of power would."""
    workers = running.workers()
    running.child.send_signal(signal.SIGKILL)
    for worker in workers:
        os.kill(worker, signal.SIGKILL)
    running.child.wait()


def test_the_alarm_comes_once_though_everything_is_killed_between_audits(
    stand_in: Start, serving: Start, publish: Start, eventually: Start, tmp_path: Path
) -> None:
    teacher = stand_in({"parcel lost": "lost", "parcel late": "something else"})
    publish(tmp_path / "state", "intents", {"parcel lost": "lost", "parcel late": "late"})
    env = {"OPENAI_API_KEY": "k"}
    store = ReleaseStore(tmp_path / "state")

    def is_live() -> bool:
        live = store.live("intents")
        return live is not None and live.release is not None

    first = serving(TOML.format(url=teacher.url), "--workers", "2", env=env)
    for text in ("parcel lost", "parcel late", "parcel late"):
        assert ask(first.url, text).headers["x-understudy-route"] == "student"
    eventually(lambda: first.metric("understudy_audits_total", outcome="disagreed") == 2)
    kill(first)
    assert is_live()
    second = serving(TOML.format(url=teacher.url), "--workers", "2", env=env)
    for _ in range(12):
        assert ask(second.url, "parcel late").status_code == 200
    eventually(lambda: not is_live())
    eventually(lambda: ask(second.url, "parcel late").headers["x-understudy-reason"] == "no_release")
    eventually(lambda: second.metric("understudy_withdrawals_total", cause="disagreement") == 1)
    assert (first.stderr + second.stderr).count("is withdrawn: ") == 1
    live = store.live("intents")
    assert live is not None
    assert [one.release for one in live.withdrawals] == ["r0001"]


def test_other_inputs_show_before_any_audit(
    stand_in: Start, gateway: Start, publish: Start, tmp_path: Path
) -> None:
    teacher = stand_in({"parcel lost": "lost"}, default="unclear")
    store = ReleaseStore(tmp_path / "state")
    name = publish(tmp_path / "state", "intents", {"parcel lost": "lost", "parcel late": "late"}, live=False)
    written = store.read("intents", name)
    sure = {"cuts": [0.5, 0.9], "shares": [0.0, 0.1, 0.9]}
    card = {"student": "linear", "confidence_spread": sure}
    store.set_live("intents", store.write("intents", written.files, card))
    running = gateway(teacher.url, task=[{"name": "intents", "match": {"model": "intents"}}])
    for _ in range(20):
        assert ask(running.url, "parcel lost").headers["x-understudy-route"] == "student"
    familiar = running.metric("understudy_confidence_drift", task="intents")
    for _ in range(60):
        assert ask(running.url, "something else").headers["x-understudy-route"] == "teacher"
    drifted = running.metric("understudy_confidence_drift", task="intents")
    assert familiar < 0.01
    assert 0.04 < drifted < 0.08, "60 of about 1,000 requests"
