"""The benchmark of students: what it splits, measures, keeps and says."""

from __future__ import annotations

import csv
import random
import subprocess
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from rich.console import Console

from loadtest.stack import command, environment
from loadtest.students.outcome import Alone, Kept, Outcome, Quality, Through
from loadtest.students.probe import Said
from loadtest.students.quality import quality_of
from loadtest.students.split import TEACHER, Example, NoRecording, read_split
from loadtest.students.table import table_of
from loadtest.throughput.scene import teacher
from routers.confidence import Confidence
from routers.router import Router

ANSWERS = ("lost", "late", "broken", "refund")
OUTCOME = Outcome(
    student="linear",
    seed=1,
    training=10,
    tested=10,
    quality=Quality(agreement=0.8, accuracy=0.75, answered=0.6, aurc=0.05, ece=0.02),
    alone=Alone(start_s=0.5, memory_bytes=10_000_000, p50_s=0.0002, p99_s=0.001, per_s=5000.0),
    through=Through(per_s=3000.0, p50_s=0.01, device_s=0.0002, usd_per_1000=2.5e-6, others=0.0),
    disk_bytes=2_000_000,
    learning_s=50.0,
    learning_usd=0.001,
    teacher_accuracy=0.83,
    teacher_usd_per_1000=15.0,
)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A recording of four answers, said in their own words."""
    drawn = random.Random(1)
    folder = tmp_path / "recording"
    folder.mkdir()
    (folder / "system_prompt.txt").write_text("Answer with one label.\n")
    for name, count in (("stream", 240), ("dev", 40), ("seed", 8)):
        with (folder / f"{name}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            gold_only = name == "seed"
            writer.writerow(["text", "gold"] if gold_only else ["text", "teacher", "gold"])
            for number in range(count):
                answer = ANSWERS[number % len(ANSWERS)]
                text = f"my parcel is {answer} number {drawn.randrange(1000)}"
                writer.writerow([text, answer] if gold_only else [text, answer, answer])
    return folder


def test_nothing_is_tested_that_was_learned_from(data: Path) -> None:
    one, again, other = read_split(data, 1), read_split(data, 1), read_split(data, 2)
    assert (len(one.training), len(one.test)) == (120 + 40 + 8, 120)
    assert one == again and one.test != other.test
    learned, tested = ({id(example) for example in part} for part in (one.training, one.test))
    assert not learned & tested
    few = read_split(data, 1, rows=60)
    assert len({e.teacher for e in few.training}) == 2
    assert len(few.training) == 60


def test_a_recording_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(NoRecording, match=r"stream\.csv"):
        read_split(tmp_path, 1)


def test_the_measures_are_those_of_the_releases_own_ranking() -> None:
    """Sure of three answers, of which one is wrong, and unsure of a fourth."""
    test = [Example(str(n), "lost", "late" if n == 1 else "lost") for n in range(4)]
    said = [
        Said([{"message": {"content": text}, "finish_reason": "stop"}], score, {})
        for text, score in (("lost", 4.0), ("lost", 3.0), ("late", 1.0), ("lost", None))
    ]
    found = quality_of(said, test, Router(Confidence.of_score(1.0, 0.0), rank_threshold=0.0))
    assert found.agreement == 0.75
    assert found.accuracy == 0.5
    assert found.answered == 0.5
    assert 0.0 < found.aurc < 0.25
    assert 0.0 < found.ece < 1.0


def test_what_was_measured_is_kept_for_what_it_depends_on(tmp_path: Path) -> None:
    kept = Kept(tmp_path, {"seconds": 5})
    kept.write(OUTCOME)
    assert kept.read("linear", 1) == OUTCOME
    assert kept.read("linear", 2) is None
    assert Kept(tmp_path, {"seconds": 6}).read("linear", 1) is None
    (file,) = tmp_path.glob("*.json")
    file.write_text('{"student": "linear"}')
    assert kept.read("linear", 1) is None


def test_students_stand_beside_the_first_one(capsys: pytest.CaptureFixture[str]) -> None:
    slow = replace(OUTCOME, student="encoder", alone=replace(OUTCOME.alone, p50_s=0.005))
    Console(width=160).print(table_of({"linear": [OUTCOME, OUTCOME], "encoder": [slow]}))
    said = " ".join(capsys.readouterr().out.split())
    assert "2 seeds" in said
    assert "0.20 ms │ 5.00 ms (25 ×)" in said
    assert "5,000 ×" in said and "200 ×" in said, "faster than the teacher"
    # 2.5e-6 USD buy 0.2 s of a core, and 1,000 answers take a third of a second of it, the gateway's part included.
    assert "$0.000004" in said and "3,600,000 ×" in said, "cheaper"


def test_the_stand_in_answers_under_the_teachers_name() -> None:
    """Twenty answers to what is escalated by another name suspend a release in the middle of its measurement."""
    with teacher(TEACHER) as url:
        answer = httpx.post(f"{url}/chat/completions", json={"messages": []})
    assert answer.json()["model"] == TEACHER


def test_a_student_is_learned_and_measured_as_it_is_served(data: Path, tmp_path: Path) -> None:
    arguments = [
        str(data),
        "--only",
        "linear",
        "--seeds",
        "1",
        "--seconds",
        "0.2",
        "--cache",
        str(tmp_path / "kept"),
    ]
    first = _run(*arguments)
    assert "agrees with GPT-4 " in first
    assert "not measured" not in first
    (kept,) = (tmp_path / "kept").glob("linear-1-*.json")
    written = kept.stat().st_mtime_ns
    second = " ".join(_run(*arguments).split())
    assert "learned from 168 messages" in second and "tested on 120" in second
    assert "measured before" not in first
    assert "1 of 1 were measured before" in second
    assert kept.stat().st_mtime_ns == written, "measured once"


def _run(*arguments: str) -> str:
    done = subprocess.run(
        command(*arguments, module="loadtest.students"),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
