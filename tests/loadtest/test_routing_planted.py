"""Each rule broken on purpose breaks promises; kept, it doesn't, and it still lets a fine student go live.

Few lives here, with fixed seeds; `make bench-routing ONLY=planted` lives 200 of each.
"""

from __future__ import annotations

import pytest

from loadtest.routing.lives import DELTA
from loadtest.routing.planted import PLANTED, Lived, live, table_of
from loadtest.routing.verdict import is_kept

LIVES = {"looks": 10, "replays": 14, "coin": 12}
"""Where the rule's absence breaks half of the lives, not nearly all, it takes more of them to show."""


@pytest.mark.parametrize("name", PLANTED)
def test_what_goes_wrong_without_the_rule(name: str) -> None:
    life = PLANTED[name].life
    seeds = range(LIVES.get(name, 8))
    broken = {kept: sum(life(seed, kept, False) is True for seed in seeds) for kept in (False, True)}
    assert not is_kept(broken[False], len(seeds), DELTA), "nothing went wrong: the failure isn't planted"
    assert is_kept(broken[True], len(seeds), DELTA), (
        f"{broken[True]} of {len(seeds)} broken with the rule kept"
    )
    fine = sum(life(seed, True, True) is False for seed in range(3))
    assert fine >= 2, "a rule that refuses everything keeps every promise"


def test_the_table_says_what_was_kept() -> None:
    assert live("drift", range(5)) == Lived(off=5, on=0, fine=2, tried=2)
    shown = table_of({"drift": Lived(200, 3, 49, 50), "looks": Lived(90, 60, 50, 50)}, 200)
    assert [*shown.columns[2].cells] == ["100.0%", "45.0%"]
    assert [*shown.columns[4].cells] == ["kept", "BROKEN"]
    assert [*shown.columns[5].cells] == ["98%", "100%"]
