"""The watch of live releases by what the log says: in order, each audit once, whoever is killed when."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson
import pytest

from gateway.metrics import Metrics
from gateway.watcher import Watcher, due
from routers.watch import Watch
from serving.audit_trail import AGREED, Audited
from serving.events import answered, audited, cancelled, encode, superseded
from serving.exchange import Exchange, Json, StudentAnswer, TeacherAnswer
from serving.releases import ReleaseStore
from serving.task_settings import TaskPolicy
from serving.watch_record import WatchRecord, read_watch_record

Start = Callable[..., Any]


def policy(_: str) -> TaskPolicy:
    return TaskPolicy(max_disagreement=0.05, certainty=0.9)


def choices(text: str) -> list[Json]:
    return [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}]


def teacher(model: str = "big", fingerprint: str | None = None) -> TeacherAnswer:
    return TeacherAnswer(model, choices("lost"), None, 0.1, fingerprint, trainable=True)


class Log:
    """A task's log, written line by line: audits of `release` come one second after the other."""

    def __init__(self, state_dir: Path, release: str = "r0001") -> None:
        self.state_dir = state_dir
        self.release = release
        self.start = time.time()
        self.count = 0

    def append(self, *events: Json, segment: int = 1) -> None:
        path = self.state_dir / "tasks" / "t" / "events" / f"00000000-1-{segment}.jsonl.open"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            file.write(b"".join(encode(event) for event in events))

    def exchange(self, **changes: Any) -> Exchange:
        self.count += 1
        student = StudentAnswer("linear", choices("lost"), None, 0.0, 1.0)
        made = Exchange(
            f"e{self.count:06}",
            "r",
            self.start + self.count / 100,
            "t",
            "tenant",
            {"model": "m", "messages": []},
            "student",
            "confident",
            release=self.release,
            student=student,
            coin=True,
            audit_rate=0.05,
            audit="pending",
        )
        return replace(made, **changes)

    def audit(self, *agreed: bool | None, segment: int = 1) -> None:
        """Audits that ended; None: missing."""
        for one in agreed:
            exchange = self.exchange()
            answer = None if one is None else teacher()
            self.append(
                answered(exchange),
                audited(exchange.id, teacher=answer, agreement=one, at=exchange.created + 1),
                segment=segment,
            )

    def escalate(self, model: str, fingerprint: str | None = None, count: int = 1, **changes: Any) -> None:
        for _ in range(count):
            made = self.exchange(
                route="teacher", reason="low_confidence", audit="none", teacher=teacher(model, fingerprint)
            )
            self.append(answered(replace(made, **changes)))


@pytest.fixture
def live(tmp_path: Path) -> Callable[..., Log]:
    def publish(**card: Any) -> Log:
        store = ReleaseStore(tmp_path)
        name = store.write("t", {}, {"student": "linear", **card})
        store.set_live("t", name)
        return Log(tmp_path, name)

    return publish


def watcher(state_dir: Path, metrics: Metrics | None = None) -> Watcher:
    return Watcher(state_dir, metrics or Metrics(), policy)


def seen(state_dir: Path) -> tuple[int, int]:
    record = read_watch_record(state_dir, "t")
    assert record is not None
    return record.watch["audits"], record.watch["disagreements"]


def test_a_release_that_breaks_its_promise_is_withdrawn_once_and_says_why(
    live: Start, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    written = live(max_disagreement=0.05, certainty=0.9)
    metrics = Metrics()
    looking = watcher(tmp_path, metrics)
    written.audit(*[True] * 30)
    looking.look()
    assert 'understudy_watch_evidence{task="t"} 1.0' in metrics.exposition().decode()
    assert 'understudy_withdrawals_total{cause="disagreement",task="t"} 0.0' in metrics.exposition().decode()
    written.audit(*[False, None] * 10)
    with caplog.at_level(logging.ERROR, logger="understudy.watch"):
        for _ in range(3):
            looking.look()
        watcher(tmp_path).look()
    assert caplog.text.count("r0001 is withdrawn") == 1
    assert "audits disagreed" in caplog.text
    now = ReleaseStore(tmp_path).live("t")
    assert now is not None
    assert now.release is None
    assert [(one.release, one.cause) for one in now.withdrawals] == [("r0001", "disagreement")]
    assert 'understudy_withdrawals_total{cause="disagreement",task="t"} 1.0' in metrics.exposition().decode()
    assert 'understudy_watch_evidence{task="t"} NaN' in metrics.exposition().decode()


def test_each_audit_counts_once_in_order_wherever_it_is_killed(live: Start, tmp_path: Path) -> None:
    """A new watcher after each step sees what one that lives on sees, and what the plain test says."""
    written = live(max_disagreement=0.2, certainty=0.99)
    expected = Watch(0.2, 0.99)
    chance = random.Random(3)
    for step in range(40):
        audits = [chance.random() > 0.2 for _ in range(chance.randrange(5))]
        written.audit(*audits, segment=1 + step % 3)
        for one in audits:
            expected.observe(one)
        watcher(tmp_path).look()
        if chance.random() < 0.3:
            path = tmp_path / "tasks" / "t" / "watch.json"
            (tmp_path / "tasks" / "t" / ".watch.json.writing").write_bytes(path.read_bytes()[:40])
    record = read_watch_record(tmp_path, "t")
    assert record is not None
    assert Watch.from_json(record.watch).to_json() == expected.to_json()
    assert record.answers == pytest.approx(20 * expected.audits)
    (tmp_path / "tasks" / "t" / "watch.json").write_bytes(b'{"damaged')
    watcher(tmp_path).look()
    assert read_watch_record(tmp_path, "t") == record, "it is counted anew from the log"


def test_killed_between_the_alarm_and_the_withdrawal_it_is_withdrawn_all_the_same(
    live: Start, tmp_path: Path
) -> None:
    written = live()
    written.audit(*[False] * 20)
    store = ReleaseStore(tmp_path)
    before = (tmp_path / "tasks" / "t" / "live").read_bytes()
    watcher(tmp_path).look()
    record = (tmp_path / "tasks" / "t" / "watch.json").read_bytes()
    (tmp_path / "tasks" / "t" / "live").write_bytes(
        before
    )  # as if it had been killed before this was replaced
    watcher(tmp_path).look()
    assert (tmp_path / "tasks" / "t" / "watch.json").read_bytes() == record, "nothing is counted twice"
    now = store.live("t")
    assert now is not None
    assert now.release is None


def test_nothing_behind_an_audit_that_is_still_owed_counts_yet(live: Start, tmp_path: Path) -> None:
    written = live()
    looking = watcher(tmp_path)
    written.audit(True)
    owed = written.exchange()
    written.append(answered(owed))
    written.audit(True, False)
    looking.look()
    assert seen(tmp_path) == (1, 0)
    written.append(audited(owed.id, teacher=teacher(), agreement=False, at=time.time()))
    looking.look()
    assert seen(tmp_path) == (4, 2)
    late = replace(written.exchange(), created=owed.created + 0.001)
    written.append(answered(late), audited(late.id, teacher=teacher(), agreement=True, at=time.time()))
    looking.look()
    looking.look()
    assert seen(tmp_path) == (5, 2), "one that reaches the log late is taken in late"


def test_a_long_log_is_gone_through_once_a_look() -> None:
    """7,000 audits that were counted and 30,000 that are too old: looking for the newest for each takes seconds."""
    counted = {f"c{n}": 10_000.0 + n / 2 for n in range(7000)}
    old = [Audited(f"o{n}", "r0001", n / 10, 0.02, AGREED) for n in range(30_000)]
    fresh = [Audited(f"n{n}", "r0001", 13_500.0 + n, 0.02, AGREED) for n in range(3)]
    record = WatchRecord("r0001", 1.0, {}, counted)
    began = time.process_time()
    found = due(old + fresh, record, 14_000.0)
    assert time.process_time() - began < 1.0
    assert found == fresh


def test_an_audit_that_is_owed_for_too_long_is_missing(live: Start, tmp_path: Path) -> None:
    written = live()
    content = (tmp_path / "tasks" / "t" / "live").read_text()
    (tmp_path / "tasks" / "t" / "live").write_text(content.replace('"since"', '"was"'))
    written.append(answered(replace(written.exchange(), created=time.time() - 3700)))
    watcher(tmp_path).look()
    assert seen(tmp_path) == (1, 1)


def test_only_what_counts_counts(live: Start, tmp_path: Path) -> None:
    written = live()
    written.audit(True)
    retried, given_up = written.exchange(), written.exchange()
    for void in (retried, given_up):
        written.append(answered(void), audited(void.id, teacher=None, agreement=None, at=1.0))
    written.append(superseded(retried.id, by="x", at=1.0), cancelled(given_up.id, teacher=None, at=1.0))
    written.append(answered(written.exchange(release="r0000")), answered(written.exchange(audit="none")))
    replayed = written.exchange(route="cache", origin="student", reason="hit:student")
    written.append(answered(replayed), audited(replayed.id, teacher=teacher(), agreement=False, at=1.0))
    watcher(tmp_path).look()
    assert seen(tmp_path) == (2, 1), "the answers of the release, replays included, and nothing else"


def test_a_release_made_live_again_is_watched_anew(live: Start, tmp_path: Path) -> None:
    written = live()
    written.start -= 100  # before the promotion below
    content = (tmp_path / "tasks" / "t" / "live").read_text()
    (tmp_path / "tasks" / "t" / "live").write_text(content.replace('"since"', '"was"'))
    written.audit(*[False] * 20)
    looking = watcher(tmp_path)
    looking.look()
    store = ReleaseStore(tmp_path)
    store.set_live("t", "r0001")
    looking.look()
    assert seen(tmp_path) == (0, 0)
    written.start += 200
    written.audit(True)
    looking.look()
    assert seen(tmp_path) == (1, 0)
    now = store.live("t")
    assert now is not None
    assert now.release == "r0001"


def test_another_teacher_suspends_the_release(live: Start, tmp_path: Path) -> None:
    written = live(teacher_models={"big-1": 200, "big-2": 3})
    looking = watcher(tmp_path)
    for _ in range(3):
        written.escalate("big-3", count=15)
        written.escalate("big-2")
        looking.look()
    written.escalate("big-1", count=40)
    looking.look()
    store = ReleaseStore(tmp_path)
    now = store.live("t")
    assert now is not None
    assert now.release == "r0001", "it comes and goes, or is known"
    written.escalate("big-3", count=19)
    looking.look()
    written.escalate("big-3", route="cache", origin="teacher", reason="hit:teacher", count=5)
    forged = {"model": "m", "teacher": {"model": "big-3", "choices": []}, "release": None}
    written.append(answered(written.exchange(audit="none", request=forged)))
    looking.look()
    now = store.live("t")
    assert now is not None
    assert now.release == "r0001", "neither replays nor what a client writes say who the teacher is"
    written.escalate("big-3")
    looking.look()
    now = store.live("t")
    assert now is not None
    assert (now.release, now.withdrawals[0].cause) == (None, "teacher_changed")
    assert "big-1, big-2" in now.withdrawals[0].said
    assert "big-3" in now.withdrawals[0].said
    store.set_live("t", "r0001")
    written.escalate("big-3", count=50)
    looking.look()
    now = store.live("t")
    assert now is not None
    assert now.release == "r0001", "who makes it live again takes the names for one teacher's"


def test_who_forces_another_teacher_suspends_nothing(live: Start, tmp_path: Path) -> None:
    """A client that tries out another model under the task's name says nothing of the task's teacher."""
    written = live(teacher_models={"big": 90})
    looking = watcher(tmp_path)
    written.escalate("big", count=3)
    written.escalate("small", count=40, reason="forced", eligible=False)
    looking.look()
    now = ReleaseStore(tmp_path).live("t")
    assert now is not None
    assert now.release == "r0001"
    written.escalate("small", count=20)
    looking.look()
    now = ReleaseStore(tmp_path).live("t")
    assert now is not None
    assert now.release is None


def test_another_fingerprint_begins_the_watch_anew(
    live: Start, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    written = live(teacher_models={"big": 200})
    looking = watcher(tmp_path)
    written.escalate("big", "fp_1")
    written.escalate("big", "fp_2")
    written.audit(False, False, True)
    looking.look()
    assert seen(tmp_path) == (3, 2)
    written.escalate("big", "fp_2", count=30)
    written.escalate("big", "fp_3", count=19)
    looking.look()
    assert seen(tmp_path) == (3, 2)
    with caplog.at_level(logging.WARNING, logger="understudy.watch"):
        written.escalate("big", "fp_3")
        looking.look()
        written.escalate("big", "fp_1", count=30)
        written.audit(True)
        looking.look()
    assert seen(tmp_path) == (1, 0)
    assert caplog.text.count("begins anew") == 1


def test_what_it_can_not_watch_is_said_once(
    live: Start, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    live()
    (tmp_path / "tasks" / "t" / "releases" / "r0001" / "card.json").write_bytes(b"{}")
    looking = watcher(tmp_path)
    with caplog.at_level(logging.ERROR, logger="understudy.watch"):
        looking.look()
        looking.look()
    assert caplog.text.count("can't be watched") == 1


def is_live(state_dir: Path) -> bool:
    now = ReleaseStore(state_dir).live("t")
    return now is not None and now.release is not None


def asking(model: str, **deeper: Any) -> Json:
    return {"messages": [{"role": "user", "content": '"model":"forged"'}], **deeper, "model": model}


def test_a_client_that_asks_for_another_model_changes_no_teacher(live: Start, tmp_path: Path) -> None:
    written = live(
        teacher_models={"big-1": 200, "tiny-1": 9},
        teacher_models_by_request={"big": {"big-1": 200}, "tiny": {"tiny-1": 9}},
    )
    looking = watcher(tmp_path)
    written.escalate("small-1", "fp_7", count=60, request=asking("small"))
    written.escalate("star-1", count=60, request=asking("*"))
    for number in range(60):
        written.escalate("made-up", request=asking(f"made-up-{number}"))
    looking.look()
    written.escalate("big-1", count=5, request=asking("big", metadata={"model": "tiny"}))
    written.escalate("tiny-1", count=20, request=asking("tiny", metadata={"model": "big"}))
    looking.look()
    assert is_live(tmp_path)
    written.escalate("tiny-1", count=20, request=asking("big", metadata={"model": "tiny"}))
    looking.look()
    now = ReleaseStore(tmp_path).live("t")
    assert now is not None
    assert now.release is None, "what answers `tiny` isn't what answers `big`"
    assert "asked for big, answered as big-1, and now answers as tiny-1" in now.withdrawals[0].said


def test_audits_too_say_who_the_teacher_is(live: Start, tmp_path: Path) -> None:
    """Where the student answers everything, nothing else does."""
    written = live(teacher_models_by_request={"m": {"big": 200}})
    looking = watcher(tmp_path)
    for requested in ("other", "m"):
        looking.look()
        assert is_live(tmp_path)
        for _ in range(20):
            one = written.exchange(request={"model": requested, "messages": []})
            said = audited(
                one.id, teacher=teacher("big-2"), agreement=True, at=one.created, requested=requested
            )
            written.append(answered(one), said)
    looking.look()
    assert not is_live(tmp_path)


def test_names_of_a_watch_from_before_are_known_whatever_is_asked_for(live: Start, tmp_path: Path) -> None:
    written = live(teacher_models={"big-1": 200})
    written.audit(True, False)
    watcher(tmp_path).look()
    path = tmp_path / "tasks" / "t" / "watch.json"
    content = orjson.loads(path.read_bytes())
    old = {**content, "schema": 1, "models": {"big-1": 1.0, "big-2": 1.0}, "fingerprints": {}}
    path.write_bytes(orjson.dumps(old))
    looking = watcher(tmp_path)
    written.escalate("big-2", count=30)
    looking.look()
    assert is_live(tmp_path)
    assert seen(tmp_path) == (2, 1), "nor is an audit counted twice"
    written.escalate("big-3", count=20)
    looking.look()
    assert not is_live(tmp_path)
