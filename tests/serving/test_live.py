"""The file that says what is live: a withdrawal and its reason are one, and old files are read."""

from __future__ import annotations

import time
from pathlib import Path

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.errors import WithdrawnMeanwhile
from serving.live import Live, Withdrawal, parse_live
from serving.releases import ReleaseStore

NAMES = st.integers(1, 99_999).map(lambda number: f"r{number:04}")
TIMES = st.floats(0, 1e12)
WITHDRAWALS = st.builds(
    Withdrawal, NAMES, st.sampled_from(["disagreement", "teacher_changed"]), TIMES, st.text()
)
LIVES = st.builds(
    Live,
    st.none() | NAMES,
    st.integers(0, 10**9),
    st.lists(NAMES, max_size=20),
    TIMES,
    st.lists(WITHDRAWALS, max_size=20),
    TIMES,
)


@given(LIVES)
def test_it_is_read_as_it_was_written(live: Live) -> None:
    read = parse_live(live.dump())
    assert read == live
    assert read is not None
    assert (read.since, read.withdrawals, read.fence) == (live.since, live.withdrawals, live.fence)


def test_a_file_from_before_the_watch_is_read() -> None:
    read = parse_live(b'{"release":"r0002","generation":7,"previous":["r0001"]}\n')
    assert read == Live("r0002", 7, ["r0001"])
    assert read is not None
    assert (read.since, read.fence) == (0.0, 0.0)


@pytest.mark.parametrize(
    "changes",
    [
        {"since": "then"},
        {"withdrawals": [{"release": "r0001"}]},
        {"withdrawals": 3},
        {"since": None},
        {"lost_until": "?"},
    ],
)
def test_a_damaged_one_is_refused(changes: dict[str, object]) -> None:
    good = orjson.loads(Live("r0001", 1, []).dump())
    assert parse_live(orjson.dumps({**good, **changes})) is None
    assert parse_live(orjson.dumps(good)) is not None


def test_only_what_was_judged_is_withdrawn(tmp_path: Path) -> None:
    store = ReleaseStore(tmp_path)
    for _ in range(2):
        store.set_live("t", store.write("t", {}, {}))
    judged = store.live("t")
    assert judged is not None
    now = store.set_live("t", "r0001")
    assert store.withdraw("t", judged, "disagreement", "late") is None
    assert store.live("t") == now
    taken = store.withdraw("t", now, "teacher_changed", "it has another name")
    assert taken is not None
    assert (taken.release, taken.previous) == (None, ["r0002", "r0001"])
    again = store.set_live("t", "r0001")
    assert again.withdrawn("r0001") == Withdrawal(
        "r0001", "teacher_changed", taken.fence, "it has another name"
    )
    assert again.withdrawn("r0002") is None
    assert again.since >= taken.fence
    assert time.time() - 60 < taken.fence
    assert store.withdraw("t", taken, "disagreement", "nothing is live") is None


def test_labels_from_before_a_withdrawal_make_nothing_live(tmp_path: Path) -> None:
    store = ReleaseStore(tmp_path)
    now = store.set_live("t", store.write("t", {}, {}))
    store.withdraw("t", now, "disagreement", "x")
    store.write("t", {}, {})
    with pytest.raises(WithdrawnMeanwhile, match=r"r0002 was learned while r0001 was withdrawn"):
        store.set_live("t", "r0002", fence=now.fence)
    live = store.live("t")
    assert live is not None
    assert live.release is None
    assert store.set_live("t", "r0002", fence=live.fence).release == "r0002"


def test_a_damaged_file_is_rewritten_by_a_person_alone_and_withdrawals_stay_fenced_off(
    tmp_path: Path,
) -> None:
    store = ReleaseStore(tmp_path)
    withdrawn = store.withdraw("t", store.set_live("t", store.write("t", {}, {})), "disagreement", "x")
    assert withdrawn is not None
    (tmp_path / "tasks/t/live").write_bytes(b"torn")
    with pytest.raises(WithdrawnMeanwhile, match="r0001 was learned while"):
        store.set_live("t", "r0001", fence=withdrawn.fence)
    assert (tmp_path / "tasks/t/live").read_bytes() == b"torn"
    repaired = store.set_live("t", "r0001")
    assert repaired.withdrawals == []
    assert repaired.fence > withdrawn.fence
    again = store.live("t")
    assert again is not None
    assert again.fence == repaired.fence, "labels from before the damage make nothing live"
    with pytest.raises(WithdrawnMeanwhile):
        store.set_live("t", "r0001", fence=withdrawn.fence)
    assert store.set_live("t", "r0001", fence=again.fence).fence == again.fence


def test_a_release_that_stays_live_is_live_since_it_began(tmp_path: Path) -> None:
    store = ReleaseStore(tmp_path)
    began = store.set_live("t", store.write("t", {}, {})).since
    assert store.set_live("t", "r0001").since == began
