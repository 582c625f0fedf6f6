"""Whether a value fits a JSON Schema, by the keywords that structured outputs use (JSON Schema 2020-12, a subset).

A signal, not a judge: keywords it doesn't know are taken as kept, `pattern` among them, since a client's regular
expression can take for ever. A schema that is broken, or takes too many steps to follow, fits nothing.
"""

from __future__ import annotations

from typing import Any

_DEEPEST = 60
_MOST_STEPS = 20_000
"""References can multiply: a schema of three lines may ask for more steps than there are atoms."""

_TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "boolean": (bool,),
    "null": (type(None),),
    "number": (int, float),
    "integer": (int, float),
}
_BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
_SIZES = (
    ("minLength", "maxLength", str),
    ("minItems", "maxItems", list),
    ("minProperties", "maxProperties", dict),
)


def fits(value: Any, schema: object) -> bool:
    """Whether `value`, as read from JSON, fits `schema`. Never raises, and takes milliseconds at most."""
    try:
        return _Fit(schema).fits(value, schema, 0)
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError):
        return False


class _Fit:
    """One comparison with the schema `root`, with the steps it has left."""

    def __init__(self, root: Any) -> None:
        self._root = root
        self._left = _MOST_STEPS

    def fits(self, value: Any, schema: Any, depth: int) -> bool:
        self._left -= 1
        if self._left < 0 or depth > _DEEPEST:
            raise ValueError("the schema takes too long to follow")
        if isinstance(schema, bool):
            return schema
        return (
            _is_a(value, schema.get("type"))
            and ("enum" not in schema or any(_same(value, one) for one in schema["enum"]))
            and ("const" not in schema or _same(value, schema["const"]))
            and _in_bounds(value, schema)
            and self._combined(value, schema, depth + 1)
            and self._parts(value, schema, depth + 1)
        )

    def _combined(self, value: Any, schema: dict[str, Any], depth: int) -> bool:
        if "$ref" in schema and not self.fits(value, self._resolved(schema["$ref"]), depth):
            return False
        if "anyOf" in schema and not any(self.fits(value, rule, depth) for rule in schema["anyOf"]):
            return False
        if "oneOf" in schema and sum(self.fits(value, rule, depth) for rule in schema["oneOf"]) != 1:
            return False
        return all(self.fits(value, rule, depth) for rule in schema.get("allOf", ()))

    def _parts(self, value: Any, schema: dict[str, Any], depth: int) -> bool:
        if isinstance(value, dict):
            known, rest = schema.get("properties", {}), schema.get("additionalProperties", True)
            return all(name in value for name in schema.get("required", ())) and all(
                self.fits(child, known.get(name, rest), depth) for name, child in value.items()
            )
        if isinstance(value, list) and "items" in schema:
            return all(self.fits(child, schema["items"], depth) for child in value)
        return True

    def _resolved(self, reference: str) -> Any:
        """What `#/…` points to. Raises KeyError for anything else."""
        head, *steps = reference.split("/")
        if head != "#":
            raise KeyError(reference)
        found = self._root
        for step in steps:
            found = found[step.replace("~1", "/").replace("~0", "~")]
        return found


def _is_a(value: Any, wanted: Any) -> bool:
    if wanted is None:
        return True
    for name in wanted if isinstance(wanted, list) else [wanted]:
        found = isinstance(value, _TYPES[name])
        if name in ("number", "integer"):
            found = found and not isinstance(value, bool)
        if found and (name != "integer" or float(value).is_integer()):
            return True
    return False


def _same(one: Any, other: Any) -> bool:
    """Equal as JSON: true isn't 1."""
    return isinstance(one, bool) == isinstance(other, bool) and bool(one == other)


def _in_bounds(value: Any, schema: dict[str, Any]) -> bool:
    if isinstance(value, int | float) and not isinstance(value, bool):
        least, most, above, below = (schema.get(name) for name in _BOUNDS)
        return not bool(
            (least is not None and value < least)
            or (most is not None and value > most)
            or (above is not None and value <= above)
            or (below is not None and value >= below)
        )
    for fewest, largest, kind in _SIZES:
        if isinstance(value, kind):
            return bool(schema.get(fewest, 0) <= len(value) <= schema.get(largest, len(value)))
    return True
