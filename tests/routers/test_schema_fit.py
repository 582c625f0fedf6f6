from __future__ import annotations

import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from routers.schema_fit import fits

TREE: dict[str, Any] = {
    "$defs": {
        "node": {
            "type": "object",
            "properties": {"next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}},
            "required": ["next"],
        }
    },
    "$ref": "#/$defs/node",
}


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        (True, [1, None, {}], []),
        (False, [], [1, None, {}]),
        ({}, [1, "x", None], []),
        ({"type": "string"}, ["", "x"], [1, None, ["x"]]),
        ({"type": ["string", "null"]}, ["x", None], [0, False]),
        ({"type": "integer"}, [1, 2.0, -3], [1.5, True, "1"]),
        ({"type": "number"}, [1, 1.5], [False, "1", None]),
        ({"type": "boolean"}, [True], [1, 0]),
        ({"enum": ["a", 1, None]}, ["a", 1, None], ["b", True, 2]),
        ({"const": {"a": 1}}, [{"a": 1}], [{"a": 2}, 1]),
        ({"properties": {"a": {"type": "string"}}}, [{"a": "x"}, {}, {"b": 1}, 7], [{"a": 1}]),
        ({"required": ["a"]}, [{"a": None}, []], [{}, {"b": 1}]),
        ({"properties": {"a": {}}, "additionalProperties": False}, [{"a": 1}, {}], [{"b": 1}]),
        ({"additionalProperties": {"type": "integer"}}, [{"b": 1}], [{"b": "1"}]),
        ({"items": {"type": "integer"}}, [[], [1, 2], "x"], [[1, "2"]]),
        ({"anyOf": [{"type": "string"}, {"minimum": 3}]}, ["x", 4], [2]),
        ({"oneOf": [{"type": "integer"}, {"minimum": 3}]}, [1, 3.5], [4]),
        ({"allOf": [{"type": "integer"}, {"minimum": 3}]}, [3], [2, 3.5]),
        ({"minimum": 1, "maximum": 3}, [1, 3], [0.5, 4]),
        ({"exclusiveMinimum": 1, "exclusiveMaximum": 3}, [2], [1, 3]),
        ({"minLength": 1, "maxLength": 2}, ["a", "ab", 7], ["", "abc"]),
        ({"minItems": 1, "maxItems": 2}, [[1], [1, 2]], [[], [1, 2, 3]]),
        ({"minProperties": 1, "maxProperties": 1}, [{"a": 1}], [{}, {"a": 1, "b": 2}]),
        (TREE, [{"next": None}, {"next": {"next": None}}], [{"next": {}}, {}, None]),
        ({"format": "date", "pattern": "^(a+)+$", "x-own": 1}, ["anything"], []),
    ],
)
def test_keywords(schema: Any, good: list[Any], bad: list[Any]) -> None:
    assert [fits(value, schema) for value in good] == [True] * len(good)
    assert [fits(value, schema) for value in bad] == [False] * len(bad)


@pytest.mark.parametrize(
    "schema",
    [
        None,
        7,
        "x",
        [],
        {"type": "strange"},
        {"type": 7},
        {"enum": 7},
        {"required": 7},
        {"properties": [1]},
        {"additionalProperties": 7},
        {"maxProperties": "x"},
        {"anyOf": 7},
        {"allOf": [7]},
        {"$ref": "#/nowhere"},
        {"$ref": "http://example.org/schema"},
        {"$ref": 7},
        {"$ref": "#"},
    ],
)
def test_a_broken_schema_fits_nothing(schema: Any) -> None:
    assert not fits({"a": 1}, schema)


def test_references_that_multiply_end_in_time() -> None:
    both = [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/a"}]
    for keyword in ("anyOf", "oneOf"):
        began = time.perf_counter()
        schema = {"$defs": {"a": {keyword: both}}, "$ref": "#/$defs/a"}
        assert not fits({}, schema)
        assert time.perf_counter() - began < 5
    wide = {"items": {"anyOf": [{"type": "string"}] * 100 + [{}]}}
    assert not fits([0] * 1000, wide)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=3),
    max_leaves=8,
)


@given(values, values)
def test_it_never_raises_and_a_value_fits_itself(value: Any, other: Any) -> None:
    assert fits(value, {"const": value}) and fits(value, {"enum": [other, value]})
    assert fits(value, other) in (True, False)
    assert fits(value, {"anyOf": [other, {}]}) in (True, False)
