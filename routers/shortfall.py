"""How many more accepted labels a test that didn't pass would have needed (STATISTICS.md §3)."""

from __future__ import annotations

from collections.abc import Callable

from routers.promise import binomial_tail

MOST = 10_000_000
"""More labels than this nobody waits for."""


def labels_short(
    accepted: int,
    disagreements: int,
    max_disagreement: float,
    delta: float,
    p_value: Callable[[int, int, float], float] = binomial_tail,
) -> tuple[int | None, int | None]:
    """The accepted labels that are missing for p ≤ `delta`: if all of them agree, and if as many disagree as so far.

    None for what won't come about: at a rate of `max_disagreement` or above no number is enough, and without a label
    there is no rate. Above `MOST` it is None, too. `p_value` is the test's: of disagreements, labels and α.
    """
    clean = _least(lambda more: p_value(disagreements, accepted + more, max_disagreement) <= delta)
    if accepted == 0 or disagreements >= max_disagreement * accepted:
        return clean, None
    rate = disagreements / accepted
    same = _least(
        lambda more: p_value(disagreements + round(rate * more), accepted + more, max_disagreement) <= delta
    )
    return clean, same


def _least(enough: Callable[[int], bool]) -> int | None:
    """The least number that is enough, by doubling and halving."""
    if enough(0):
        return 0
    high = 1
    while not enough(high):
        high *= 2
        if high > MOST:
            return None
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high
