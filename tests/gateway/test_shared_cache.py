"""Two gateways that share a Redis, over HTTP."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

HEADERS = {"x-understudy-task": "small"}


def body(text: str) -> dict[str, Any]:
    return {"model": "m", "temperature": 0, "messages": [{"role": "user", "content": text}]}


def ask(gateway: Any, text: str, **headers: str) -> tuple[str, str]:
    """Return who answered, and what."""
    reply = gateway.post(json=body(text), headers={**HEADERS, **headers})
    assert reply.status_code == 200
    return reply.headers["x-understudy-route"], reply.json()["choices"][0]["message"]["content"]


def two_gateways(gateway: Any, teacher: str, redis_url: str, tmp_path: Path, **cache: Any) -> list[Any]:
    """Each with a state directory of its own, and the same tasks."""
    return [
        gateway(
            teacher, task=[{"name": "small"}], cache={"url": redis_url, **cache}, state_dir=tmp_path / name
        )
        for name in ("a", "b")
    ]


def test_what_the_teacher_told_one_the_other_knows(
    redis: Any, stand_in: Any, gateway: Any, eventually: Any, tmp_path: Path
) -> None:
    teacher = stand_in({f"question {number}": f"answer {number}" for number in range(100)})
    one, other = two_gateways(gateway, teacher.url, redis().url, tmp_path)
    questions = iter(range(100))

    def is_shared() -> bool:
        number = next(questions)
        told = (f"question {number}", f"answer {number}")
        assert ask(one, told[0]) == ("teacher", told[1])
        route, answer = ask(other, told[0])
        assert answer == told[1]
        return route == "cache"

    # An answer is written after its client has it, so that the other may be too quick.
    eventually(is_shared)


def test_a_student_answers_for_its_own_gateway_only(
    redis: Any, stand_in: Any, gateway: Any, publish: Any, eventually: Any, tmp_path: Path
) -> None:
    teacher = stand_in({"hello world": "teacher's"})
    server = redis()
    # The first release of both: the same name, the same generation.
    for name in ("a", "b"):
        answers = {"hello world": f"{name}'s student's", "good bye": "bye"}
        assert publish(tmp_path / name, "small", answers) == "r0001"
    one, other = two_gateways(gateway, teacher.url, server.url, tmp_path)
    assert ask(one, "hello world") == ("student", "a's student's")
    eventually(lambda: ask(one, "hello world") == ("cache", "a's student's"))

    def is_in_redis() -> bool:
        ask(one, "hello world", **{"cache-control": "no-cache"})
        return bool(server.command("DBSIZE"))

    # The very first answer may have come before Redis was connected.
    eventually(is_in_redis)
    assert ask(other, "hello world") == ("student", "b's student's")


def test_a_redis_that_dies_is_a_metric_and_nothing_a_client_sees(
    redis: Any, stand_in: Any, gateway: Any, eventually: Any, tmp_path: Path
) -> None:
    teacher = stand_in({f"question {number}": "answer" for number in range(2_000)})
    server = redis()
    one, _ = two_gateways(gateway, teacher.url, server.url, tmp_path)
    questions = iter(range(2_000))

    def counts(outcome: str) -> bool:
        before = one.metric("understudy_cache_requests_total", outcome=outcome)
        assert ask(one, f"question {next(questions)}") == ("teacher", "answer")
        return bool(one.metric("understudy_cache_requests_total", outcome=outcome) > before)

    eventually(lambda: counts("miss"))
    server.kill()
    eventually(lambda: counts("error"))
    assert ask(one, "question 0") == ("cache", "answer")
    server.start()
    eventually(lambda: counts("miss"))


def test_what_many_ask_of_two_gateways_at_once_the_teacher_is_asked_once(
    redis: Any, stand_in: Any, gateway: Any, eventually: Any, tmp_path: Path
) -> None:
    teacher = stand_in({f"question {number}": "answer" for number in range(100)}, latency_ms=300)
    both = two_gateways(gateway, teacher.url, redis().url, tmp_path, single_flight="replicas")
    questions = iter(range(100))

    def asked_at_once() -> int:
        """How often the teacher is asked what sixteen ask the two gateways."""
        question = f"question {next(questions)}"
        before = teacher.stats()["chat"]
        with ThreadPoolExecutor(16) as clients:
            told = list(clients.map(lambda number: ask(both[number % 2], question), range(16)))
        assert {answer for _, answer in told} == {"answer"}
        assert sum(route == "teacher" for route, _ in told) == teacher.stats()["chat"] - before
        return int(teacher.stats()["chat"] - before)

    # Without Redis, before both are connected or when the machine is too busy, each gateway asks once.
    eventually(lambda: asked_at_once() == 1)
    assert asked_at_once() <= 2
