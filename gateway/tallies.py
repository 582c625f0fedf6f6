"""Counters and histograms of a process that counts in one thread: no lock, and no look at every bucket.

A request is counted in some fifteen places. What is counted can be read at once, in any thread. Several workers count
in files that they share instead: there prometheus-client's own classes are right.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable

from prometheus_client import Counter, Histogram
from prometheus_client.samples import Sample


class Tally(Counter):
    """A counter that one thread increases."""

    def _metric_init(self) -> None:
        super()._metric_init()
        self._total = 0.0

    def inc(self, amount: float = 1, exemplar: dict[str, str] | None = None) -> None:
        """Count. Raises ValueError for less than nothing."""
        if amount < 0:
            raise ValueError(f"a counter can't be increased by {amount}")
        self._total += amount

    def _child_samples(self) -> Iterable[Sample]:
        self._value.set(self._total)
        return super()._child_samples()


class Distribution(Histogram):
    """A histogram that one thread adds to."""

    def _metric_init(self) -> None:
        super()._metric_init()
        self._bounds = tuple(self._upper_bounds)
        self._counts = [0] * len(self._bounds)
        self._total = 0.0

    def observe(self, amount: float, exemplar: dict[str, str] | None = None) -> None:
        """Count a value. Values that are no number count as the largest."""
        self._total += amount
        self._counts[bisect_left(self._bounds, amount) if amount == amount else -1] += 1

    def _child_samples(self) -> Iterable[Sample]:
        for bucket, count in zip(self._buckets, self._counts, strict=True):
            bucket.set(count)
        self._sum.set(self._total)
        return super()._child_samples()
