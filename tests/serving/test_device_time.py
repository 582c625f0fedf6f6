"""Processor sharing: every moment in which a device is at work is somebody's, once."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.device_time import DeviceTime, Share

SPANS = st.lists(st.tuples(st.integers(0, 60), st.integers(0, 30)), min_size=1, max_size=20).map(
    lambda spans: [(began, began + lasted) for began, lasted in spans]
)
"""When requests begin and end, in whole seconds: many of them at the same moment."""


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def shares(spans: list[tuple[int, int]], *, ends_first: bool = True, backwards: bool = False) -> list[float]:
    """What the meter gives each request."""
    clock = Clock()
    device = DeviceTime(clock)
    moments = [(end, not ends_first, number, "end") for number, (_, end) in enumerate(spans)]
    moments += [(began, ends_first, number, "begin") for number, (began, _) in enumerate(spans)]
    moments.sort(key=lambda one: (one[0], one[1], -one[2] if backwards else one[2]))
    begun: dict[int, Share] = {}
    for at, _, number, what in moments:
        clock.now = float(at)
        if what == "begin":
            begun[number] = device.begin()
        if number in begun and (
            what == "end" or spans[number][1] == at
        ):  # an end may stand before its beginning
            begun[number].end()
    assert device.under_way == 0
    return [begun[number].seconds for number in range(len(spans))]


def by_definition(spans: list[tuple[int, int]]) -> list[Fraction]:
    """The same, second by second."""
    taken = [Fraction(0) for _ in spans]
    for second in range(100):
        at_it = [number for number, (began, end) in enumerate(spans) if began <= second < end]
        for number in at_it:
            taken[number] += Fraction(1, len(at_it))
    return taken


@given(SPANS)
def test_each_has_its_part_of_every_moment_and_all_of_them_the_whole(spans: list[tuple[int, int]]) -> None:
    found = shares(spans)
    assert found == pytest.approx([float(share) for share in by_definition(spans)], abs=1e-9)
    busy = sum(any(began <= second < end for began, end in spans) for second in range(100))
    assert sum(found) == pytest.approx(busy, abs=1e-9)
    assert all(share >= 0.0 for share in found)


@given(SPANS)
def test_the_order_within_a_moment_changes_nothing(spans: list[tuple[int, int]]) -> None:
    assert shares(spans, backwards=True) == pytest.approx(shares(spans), abs=1e-9)
    assert shares(spans, ends_first=False) == pytest.approx(shares(spans), abs=1e-9)


def test_a_share_grows_until_its_end_and_ends_once() -> None:
    clock = Clock()
    device = DeviceTime(clock)
    alone = device.begin()
    clock.now = 2.0
    assert alone.seconds == 2.0
    second = device.begin()
    clock.now = 4.0
    assert (alone.seconds, second.seconds) == (3.0, 1.0)
    alone.end()
    clock.now = 7.0
    alone.end()
    assert (alone.seconds, second.seconds) == (3.0, 4.0)
    assert device.under_way == 1
