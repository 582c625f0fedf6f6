"""The first level: what was used last stays, until its time, within the bytes allowed."""

from __future__ import annotations

import gc
import tracemalloc

from hypothesis import given
from hypothesis import strategies as st

from gateway.cache_memory import MemoryLevel


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_an_entry_lives_until_its_time() -> None:
    clock = Clock()
    level = MemoryLevel(10_000, clock=clock)
    level.put("a", b"1", 10.0)
    clock.now = 9.9
    assert level.get("a") == b"1"
    clock.now = 10.0
    assert level.get("a") is None
    assert level.taken == 0


def test_the_least_recently_used_leaves_first() -> None:
    level = MemoryLevel(3_000)
    for name in "abc":
        level.put(name, b"x" * 500, 10.0)
    assert level.get("a") is not None
    level.put("d", b"x" * 500, 10.0)
    assert [name for name in "abcd" if level.get(name)] == ["a", "c", "d"]


def test_what_is_too_large_is_not_kept_and_costs_nobody_a_place() -> None:
    level = MemoryLevel(2_000)
    level.put("a", b"1", 10.0)
    level.put("b", b"x" * 2_000, 10.0)
    assert level.get("a") == b"1"
    assert level.get("b") is None


def test_an_answer_that_is_too_large_does_not_leave_an_older_one_behind() -> None:
    level = MemoryLevel(2_000)
    level.put("a", b"old", 10.0)
    level.put("a", b"x" * 2_000, 10.0)
    assert level.get("a") is None
    assert level.taken == 0


def test_without_room_nothing_is_kept() -> None:
    level = MemoryLevel(0)
    level.put("a", b"", 10.0)
    assert level.get("a") is None


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["put", "get", "drop", "wait"]),
        st.sampled_from("abcdef"),
        st.integers(0, 900),
        st.integers(0, 5),
    ),
    max_size=60,
)


@given(STEPS)
def test_it_never_holds_more_than_allowed_nor_what_was_not_put(
    steps: list[tuple[str, str, int, int]],
) -> None:
    clock = Clock()
    level = MemoryLevel(2_500, clock=clock)
    put: dict[str, tuple[bytes, float]] = {}
    for step, name, size, seconds in steps:
        match step:
            case "put":
                level.put(name, bytes(size), float(seconds))
                put[name] = (bytes(size), clock.now + seconds)
            case "drop":
                level.drop(name)
                put.pop(name, None)
            case "wait":
                clock.now += seconds
            case _:
                found = level.get(name)
                assert found is None or (found == put[name][0] and clock.now < put[name][1])
        assert 0 <= level.taken <= 2_500
    for name in "abcdef":
        level.drop(name)
    assert level.taken == 0


def test_the_bytes_counted_are_those_really_taken() -> None:
    limit = 2 * 1024 * 1024
    gc.collect()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        level = MemoryLevel(limit)
        for number in range(16_000):
            level.put(f"tenant/task/1/{number:064x}", b"%d" % number * 20, 60.0)
        gc.collect()
        taken = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert level.taken > 0.99 * limit
    assert 0.7 * limit < taken <= limit
