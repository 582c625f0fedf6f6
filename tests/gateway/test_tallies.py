"""What is counted without a lock reads exactly like what prometheus-client counts itself."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest

from gateway.tallies import Distribution, Tally

_BOUNDS = (0.1, 0.5, 1.0)
_near = st.sampled_from([0.0, 0.1, 0.3, 0.5, 1.0, 1.5]) | st.floats(0.0, 2.0)


def _counted(kind: type[Counter], amounts: Sequence[tuple[str, float]]) -> bytes:
    registry = CollectorRegistry()
    counter = kind("counted", "Things.", ("task",), registry=registry)
    for task, amount in amounts:
        counter.labels(task).inc(amount)
    return _without_times(registry)


def _observed(kind: type[Histogram], amounts: Sequence[tuple[str, float]]) -> bytes:
    registry = CollectorRegistry()
    histogram = kind("seen", "Things.", ("task",), buckets=_BOUNDS, registry=registry)
    alone = kind("alone", "Things.", (), buckets=_BOUNDS, registry=registry)
    for task, amount in amounts:
        histogram.labels(task).observe(amount)
        alone.observe(amount)
    return _without_times(registry)


def _without_times(registry: CollectorRegistry) -> bytes:
    lines = generate_latest(registry).splitlines()
    assert generate_latest(registry).splitlines() == lines  # reading changes nothing
    return b"\n".join(line for line in lines if b"_created" not in line)


@given(st.lists(st.tuples(st.sampled_from("ab"), _near)))
def test_counters_and_histograms_read_like_the_librarys_own(amounts: list[tuple[str, float]]) -> None:
    assert _counted(Tally, amounts) == _counted(Counter, amounts)
    assert _observed(Distribution, amounts) == _observed(Histogram, amounts)


def test_a_counter_never_goes_back() -> None:
    counter = Tally("counted", "Things.", registry=None)
    with pytest.raises(ValueError, match="-1"):
        counter.inc(-1)
