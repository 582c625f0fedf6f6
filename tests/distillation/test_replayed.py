"""Answers from the cache are traffic like any other: the promise speaks of them (STATISTICS.md §1)."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distillation.dataset import Dataset, build_dataset
from distillation.economics import summarise
from serving.agreement import ExactComparison
from serving.events import answered, audited, decode, encode, fold
from serving.exchange import Exchange, Origin, StudentAnswer, TeacherAnswer
from serving.settings import Settings
from serving.task_settings import TaskPolicy

Make = Callable[..., Any]
RATE = 0.3
TEXTS = 12
ACCEPTED = {f"text {i}" for i in range(TEXTS) if i % 3}
WRONG = {"text 1"}
"""The text asked most often of those the student answers: here it errs."""


def choices(text: str) -> list[dict[str, Any]]:
    return [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}]


def stream_of(count: int, seed: int) -> list[Exchange]:
    """Traffic in which few texts make up most of the requests (Zipf), every one answered afresh."""
    drawn = random.Random(seed)
    texts = drawn.choices([f"text {i}" for i in range(TEXTS)], [1 / (i + 1) for i in range(TEXTS)], k=count)
    made = []
    for number, text in enumerate(texts):
        accepted, coin = text in ACCEPTED, drawn.random() < RATE
        teacher = TeacherAnswer("big", choices(f"right {text}"), None, 0.1, cost_usd=0.001, trainable=True)
        said = "wrong" if text in WRONG else f"right {text}"
        student = StudentAnswer("linear", choices(said), None, 0.0, 2.0, cost_usd=1e-6)
        made.append(
            Exchange(
                id=f"{number:05d}",
                request_id=f"req_{number}",
                created=float(number),
                task="intents",
                tenant="t",
                request={"model": "intents", "messages": [{"role": "user", "content": text}]},
                route="student" if accepted else "teacher",
                reason="confident" if accepted else "low_confidence",
                release="r0001",
                student=student,
                teacher=None if accepted else teacher,
                coin=coin,
                audit_rate=RATE,
                audit="none" if not coin else "pending" if accepted else "answered",
                propensity=RATE if accepted else 1.0,
                cost_usd=1e-6 if accepted else 0.001,
            )
        )
    return made


def cached(exchanges: list[Exchange]) -> list[Exchange]:
    """The same requests before a cache: all but the first of each text are replays."""
    seen: set[str] = set()
    made = []
    for exchange in exchanges:
        text = exchange.request["messages"][0]["content"]
        if text in seen:
            origin: Origin = "student" if exchange.route == "student" else "teacher"
            hit: dict[str, Any] = {
                "route": "cache",
                "origin": origin,
                "reason": f"hit:{origin}",
                "cost_usd": 0.0,
            }
            exchange = dataclasses.replace(exchange, **hit)
        seen.add(text)
        made.append(exchange)
    return made


def logged(exchanges: list[Exchange]) -> list[Exchange]:
    """What the log makes of them, after all audits that are owed have been done."""
    events = [answered(exchange) for exchange in exchanges]
    for exchange in exchanges:
        if exchange.audit == "pending":
            text = exchange.request["messages"][0]["content"]
            teacher = TeacherAnswer(
                "big", choices(f"right {text}"), None, 0.1, cost_usd=0.001, trainable=True
            )
            events.append(
                audited(exchange.id, teacher=teacher, agreement=text not in WRONG, at=exchange.created)
            )
    read = [decode(encode(event)) for event in events]
    folded = fold(event for event in read if event is not None)
    return sorted(folded.values(), key=lambda exchange: exchange.id)


def dataset(exchanges: list[Exchange]) -> Dataset:
    return build_dataset(logged(exchanges), ExactComparison())


def disagreement(exchanges: list[Exchange]) -> float:
    """How often the student's served answers disagree, weighted by propensity, as a look would see it."""
    told = [
        (e.agreement, e.propensity) for e in logged(exchanges) if e.by_student and e.agreement is not None
    ]
    return sum(1 / p for agreed, p in told if not agreed and p) / sum(1 / p for _, p in told if p)


@pytest.mark.parametrize("seed", range(5))
def test_a_cache_changes_nothing_of_what_is_counted(seed: int) -> None:
    fresh = stream_of(600, seed)
    behind_a_cache = cached(fresh)
    assert sum(one.replayed for one in behind_a_cache) > 500
    with_cache, without = dataset(behind_a_cache), dataset(fresh)
    assert with_cache.traffic == without.traffic
    assert with_cache.rows == without.rows
    assert with_cache.left_out == without.left_out
    assert disagreement(behind_a_cache) == pytest.approx(disagreement(fresh))


@pytest.mark.parametrize("seed", range(5))
def test_leaving_hits_out_would_be_seen(seed: int) -> None:
    fresh = stream_of(600, seed)
    misses = [one for one in cached(fresh) if not one.replayed]
    served = sum(one.by_student for one in fresh)
    truth = sum(one.by_student and one.request["messages"][0]["content"] in WRONG for one in fresh) / served
    assert len(misses) == TEXTS
    judged = sum(one.request["messages"][0]["content"] in WRONG for one in misses if one.by_student)
    on_misses = judged / sum(one.by_student for one in misses)
    assert dataset(misses).traffic != dataset(fresh).traffic
    assert truth > 2 * on_misses, (
        "each text counts once, and the one that is asked most is the one that is wrong"
    )
    assert disagreement(cached(fresh)) == pytest.approx(truth, abs=0.1)


def test_replays_cost_nothing_and_their_audits_do(write_log: Make) -> None:
    fresh = stream_of(100, 1)
    behind_a_cache = logged(cached(fresh))
    state: Path = write_log(behind_a_cache)
    (summary,) = summarise(Settings(state_dir=state, task_defaults=TaskPolicy(max_disagreement=0.1)))
    asked = [one for one in behind_a_cache if one.route == "teacher"]
    answered_by_student = [one for one in behind_a_cache if one.route == "student"]
    audits = [one for one in behind_a_cache if one.by_student and one.audit == "answered"]
    expected = 0.001 * len(asked) + 1e-6 * len(answered_by_student) + 0.001 * len(audits)
    assert summary.cost_usd == pytest.approx(expected)
    assert summary.teacher_cost_usd == pytest.approx(0.001)
    assert summary.routes["cache"] == 100 - len(asked) - len(answered_by_student)


@pytest.mark.parametrize(
    ("route", "origin"),
    [("cache", None), ("cache", "nobody"), ("teacher", "student"), ("student", "student")],
)
def test_an_origin_that_makes_no_sense_is_damage(route: str, origin: str | None) -> None:
    event = {**answered(stream_of(1, 0)[0]), "route": route, "origin": origin}
    assert fold([event]) == {}
