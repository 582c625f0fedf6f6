"""Through the whole gateway: what a client has the last byte of survives a loss of power at that moment."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx

from serving.log import LogReader
from serving.releases import ReleaseStore

Start = Callable[..., Any]


def asked(text: str, **more: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": text}], **more}


def streamed_text(body: bytes) -> str:
    frames = [line.removeprefix("data: ") for line in body.decode().splitlines() if line]
    assert frames[-1] == "[DONE]"
    deltas = [choice["delta"] for frame in frames[:-1] for choice in json.loads(frame)["choices"]]
    return "".join(delta.get("content") or "" for delta in deltas)


def test_the_last_byte_of_an_answer_waits_until_its_exchange_is_safe(
    stand_in: Start, gateway: Start, forgetful_disk: Start, publish: Start, eventually: Start, tmp_path: Path
) -> None:
    disk = forgetful_disk(sync_s=0.005)
    answers = {f"number {i}": f"answer {i}" for i in range(24)}
    running = gateway(
        stand_in(answers, latency_ms=0).url,
        disk=disk,
        log={"segment_bytes": 4096, "max_wait_s": 60.0},
        task=[{"name": "whole", "match": {"model": "m"}}, {"name": "own"}],
    )
    publish(running.state_dir, "own", {"parcel lost": "lost", "card stolen": "stolen"})
    eventually(lambda: running.get("/readyz").json()["live_releases"] == 1)
    wrong: list[str] = []

    def client(number: int) -> None:
        with httpx.Client(base_url=running.url, verify=False, timeout=60) as http:
            for i in range(number, 24, 6):
                text, stream, task = f"number {i}", i % 2 == 0, "whole"
                if number == 5:  # a student's answer is waited for as well
                    text, task = "parcel lost", "own"
                name = f"{number}-{i}"
                body = b""
                with http.stream(
                    "POST",
                    "/v1/chat/completions",
                    json=asked(text, stream=stream),
                    headers={"x-request-id": name, "x-understudy-task": task},
                ) as reply:
                    for piece in reply.iter_raw():
                        body += piece
                        if body.endswith(b"data: [DONE]\n\n"):
                            break
                    left = disk.without_power(running.state_dir, tmp_path / "left" / name)
                got = streamed_text(body) if stream else json.loads(body)["choices"][0]["message"]["content"]
                found = [e for e in LogReader(left).exchanges(task).exchanges if e.request_id == name]
                logged = [
                    choice["message"]["content"]
                    for exchange in found
                    for answer in (exchange.teacher, exchange.student)
                    if answer is not None
                    for choice in answer.choices
                ]
                if logged != [got]:
                    wrong.append(f"{name} got {got!r}, and {logged} is left")

    with ThreadPoolExecutor() as clients:
        list(clients.map(client, range(6)))
    assert wrong == []
    assert len(running.exchanges()) == 24
    assert {exchange.route for exchange in running.exchanges()} == {"teacher", "student"}


def test_a_release_that_is_live_is_live_after_a_loss_of_power(forgetful_disk: Start, tmp_path: Path) -> None:
    state_dir = tmp_path / "state"
    disk = forgetful_disk()
    store = ReleaseStore(state_dir, disk=disk)
    for number in range(3):
        name = store.write("t", {"router.json": b"{}", "student/a.txt": b"x" * number}, {"n": number})
        written = ReleaseStore(disk.without_power(state_dir, tmp_path / f"written-{number}"))
        assert written.read("t", name).files["student/a.txt"] == b"x" * number
        assert store.set_live("t", name) == ReleaseStore(
            disk.without_power(state_dir, tmp_path / f"live-{number}")
        ).live("t")
    assert store.rollback("t") == ReleaseStore(disk.without_power(state_dir, tmp_path / "back")).live("t")
    assert store.set_live("t", None) == ReleaseStore(disk.without_power(state_dir, tmp_path / "no")).live("t")
