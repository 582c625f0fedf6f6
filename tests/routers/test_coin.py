from __future__ import annotations

import pytest

from routers.coin import audit_rate


@pytest.mark.parametrize(("audits", "rate"), [(0, 0.05), (1, 0.05), (299, 0.05), (300, 0.02), (10**9, 0.02)])
def test_a_young_release_is_watched_more_closely(audits: int, rate: float) -> None:
    assert audit_rate(audits) == rate


@pytest.mark.parametrize("audits", [0, 299, 300, 10**6])
def test_the_operators_rate_goes_first(audits: int) -> None:
    assert audit_rate(audits, 0.1) == 0.1
    assert audit_rate(audits, 1.0) == 1.0
