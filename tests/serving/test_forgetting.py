from __future__ import annotations

import fcntl
import os
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.audit_index import AuditIndex
from serving.events import answered, audited, cancelled, encode
from serving.exchange import Exchange, Json
from serving.forgetting import Whose, forget
from serving.forgotten import read_forgotten
from serving.log import LogReader
from serving.releases import CANDIDATE_FILE, ReleaseStore

Start = Callable[..., Any]


def exchange(id: str, tenant: str = "a" * 16, created: float = 1000.0, **request: Any) -> Exchange:
    body: Json = {"model": "m", "messages": [{"role": "user", "content": f"text of {id}"}], **request}
    return Exchange(id, id, created, "t", tenant, body, "student", "confident", release="r0001")


def segment(state_dir: Path, name: str, *events: Json | Exchange | bytes, task: str = "t") -> Path:
    path = state_dir / "tasks" / task / "events" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(
        b"".join(
            event
            if isinstance(event, bytes)
            else encode(answered(event) if isinstance(event, Exchange) else event)
            for event in events
        )
    )
    return path


def ids(state_dir: Path, task: str = "t") -> set[str]:
    return {exchange.id for exchange in LogReader(state_dir).exchanges(task).exchanges}


def everything(state_dir: Path) -> bytes:
    return b"".join(path.read_bytes() for path in state_dir.rglob("*") if path.is_file())


def late(id: str) -> Json:
    return audited(id, teacher=None, agreement=None, at=5.0)


def test_all_of_a_tenant_goes_from_every_task_and_segment_and_nothing_else(tmp_path: Path) -> None:
    mine, other = "a" * 16, "b" * 16
    first = segment(
        tmp_path, "00000000-1-1.jsonl", exchange("mine-1", mine), exchange("other-1", other), late("mine-2")
    )
    os.utime(first, (5000, 5000))
    segment(tmp_path, "00000000-1-2.jsonl", exchange("mine-2", mine), exchange("mine-3", mine))
    untouched = segment(tmp_path, "00000000-1-3.jsonl", exchange("other-2", other, metadata={"tenant": "x"}))
    segment(tmp_path, "00000000-999999999-1.jsonl.open", exchange("mine-4", mine), exchange("other-3", other))
    segment(tmp_path, "00000000-1-1.jsonl", exchange("mine-5", mine, created=9.0), task="u")
    inode = untouched.stat().st_ino
    would = forget(tmp_path, Whose(tenant=mine), dry_run=True)
    assert {task: erased.exchanges for task, erased in would.tasks.items()} == {"t": 4, "u": 1}
    assert len(ids(tmp_path)) == 7
    assert not (tmp_path / "forgotten.json").exists()
    done = forget(tmp_path, Whose(tenant=mine), noticed_within_s=0.0)
    assert done.left == []
    assert (done.tasks["t"].exchanges, done.tasks["t"].events, done.tasks["t"].segments) == (4, 5, 3)
    assert (done.tasks["u"].oldest, done.tasks["u"].newest) == (9.0, 9.0)
    assert ids(tmp_path) == {"other-1", "other-2", "other-3"}
    assert ids(tmp_path, "u") == set()
    assert b"text of mine" not in everything(tmp_path)
    assert untouched.stat().st_ino == inode
    assert first.stat().st_mtime == 5000, "what is left isn't younger for that"
    assert [path for path in tmp_path.rglob(".*") if path.is_file()] == []
    assert forget(tmp_path, Whose(tenant=mine), noticed_within_s=0.0).tasks == {}


@pytest.mark.parametrize(
    "named", [{"user": "ü-17"}, {"safety_identifier": "ü-17"}, {"metadata": {"user_id": "ü-17", "x": "y"}}]
)
def test_an_end_user_is_known_by_any_of_three_names(named: dict[str, Any], tmp_path: Path) -> None:
    deep: Any = "bottom"
    for _ in range(260):  # more than orjson writes: such lines are written another way
        deep = [deep]
    said = {"role": "user", "content": '"user":"ü-17"'}
    segment(
        tmp_path,
        "00000000-1-1.jsonl",
        exchange("theirs", **named),
        exchange("deep", **named, extra=deep),
        exchange("elsewhere", tenant="b" * 16, **named),
        exchange("others", user="ü-18"),
        exchange("quoted", messages=[said]),
        exchange("nobody"),
    )
    assert (
        forget(tmp_path, Whose(tenant="a" * 16, user="ü-17"), noticed_within_s=0.0).tasks["t"].exchanges == 2
    )
    assert ids(tmp_path) == {"elsewhere", "others", "quoted", "nobody"}
    assert forget(tmp_path, Whose(user="ü-17"), noticed_within_s=0.0).tasks["t"].exchanges == 1
    assert ids(tmp_path) == {"others", "quoted", "nobody"}


def test_damaged_lines_that_may_be_theirs_go_as_well(tmp_path: Path) -> None:
    mine = encode(answered(exchange("mine", user="u1")))
    others = encode(answered(exchange("others", user="u2")))
    segment(tmp_path, "00000000-1-1.jsonl", mine[:-30] + b"\n", others, others[:-30] + b"\n", b"// note\n")
    done = forget(tmp_path, Whose(user="u1"), noticed_within_s=0.0)
    assert (done.tasks["t"].exchanges, done.tasks["t"].damaged, done.left) == (0, 1, [])
    assert b"text of mine" not in everything(tmp_path)
    assert everything(tmp_path).count(b"text of others") == 2


def test_somebody_has_to_be_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="whose exchanges"):
        forget(tmp_path, Whose(), noticed_within_s=0.0)


def test_what_was_counted_stays_counted(tmp_path: Path) -> None:
    audits = [replace(exchange(f"{i}", user=f"u{i % 2}"), audit="pending") for i in range(6)]
    segment(tmp_path, "00000000-1-1.jsonl", *audits)
    index = AuditIndex(tmp_path)
    assert index.accepted("t", "r0001") == 6
    forget(tmp_path, Whose(user="u0"), noticed_within_s=0.0)
    for known in (index, AuditIndex(tmp_path)):
        assert known.accepted("t", "r0001") == 6
        assert {owed.id for owed in known.owed("t")} == {"1", "3", "5"}


def test_releases_made_since_are_named_and_forget_what_they_were_fitted_on(tmp_path: Path) -> None:
    store = ReleaseStore(tmp_path)
    held_out = {f"{i}": [1.0, f"answer {i}"] for i in range(4)}

    def write(created: float, held: dict[str, Any]) -> str:
        files = {"held_out.json": orjson.dumps(held), "student.npz": b"weights"}
        files["skipped.json"] = orjson.dumps(dict.fromkeys(held, 0.1))
        files["refused.json"] = orjson.dumps(dict.fromkeys(held, True))
        return store.write("t", files, {"created": created, "student": "linear"})

    before = write(500.0, {"9": [1.0, "x"]})
    fitted, since = write(2000.0, held_out), write(3000.0, {})
    store.set_live("t", fitted)
    segment(tmp_path, "00000000-1-1.jsonl", *(exchange(f"{i}", user=f"u{i % 2}") for i in range(4)))
    assert forget(tmp_path, Whose(user="u1"), dry_run=True).tasks["t"].releases == {fitted: 2, since: 0}
    assert orjson.loads(store.read("t", fitted).files["held_out.json"]) == held_out
    assert forget(tmp_path, Whose(user="u1"), noticed_within_s=0.0).tasks["t"].releases == {
        fitted: 2,
        since: 0,
    }
    left = store.read("t", fitted)
    assert sorted(orjson.loads(left.files["held_out.json"])) == ["0", "2"]
    assert sorted(orjson.loads(left.files["skipped.json"])) == ["0", "2"]
    assert sorted(orjson.loads(left.files["refused.json"])) == ["0", "2"]
    assert (left.files["student.npz"], left.card["created"]) == (b"weights", 2000.0)
    assert store.names("t") == (before, fitted, since)
    assert b"answer 1" not in everything(tmp_path)


def test_a_candidate_that_may_have_learned_from_them_goes(tmp_path: Path) -> None:
    segment(tmp_path, "one.jsonl", exchange("mine", "a" * 16))
    segment(tmp_path, "two.jsonl", exchange("other", "b" * 16), task="u")
    candidates = [tmp_path / "tasks" / task / CANDIDATE_FILE for task in "tu"]
    for candidate in candidates:
        candidate.write_bytes(b"{}")
    forget(tmp_path, Whose(tenant="a" * 16), dry_run=True)
    assert [one.exists() for one in candidates] == [True, True]
    forget(tmp_path, Whose(tenant="a" * 16), noticed_within_s=0.0)
    assert [one.exists() for one in candidates] == [False, True]


def test_a_release_that_cant_be_looked_into_is_said(tmp_path: Path) -> None:
    store = ReleaseStore(tmp_path)
    store.write("t", {"held_out.json": b"[]"}, {})
    segment(tmp_path, "00000000-1-1.jsonl", exchange("mine"))
    (left,) = forget(tmp_path, Whose(tenant="a" * 16), noticed_within_s=0.0).left
    assert left.startswith("release r0001 of task t can't be looked into: ")
    assert ids(tmp_path) == set()


USERS = st.sampled_from(["u", "ü", 'q"u', "\u2028", "u\\", "1"])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(USERS, st.sampled_from(["user", "safety_identifier", "id"]))), USERS)
def test_nothing_of_theirs_survives_and_everything_else_does(
    tmp_path_factory: pytest.TempPathFactory, asked: list[tuple[str, str]], user: str
) -> None:
    state_dir = tmp_path_factory.mktemp("state")
    made = [
        replace(exchange(f"{n}"), request={**exchange(f"{n}").request, name: of})
        for n, (of, name) in enumerate(asked)
    ]
    segment(state_dir, "00000000-1-1.jsonl", *made[::2], *(late(e.id) for e in made[1::2]))
    segment(
        state_dir, "00000000-1-2.jsonl", *made[1::2], *(cancelled(e.id, teacher=None, at=1.0) for e in made)
    )
    theirs = {e.id for e, (of, name) in zip(made, asked, strict=True) if of == user and name != "id"}
    assert forget_at_once(state_dir, Whose(user=user)) == len(theirs)
    assert ids(state_dir) == {e.id for e in made} - theirs
    assert LogReader(state_dir).exchanges("t").damaged == 0
    assert not any(f'text of {id}"'.encode() in everything(state_dir) for id in theirs)


def forget_at_once(state_dir: Path, whose: Whose) -> int:
    return sum(erased.exchanges for erased in forget(state_dir, whose, noticed_within_s=0.0).tasks.values())


class TestWhileAGatewayRuns:
    def test_what_it_has_open_is_sealed_and_erased_and_its_audits_write_nothing_more(
        self, stand_in: Start, gateway: Start, publish: Start, eventually: Start
    ) -> None:
        # An audit takes longer than it takes to forget.
        teacher = stand_in({"parcel lost": "lost"}, latency_ms=4000, latency_spread=0)
        running = gateway(
            teacher.url,
            task=[{"name": "t", "match": {"model": "m"}, "audit_rate": 1.0}],
            teacher={"timeout_s": 30.0},
        )
        publish(running.state_dir, "t", {"parcel lost": "lost", "card stolen": "stolen"})
        eventually(lambda: running.get("/readyz").json()["live_releases"] == 1)

        def ask(text: str, user: str, **headers: str) -> None:
            body = {"model": "m", "user": user, "messages": [{"role": "user", "content": text}]}
            assert running.post(json=body, headers=headers).headers["x-understudy-route"] == "student"

        stop = threading.Event()

        def go_on() -> None:
            while not stop.is_set():
                ask("card stolen", "other", **{"x-understudy-route": "student"})

        traffic = threading.Thread(target=go_on)
        traffic.start()
        try:
            eventually(lambda: len(running.exchanges()) > 3)
            ask("parcel lost", "mine", **{"cache-control": "no-cache"})
            ask("parcel lost", "mine", **{"cache-control": "no-cache"})
            done = forget(running.state_dir, Whose(user="mine"))
            assert running.metric("understudy_audits_total") == 0, "they are under way"
        finally:
            stop.set()
            traffic.join()
        assert done.left == []
        assert done.tasks["t"].exchanges == 2
        forgotten = read_forgotten(running.state_dir)
        assert len(forgotten) == 2
        eventually(lambda: running.metric("understudy_audits_total") == 2)
        ask("card stolen", "other", **{"x-understudy-route": "student"})  # written behind them
        assert {e.request["user"] for e in running.exchanges()} == {"other"}
        written = b"".join(path.read_bytes() for path in running.state_dir.rglob("*.jsonl*"))
        assert not any(id.encode() in written for id in forgotten)

    def test_one_that_doesnt_listen_is_named(self, tmp_path: Path) -> None:
        path = segment(tmp_path, "00000000-1-1.jsonl.open", exchange("mine"))
        with path.open("ab") as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            began = time.monotonic()
            done = forget(tmp_path, Whose(tenant="a" * 16), timeout_s=0.3)
            assert done.left == ["00000000-1-1.jsonl.open of task t is still being written to"]
            assert time.monotonic() - began < 20
            assert ids(tmp_path) == {"mine"}
        assert forget(tmp_path, Whose(tenant="a" * 16)).left == []
        assert ids(tmp_path) == set()
