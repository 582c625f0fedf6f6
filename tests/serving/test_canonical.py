"""Both canonical texts tell the same values apart."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from serving.canonical import canonical, canonical_bytes

LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=4),
    st.sampled_from([0, 0.0, -0.0, 1, 1.0, True, "1", 2**53, 2**64, 1e16, 1e300, "\ud800", "\\ud800"]),
)
JSON = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=5,
)


@given(JSON, JSON)
@example(1, 1.0)
@example(10**300, 1e300)
@example([1, {"b": 2.0, "a": None}], [1.0, {"a": None, "b": 2}])
def test_both_texts_tell_the_same_values_apart(one: object, other: object) -> None:
    assert (canonical_bytes(one) == canonical_bytes(other)) == (canonical(one) == canonical(other))


@pytest.mark.parametrize("value", [float("nan"), [float("inf")], {1, 2}, {"a": object()}])
def test_what_is_no_json_has_neither(value: object) -> None:
    with pytest.raises(ValueError, match="not JSON"):
        canonical(value)
    with pytest.raises(ValueError, match="not JSON"):
        canonical_bytes(value)
