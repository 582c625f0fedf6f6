from __future__ import annotations

import os
import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.audit_index import AuditIndex
from serving.audit_trail import AGREED, DISAGREED, MISSING
from serving.events import answered, audited, cancelled, encode, superseded
from serving.exchange import Exchange, Json, TeacherAnswer
from serving.log import LogReader
from serving.segment_digest import DIGEST_SUFFIX, Digest, digest_of

NASTY = ['"audit":"pending"', 'a"b\\', "\u2028ü", '","created":1,', ""]


def exchange(id: str, **changes: object) -> Exchange:
    request: Json = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}
    made = Exchange(id, f"req-{id}", 10.0, "t", "h", request, "student", "confident", release="r0001")
    return replace(made, **changes)  # type: ignore[arg-type]


def events_of(state_dir: Path) -> Path:
    return state_dir / "tasks" / "t" / "events"


def append(state_dir: Path, name: str, *events: Json) -> Path:
    path = events_of(state_dir) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        file.write(b"".join(encode(event) for event in events))
    return path


EXCHANGES = st.builds(
    exchange,
    st.sampled_from([f"{i:02}" for i in range(30)]),
    request_id=st.sampled_from(NASTY),
    created=st.floats(0, 1e10, allow_nan=False),
    route=st.sampled_from(["student", "teacher"]),
    release=st.sampled_from([None, "r0001", "r0002"]),
    audit=st.sampled_from(["none", "pending", "answered"]),
    request=st.fixed_dictionaries(
        {"model": st.sampled_from(NASTY), "audit": st.sampled_from(["pending", "none", 1])}
    ),
)


def is_watched(one: Exchange) -> bool:
    void = one.superseded_by is not None or one.cancelled
    return one.by_student and one.release is not None and one.audit != "none" and not void


def outcome_of(one: Exchange) -> int | None:
    return {"pending": None, "missing": MISSING}.get(one.audit, AGREED if one.agreement else DISAGREED)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(EXCHANGES, max_size=20, unique_by=lambda e: e.id),
    st.lists(st.tuples(st.integers(0, 29), st.sampled_from(["audited", "superseded", "cancelled"]))),
    st.integers(0, 4),
    st.integers(),
)
def test_it_knows_what_reading_the_whole_log_would_tell(
    tmp_path_factory: pytest.TempPathFactory,
    made: list[Exchange],
    after: list[tuple[int, str]],
    sealed: int,
    seed: int,
) -> None:
    chance = random.Random(seed)
    audits = {e.id for e in made if e.audit == "pending"}
    events = [answered(e) for e in made]
    for number, kind in after:
        id = f"{number:02}"
        if kind != "audited":
            how = {
                "superseded": superseded(id, by="x", at=3.0),
                "cancelled": cancelled(id, teacher=None, at=3.0),
            }
            events.append(how[kind])
        elif id in audits:
            agreed = chance.choice([None, True, False])
            answer = None if agreed is None else TeacherAnswer("big", [], None, 0.1)
            events.append(audited(id, teacher=answer, agreement=agreed, at=3.0))
    chance.shuffle(events)
    names = [f"00000000-1-{n}.jsonl" + (".open" if n >= sealed else "") for n in range(5)]
    state_dir = tmp_path_factory.mktemp("state")
    index = AuditIndex(state_dir)

    watched = AuditIndex(state_dir, trails=True)

    def check(known: AuditIndex) -> None:
        read = LogReader(state_dir).exchanges("t").exchanges
        for trails in (watched, AuditIndex(state_dir, trails=True)):
            seen = {
                id: (one.release, one.created, one.outcome)
                for id, one in trails.trail("t", 0.0).audited.items()
            }
            assert seen == {e.id: (e.release, e.created, outcome_of(e)) for e in read if is_watched(e)}
        assert {e.id for e in known.owed("t")} == {e.id for e in read if e.audit_owed}
        for release in ("r0001", "r0002"):
            counted = [e for e in read if e.release == release and e.route == "student" and e.audit != "none"]
            assert known.accepted("t", release) == len(counted)

    half = len(events) // 2
    for event in events[:half]:
        append(state_dir, chance.choice(names), event)
    check(index)
    for event in events[half:]:  # only open ones grow
        append(state_dir, chance.choice(names[sealed:]), event)
    check(index)
    check(AuditIndex(state_dir))
    for path in events_of(state_dir).glob("*.open"):
        path.rename(path.with_suffix(""))
    check(index)
    shutil.rmtree(state_dir)


def test_a_torn_line_is_taken_in_once_it_is_whole(tmp_path: Path) -> None:
    index = AuditIndex(tmp_path)
    whole = encode(answered(exchange("a", audit="pending")))
    path = append(tmp_path, "00000000-1-1.jsonl.open")
    for end in (50, len(whole) - 1):
        path.write_bytes(whole[:end])
        assert (index.owed("t"), index.accepted("t", "r0001")) == ([], 0)
    with path.open("ab") as file:
        file.write(whole[-1:])
    assert [e.id for e in index.owed("t")] == ["a"]
    assert index.accepted("t", "r0001") == 1


def test_what_a_replay_of_a_students_answer_was_audited_for_counts_too(tmp_path: Path) -> None:
    replayed = {**answered(exchange("a", audit="pending", route="cache")), "origin": "student"}
    from_teacher = {**answered(exchange("b", audit="answered", route="cache")), "origin": "teacher"}
    append(tmp_path, "00000000-1-1.jsonl", replayed, from_teacher)
    assert AuditIndex(tmp_path).accepted("t", "r0001") == 1


class TestDigests:
    @pytest.fixture
    def segment(self, tmp_path: Path) -> Path:
        """A sealed segment that is large enough for its digest to be kept."""
        long: Json = {"model": "m", "messages": [{"role": "user", "content": "x" * 60_000}]}
        made = [
            exchange(f"{i:02}", request=long, audit="pending" if i % 5 == 0 else "none") for i in range(20)
        ]
        events = [answered(e) for e in made] + [audited("05", teacher=None, agreement=None, at=77.0)]
        return append(tmp_path, "00000000-1-1.jsonl", *events, cancelled("elsewhere", teacher=None, at=7.0))

    def test_they_are_kept_and_believed(self, segment: Path) -> None:
        first = digest_of(segment)
        assert first.size == segment.stat().st_size
        assert (first.newest, first.audits) == (77.0, {"r0001": 4})
        assert (sorted(first.owed), first.settled) == (["00", "10", "15"], {"elsewhere"})
        assert digest_of(segment) == first
        status = segment.stat()
        segment.write_bytes(b"\0" * status.st_size)  # nothing reads it again
        os.utime(segment, ns=(status.st_atime_ns, status.st_mtime_ns))
        assert digest_of(segment) == first

    @pytest.mark.parametrize("damage", [b"", b"00000000{}", b"not json", b"\xff" * 300])
    def test_damaged_ones_are_made_anew(self, segment: Path, damage: bytes) -> None:
        first = digest_of(segment)
        kept = segment.with_name(segment.name + DIGEST_SUFFIX)
        good = kept.read_bytes()
        for content in (damage, good[: len(good) // 2], good[:8] + good[9:]):
            kept.write_bytes(content)
            assert digest_of(segment) == first
            assert kept.read_bytes() == good

    def test_those_of_another_segment_are_made_anew(self, segment: Path) -> None:
        digest_of(segment)
        lines = segment.read_bytes().splitlines(keepends=True)
        segment.write_bytes(b"".join(lines[1:]))
        assert sorted(digest_of(segment).owed) == ["10", "15"]

    def test_small_segments_get_none(self, tmp_path: Path) -> None:
        path = append(tmp_path, "00000000-1-1.jsonl", answered(exchange("a")))
        assert digest_of(path).newest == 10.0
        assert [entry.name for entry in events_of(tmp_path).iterdir()] == [path.name]

    def test_what_isnt_ours_is_passed_over(self, tmp_path: Path) -> None:
        path = append(tmp_path, "00000000-1-1.jsonl", answered(exchange("a", audit="pending")))
        future = {**answered(exchange("b", audit="pending")), "schema": 99}
        with path.open("ab") as file:
            file.write(b"// note\n\xff\xfe\n" + encode({"event": "praised", "id": "c"}) + encode(future))
            file.write(encode(answered(exchange("d", audit="pending"))).replace(b"confident", b"diffident"))
        digest = Digest()
        digest.read_on(path)
        assert list(digest.owed) == ["a"]
        assert digest.size == path.stat().st_size


def test_a_segment_that_cant_be_read_is_passed_over(tmp_path: Path) -> None:
    append(tmp_path, "00000000-1-1.jsonl", answered(exchange("a", audit="pending")))
    (events_of(tmp_path) / "00000000-1-2.jsonl").mkdir()
    assert [e.id for e in AuditIndex(tmp_path).owed("t")] == ["a"]
