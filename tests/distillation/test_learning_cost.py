"""What learning costs: measured, written down look by look, and shown."""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import astuple

import pytest

from distillation.console import print_tasks
from distillation.economics import StudentCost, TaskSummary
from distillation.learning_cost import LearningCost, all_of, core_seconds
from serving.exchange import Json, StudentAnswer
from serving.student_choice import StudentChoice
from serving.student_settings import StudentSettings


def test_children_count_once_they_have_ended() -> None:
    before = core_seconds()
    spin = "import time\nend = time.process_time() + 0.5\nwhile time.process_time() < end: pass"
    subprocess.run([sys.executable, "-c", spin], check=True)
    assert core_seconds() - before >= 0.45


def test_waiting_costs_no_core() -> None:
    before = core_seconds()
    time.sleep(0.3)
    assert core_seconds() - before < 0.3


def test_cores_and_answers_are_paid_by_their_own_prices() -> None:
    choice = StudentChoice(kind="lm", base_url="http://gpu/v1", model="m", usd_per_hour=7200.0)
    asked = [StudentAnswer("m", [{"index": 0}], None, 9.0, 1.0, device_s=0.5)] * 4
    cost = LearningCost.of(10.0, asked, StudentSettings(usd_per_hour=3600.0), choice)
    assert astuple(cost) == (1, 10.0, 2.0, pytest.approx(14.0))


def test_looks_add_up_and_those_of_before_say_nothing() -> None:
    one, two = LearningCost(1, 2.0, 0.0, 0.1), LearningCost(1, 3.0, 4.0, 0.2)
    damaged: list[Json] = [
        {"learning": 7},
        {"learning": {"looks": "x"}},
        {"learning": {"looks": 1, "core_s": 1e999}},
    ]
    entries: list[Json] = [
        {"serial": 1},
        {"serial": 1, "learning": one.to_json()},
        {"learning": two.to_json()},
        *damaged,
    ]
    together = all_of(entries)
    assert together is not None
    assert astuple(together) == (2, 5.0, 4.0, pytest.approx(0.3))
    assert all_of([{"serial": 1}]) is None


def test_a_person_reads_what_a_student_costs(capsys: pytest.CaptureFixture[str]) -> None:
    summary = TaskSummary(
        task="intents",
        exchanges=10,
        routes={"student": 10},
        labels=10,
        distinct_answers=2,
        unseen=0.0,
        cost_usd=0.0,
        teacher_cost_usd=4e-4,
        release="r0001",
        outlook="yes",
        damaged_lines=0,
        student=StudentCost(answers=10, seconds=1.5e-4, usd=2.1e-9),
        learning=LearningCost(looks=2, core_s=12.0, student_s=0.0, usd=0.0002),
    )
    print_tasks([summary])
    said = capsys.readouterr().out
    assert "an answer takes 0.15 ms of what it runs on, $0.0000021 per 1,000; the teacher's $0.4000" in said
    assert "190,476 times as much" in said
    assert "2 looks took 12.0 s of a core, $0.0002" in said
