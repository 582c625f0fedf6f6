"""Looks are counted, whatever happens to the process, the file or a second learner."""

from __future__ import annotations

from pathlib import Path

import pytest

from distillation.journal import LearningElsewhere, LookJournal
from routers.looks import PastLook, next_look


@pytest.fixture
def journal(tmp_path: Path) -> LookJournal:
    made = LookJournal(tmp_path, "intents")
    with made.alone():
        pass
    return made


def file_of(tmp_path: Path) -> Path:
    return tmp_path / "tasks" / "intents" / "looks.jsonl"


def test_no_looks_yet(journal: LookJournal) -> None:
    assert journal.past() == []
    assert journal.entries() == []


def test_a_look_that_was_begun_is_spent(journal: LookJournal, tmp_path: Path) -> None:
    journal.begin(1, 70)
    again = LookJournal(tmp_path, "intents")
    assert again.past() == [PastLook(1, 70, released=False)]
    assert next_look(again.past()) == 2


def test_how_it_ended_replaces_that_it_began(journal: LookJournal) -> None:
    first = journal.begin(1, 70)
    journal.end(first, 1, 70, {"outcome": "held", "release": None})
    second = journal.begin(2, 88)
    journal.end(second, 2, 88, {"outcome": "released", "release": "r0001"})
    third = journal.begin(1, 110)
    assert (first, second, third) == (1, 2, 3)
    assert journal.past() == [PastLook(1, 70, False), PastLook(2, 88, True), PastLook(1, 110, False)]
    assert [entry["serial"] for entry in journal.entries()] == [1, 1, 2, 2, 3]


def test_a_look_is_as_old_as_the_labels_it_read(journal: LookJournal) -> None:
    serial = journal.begin(1, 70, read_at=5.0)
    assert [look.at for look in journal.past()] == [5.0]
    journal.end(serial, 1, 70, {"outcome": "held", "release": None})
    assert [look.at for look in journal.past()] == [5.0]


def test_a_look_knows_its_newest_label(journal: LookJournal) -> None:
    serial = journal.begin(1, 70, until=4.5)
    journal.end(serial, 1, 70, {"outcome": "held", "release": None})
    journal.begin(2, 90)
    assert [look.until for look in journal.past()] == [4.5, None]


@pytest.mark.parametrize(
    "damage",
    [
        b'{"serial": 1, "look"',
        b"\xff\xfe\n",
        b"[]\n",
        b"7\n",
        b'{"serial": "x"}\n',
        b'{"serial": null, "look": 1}',
    ],
)
def test_damage_is_skipped_and_written_behind(journal: LookJournal, tmp_path: Path, damage: bytes) -> None:
    journal.begin(1, 70)
    with file_of(tmp_path).open("ab") as file:
        file.write(damage)
    serial = journal.begin(2, 90)
    journal.end(serial, 2, 90, {"release": "r0001"})
    assert journal.past() == [PastLook(1, 70, False), PastLook(2, 90, True)]


def test_a_serial_number_isnt_given_twice(journal: LookJournal, tmp_path: Path) -> None:
    """Even when an earlier look can't be read any more: the new one must not replace a later one."""
    for labels in (70, 90, 110):
        journal.begin(1, labels)
    lines = file_of(tmp_path).read_bytes().split(b"\n")
    file_of(tmp_path).write_bytes(b"\n".join(line for line in lines if b'"labels":70' not in line))
    journal.begin(1, 140)
    assert [look.labels for look in journal.past()] == [90, 110, 140]


def test_only_one_learns(journal: LookJournal, tmp_path: Path) -> None:
    other = LookJournal(tmp_path, "intents")
    with journal.alone():
        with pytest.raises(LearningElsewhere, match="intents is being learned"), other.alone():
            pass
        with LookJournal(tmp_path, "parcels").alone():
            pass
    with other.alone():
        pass
