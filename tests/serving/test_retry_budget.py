from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from serving.retry_budget import RetryBudget


@given(st.lists(st.tuples(st.integers(0, 400), st.integers(0, 400)), max_size=15))
def test_a_storm_is_never_made_much_worse(seconds: list[tuple[int, int]]) -> None:
    """Each second so many requests come, and so many of them would like a retry."""
    now = [0.0]
    budget = RetryBudget(clock=lambda: now[0])
    requests, retries = [], []
    for wanted, failing in seconds:
        now[0] += 1
        for _ in range(wanted):
            budget.request()
        requests.append(wanted)
        retries.append(sum(budget.take() for _ in range(failing)))
        # The last of them was granted up to nine seconds ago, by the ten seconds before it.
        assert sum(retries[-10:]) <= 0.1 * sum(requests[-19:]) + 11


def test_few_failures_are_all_repeated() -> None:
    now = [0.0]
    budget = RetryBudget(clock=lambda: now[0])
    for _ in range(100):
        now[0] += 1
        budget.request()
        assert budget.take(), "one a second is always there"
