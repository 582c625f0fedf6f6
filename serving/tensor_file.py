"""What a safetensors file holds, by its header: names, kinds and shapes of its tensors, and that all of it is there.

https://github.com/huggingface/safetensors: eight bytes with the header's length, the header as JSON, then the tensors'
bytes one after the other, without gaps. Nothing in such a file is ever run, which can't be said of a pickle.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import orjson

_LENGTH_BYTES = 8
_MOST_HEADER_BYTES = 100_000_000
"""What safetensors itself allows."""
_METADATA = "__metadata__"
_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 8),
}


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of a file."""

    dtype: str
    shape: tuple[int, ...]


def tensors_of(data: bytes) -> dict[str, Tensor]:
    """The tensors of a whole file, by name. Raises ValueError, saying what is wrong, for anything else."""
    length = int.from_bytes(data[:_LENGTH_BYTES], "little")
    if len(data) < _LENGTH_BYTES or length > _MOST_HEADER_BYTES:
        raise ValueError(f"it doesn't begin like a safetensors file ({len(data):,} bytes)")
    if len(data) < _LENGTH_BYTES + length:
        raise ValueError(f"it ends after {len(data):,} bytes, within its header")
    try:
        header = orjson.loads(data[_LENGTH_BYTES : _LENGTH_BYTES + length])
    except orjson.JSONDecodeError:
        raise ValueError("its header is no JSON") from None
    if not isinstance(header, dict):
        raise ValueError("its header is no JSON object")
    spans: list[tuple[int, int]] = []
    found: dict[str, Tensor] = {}
    for name, entry in header.items():
        if name != _METADATA:
            found[name], span = _read(name, entry)
            spans.append(span)
    end = 0
    for begins, ends in sorted(spans):
        if begins != end:
            raise ValueError(f"its tensors overlap or leave gaps, at byte {begins:,}")
        end = ends
    there = len(data) - _LENGTH_BYTES - length
    if there != end:
        raise ValueError(f"its header speaks of {end:,} bytes of tensors, and it holds {there:,}")
    return found


def _read(name: str, entry: object) -> tuple[Tensor, tuple[int, int]]:
    try:
        dtype, shape, (begins, ends) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]  # type: ignore[index]
        if not all(type(number) is int and number >= 0 for number in (*shape, begins, ends)):
            raise ValueError
        bits = _BITS[dtype] * math.prod(shape)
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"its header says nothing that can be read of {name[:80]!r}") from None
    if bits != 8 * (ends - begins):
        raise ValueError(f"{name[:80]!r} takes {ends - begins:,} bytes, where {bits // 8:,} are needed")
    return Tensor(dtype, shape), (begins, ends)
