from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from serving.window import Window

EVENTS = st.lists(st.tuples(st.floats(0, 30), st.integers(0, 1)), max_size=60)


@given(EVENTS, st.integers(1, 10), st.floats(0, 40))
def test_it_counts_what_happened_within_its_span(
    events: list[tuple[float, int]], span: int, later: float
) -> None:
    now = [0.0]
    window = Window(span, lambda: now[0])
    at = 0.0
    happened = []
    for gap, kind in events:
        at += gap / 10
        now[0] = at
        window.add(kind)
        happened.append((int(at), kind))
    now[0] = at + later
    recent = [kind for second, kind in happened if second > int(now[0]) - span]
    assert window.counts() == (recent.count(0), recent.count(1))
    window.clear()
    assert window.counts() == (0, 0)
