"""Leases: which of several replicas asks the teacher, while the others wait for its answer.

A lease is a key in Redis that ends by itself. Beside it stands the *fence*: the token of whoever got the lease
last. An answer is written only by the holder of that token, so that one who was slow, and was given up, can't
write over the answer of the one who took over.

All keys of one answer have one hash tag, and so lie in one slot of a cluster.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # Redis's library is loaded only where a URL is set
    from gateway.redis_client import Command

PREFIX = "understudy:cache:1:"
"""Of every key; the number is that of the entries' format (`gateway.cache_entry`)."""

_TAKE = """
if redis.call('EXISTS', KEYS[2]) == 1 then return 0 end
if ARGV[4] == '1' and redis.call('EXISTS', KEYS[3]) == 1 then return 0 end
local token = redis.call('INCR', KEYS[1])
if token == 1 then token = redis.call('INCRBY', KEYS[1], ARGV[3]) end
redis.call('PEXPIRE', KEYS[1], ARGV[2])
redis.call('SET', KEYS[2], token, 'PX', ARGV[1])
return token
"""
_STORE = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[3], ARGV[2], 'PX', ARGV[3])
if redis.call('GET', KEYS[2]) == ARGV[1] then redis.call('DEL', KEYS[2]) end
return 1
"""
_RELEASE = """
if redis.call('GET', KEYS[2]) ~= ARGV[1] then return 0 end
return redis.call('DEL', KEYS[2])
"""
_FENCE_S = 600.0


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to answer one key, until it is released or its time is over.

    `token` is None where nobody else is kept out: single flight within the process only, or a Redis that
    can't be reached, when everyone leads.
    """

    key: str
    token: int | None = None


@dataclass(frozen=True, slots=True)
class Names:
    """What stands in Redis about one answer."""

    fence: str
    lease: str
    entry: str

    @classmethod
    def of(cls, key: str, scope: str) -> Names:
        """Return the names for a key of `gateway.cache_key` in a scope."""
        tagged = f"{PREFIX}{{{scope}/{key}}}"
        return cls(f"{tagged}:fence", f"{tagged}:lease", tagged)


def take(names: Names, *, lease_s: float, unless_answered: bool) -> Command:
    """Ask for the lease. Its reply is the token, or 0: another holds it, or (if asked) the answer is there.

    The fence is kept for ten leases and ten minutes at least; whoever comes later than that comes too late.
    A fence that was forgotten, by its time or by a Redis that restarted empty, starts at a random number, so
    that no token is ever given twice.
    """
    fence_s = max(_FENCE_S, 10 * lease_s)
    start = random.getrandbits(48)
    return (
        "EVAL",
        _TAKE,
        3,
        names.fence,
        names.lease,
        names.entry,
        _ms(lease_s),
        _ms(fence_s),
        start,
        int(unless_answered),
    )


def store(names: Names, data: bytes, *, ttl_s: float, token: int | None) -> Command:
    """Write an answer. With a token: only if it is the last one given, which also ends its lease; else 0."""
    if token is None:
        return ("SET", names.entry, data, "PX", _ms(ttl_s))
    return ("EVAL", _STORE, 3, names.fence, names.lease, names.entry, token, data, _ms(ttl_s))


def release(names: Names, token: int) -> Command:
    """End a lease without an answer, if it is still this one's."""
    return ("EVAL", _RELEASE, 2, names.fence, names.lease, token)


def _ms(seconds: float) -> int:
    return max(1, round(seconds * 1000))
