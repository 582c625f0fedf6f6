"""Answers kept beside the log: read back as they were, whatever was torn, and gone when they have to be."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.disk import Disk
from serving.events import answered, encode
from serving.exchange import Exchange, StudentAnswer
from serving.forgetting import Whose, forget
from serving.retention import remove_expired
from serving.student_answers import ErasedMeanwhile, StudentAnswers, erase_answers, remove_old_answers

STUDENT = "0123456789abcdef"
DAY_S = 86_400.0


def answer(text: str = "card", **more: Any) -> StudentAnswer:
    choices = [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}]
    return StudentAnswer(
        **{"model": "small", "choices": choices, "usage": None, "latency_s": 0.1, "score": -0.5, **more}
    )


def store(state_dir: Path, student: str = STUDENT) -> StudentAnswers:
    return StudentAnswers(state_dir, "t", student)


def the_file(state_dir: Path) -> Path:
    return state_dir / "tasks" / "t" / "student" / f"{STUDENT}.jsonl"


def log_of(state_dir: Path, *ids: str, created: float = 1000.0) -> None:
    path = state_dir / "tasks" / "t" / "events" / "00000000-1-1.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    made = [
        Exchange(
            id,
            id,
            created,
            "t",
            "a" * 16,
            {"model": "m", "messages": [], "user": id},
            "teacher",
            "no_release",
        )
        for id in ids
    ]
    path.write_bytes(b"".join(encode(answered(exchange)) for exchange in made))


def test_what_was_kept_is_read_by_the_next_process(tmp_path: Path) -> None:
    one = answer(signals={"first_logprob": -0.25})
    store(tmp_path).append("a", 5.0, one)
    store(tmp_path).append("b", 6.0, answer("parcel"))
    store(tmp_path).append("a", 5.0, answer("card", score=-0.25))
    assert store(tmp_path).read() == {"a": answer("card", score=-0.25), "b": answer("parcel")}
    assert store(tmp_path, "f" * 16).read() == {}, "another student's answers are another file"
    assert store(tmp_path).read()["b"].choices == answer("parcel").choices


def test_a_signal_that_is_no_number_stays_one(tmp_path: Path) -> None:
    store(tmp_path).append("a", 5.0, answer(score=math.nan, signals={"first_logprob": math.nan}))
    read = store(tmp_path).read()["a"]
    assert math.isnan(read.score)
    assert math.isnan(read.signals["first_logprob"])


@given(cut=st.integers(min_value=0, max_value=10_000))
def test_torn_anywhere_the_lines_before_are_read_and_the_next_one_fits(
    tmp_path_factory: pytest.TempPathFactory, cut: int
) -> None:
    state = tmp_path_factory.mktemp("state")
    kept = store(state)
    for number in range(3):
        kept.append(str(number), float(number), answer(str(number)))
    data = the_file(state).read_bytes()
    cut %= len(data) + 1
    the_file(state).write_bytes(data[:cut])
    whole = data[: cut + 1].count(b"\n")  # of a line that lacks its end only, all is there
    store(state).append("new", 9.0, answer("new"))
    assert list(store(state).read()) == [*(str(number) for number in range(whole)), "new"]


@pytest.mark.parametrize(
    "line", [b"\n", b"garbage\n", encode({"event": "student", "schema": 2, "id": "x"}), encode({"schema": 1})]
)
def test_lines_that_arent_answers_are_asked_for_again(tmp_path: Path, line: bytes) -> None:
    store(tmp_path).append("a", 5.0, answer())
    with the_file(tmp_path).open("ab") as file:
        file.write(line)
    assert list(store(tmp_path).read()) == ["a"]


def test_a_students_name_cant_lead_elsewhere(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="16 hex digits"):
        store(tmp_path, "../../../etc")


def test_what_is_forgotten_goes_from_here_as_well(tmp_path: Path) -> None:
    log_of(tmp_path, "mine", "other")
    for id in ("mine", "other"):
        store(tmp_path).append(id, 1000.0, answer(f"answer to {id}"))
    with the_file(tmp_path).open("ab") as file:
        file.write(encode({"event": "student", "id": "mine"})[:-9])
    would = forget(tmp_path, Whose(user="mine"), dry_run=True)
    assert would.tasks["t"].student_answers == 1
    assert b"answer to mine" in the_file(tmp_path).read_bytes()
    done = forget(tmp_path, Whose(user="mine"), noticed_within_s=0.0)
    assert (done.tasks["t"].student_answers, done.left) == (1, [])
    assert b"mine" not in the_file(tmp_path).read_bytes()
    assert list(store(tmp_path).read()) == ["other"]


@pytest.mark.parametrize("has_one", [True, False])
def test_who_asks_meanwhile_writes_nothing_more(tmp_path: Path, has_one: bool) -> None:
    """The answer under way may be to what was forgotten, also where there was no answer to it yet."""
    asking = store(tmp_path)
    if has_one:
        asking.append("mine", 1000.0, answer())
    assert erase_answers(tmp_path, "t", {"mine"}, Disk()) == has_one
    with pytest.raises(ErasedMeanwhile, match="learn again"):
        asking.append("mine", 1000.0, answer())
    assert store(tmp_path).read() == {}
    store(tmp_path).append("other", 1000.0, answer())


def test_a_task_whose_student_was_never_asked_is_left_as_it_is(tmp_path: Path) -> None:
    assert erase_answers(tmp_path, "t", {"a"}, Disk()) == 0
    remove_old_answers(tmp_path, "t", 1e9, Disk())
    assert list(tmp_path.iterdir()) == []


def test_retention_removes_them_with_their_exchanges(tmp_path: Path) -> None:
    log_of(tmp_path, "old", created=1000.0)
    kept = store(tmp_path)
    kept.append("old", 1000.0, answer())
    kept.append("young", 1000.0 + 20 * DAY_S, answer())
    remove_expired(tmp_path, 10.0, now=1000.0 + 11.5 * DAY_S)
    assert list(kept.read()) == ["young"]
    remove_expired(tmp_path, 10.0, now=1000.0 + 100 * DAY_S)
    assert not the_file(tmp_path).exists()
    kept.append("new", 1000.0 + 100 * DAY_S, answer())
    assert list(kept.read()) == ["new"]


def test_only_answers_to_what_is_logged_are_kept(tmp_path: Path) -> None:
    kept = store(tmp_path)
    for id in "abc":
        kept.append(id, 5.0, answer())
    kept.keep_only({"a", "c", "z"})
    assert list(kept.read()) == ["a", "c"]


def test_a_rewriting_that_died_is_taken_up(tmp_path: Path) -> None:
    kept = store(tmp_path)
    for id in "ab":
        kept.append(id, 5.0, answer())
    the_file(tmp_path).with_name(f".{STUDENT}.jsonl.rewriting").write_bytes(b"half")
    (the_file(tmp_path).parent / ".erased.rewriting").write_bytes(b"")
    assert erase_answers(tmp_path, "t", {"a"}, Disk()) == 1
    assert list(store(tmp_path).read()) == ["b"]
    assert sorted(path.name for path in the_file(tmp_path).parent.iterdir()) == [
        ".erased",
        ".lock",
        the_file(tmp_path).name,
    ]
