"""What a request's `cache-control` says, and what is said in vain."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.cache_control import CLOSED, FREE, CacheControl, parse


@pytest.mark.parametrize(
    ("header", "meant"),
    [
        ("no-store", CLOSED),
        ("max-age=5, NO-STORE", CLOSED),
        ("no-cache", CacheControl(read=False)),
        (" No-Cache , max-age=7", CacheControl(read=False, max_age_s=7)),
        ("max-age=0", CacheControl(max_age_s=0)),
        ('max-age="30"', CacheControl(max_age_s=30)),
        ("max-age=30, max-age=10", CacheControl(max_age_s=10)),
        ("max-age = 30", CacheControl(max_age_s=30)),
        ("max-age=" + "9" * 400, CacheControl(max_age_s=9_999_999_999)),
        ("max-age=-1", FREE),
        ("max-age=1.5", FREE),
        ("max-age=soon", FREE),
        ("max-age=٣", FREE),
        ("max-age", FREE),
        ("only-if-cached, max-stale=4, no-cachet, =", FREE),
        ("", FREE),
    ],
)
def test_directives(header: str, meant: CacheControl) -> None:
    assert parse(header) == meant


@given(st.text(alphabet="no-strecachmxge=,0123456789 \"'\t;", max_size=60) | st.text(max_size=60))
def test_nothing_upsets_it_and_nothing_opens_what_is_closed(header: str) -> None:
    control = parse(header)
    assert control.max_age_s is None or 0 <= control.max_age_s < 1e11
    assert parse(f"{header},no-store") == parse(f"no-store,{header}") == CLOSED
    assert not parse(f"{header},no-cache").read
    limited = parse(f"max-age=60,{header}")
    assert limited == CLOSED or (limited.max_age_s is not None and limited.max_age_s <= 60)
