"""Whether a request may be answered from the cache, and whether its answer may be kept there.

What its client says with `cache-control` (RFC 9111, section 5.2.1) comes after what the gateway allows at
all. Directives that aren't known or make no sense are ignored.
"""

from __future__ import annotations

from dataclasses import dataclass

from gateway import names
from gateway.turn import Turn
from serving.exchange import Json

_LONGEST_AGE = 10
_INTERIM = frozenset(
    {
        names.REASON_TEACHER_UNAVAILABLE,
        names.REASON_STUDENT_ERROR,
        names.REASON_STUDENT_SLOW,
        names.REASON_STUDENT_BUSY,
        names.REASON_UNVERIFIED_KEY,
    }
)


@dataclass(frozen=True, slots=True)
class CacheControl:
    """What may be done: `read` an answer not older than `max_age_s`, and `write` the new one."""

    read: bool = True
    write: bool = True
    max_age_s: float | None = None


FREE = CacheControl()
CLOSED = CacheControl(read=False, write=False)


def cache_control(turn: Turn) -> CacheControl:
    """Say what the cache may do for a request.

    Nothing for one whose answer isn't to be kept (`store: false`), whose route is forced, or whose answer is
    drawn by chance: the temperature must be exactly 0 unless the task says otherwise.
    """
    if not turn.storable or turn.arrival.route is not None:
        return CLOSED
    allowed = turn.policy.cache
    if not (_is_zero(turn.chat.body.get("temperature")) if allowed is None else allowed):
        return CLOSED
    told = ",".join(value for name, value in turn.arrival.headers if name == names.CACHE_CONTROL_HEADER)
    return parse(told) if told else FREE


def worth_keeping(turn: Turn, completion: Json) -> bool:
    """Say whether an answer may be given to others later: it is whole, and nothing had to stand in for it."""
    return turn.reason not in _INTERIM and all(
        choice.get("finish_reason") for choice in completion["choices"]
    )


def parse(header: str) -> CacheControl:
    """Read a `cache-control` header of a request; several ones are joined by commas."""
    read = True
    max_age_s: float | None = None
    for directive in header.split(","):
        name, _, value = directive.strip().partition("=")
        match name.strip().lower():
            case "no-store":
                return CLOSED
            case "no-cache":
                read = False
            case "max-age":
                age = _seconds(value)
                if age is not None:
                    max_age_s = age if max_age_s is None else min(age, max_age_s)
    return CacheControl(read=read, max_age_s=max_age_s)


def _seconds(value: str) -> float | None:
    digits = value.strip().strip('"')
    if not (digits.isascii() and digits.isdecimal()):
        return None
    # RFC 9111, section 1.2.2: what is too large to be represented stands for a very long time.
    return float(digits[:_LONGEST_AGE] if len(digits) <= _LONGEST_AGE else "9" * _LONGEST_AGE)


def _is_zero(temperature: object) -> bool:
    return type(temperature) in (int, float) and temperature == 0
