"""The key under which an answer is cached: tenant, task, generation, and everything that can change the answer.

What isn't known to be without effect is part of the key: a field added to the API tomorrow splits the cache
before anybody has heard of it, and never serves one request the answer to another.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Literal

from serving.canonical import canonical_bytes
from serving.exchange import Json
from serving.teacher_settings import TeacherSettings

IGNORED_FIELDS = frozenset(
    {
        "stream",
        "stream_options",
        "store",
        "metadata",
        "user",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
    }
)
"""Fields of the request that say how the answer travels, where it is kept or who asks; never what it is."""

KEY_HEADERS = frozenset({"openai-organization", "openai-project", "openai-beta"})
"""Headers that choose between accounts or behaviours of the teacher (lower-case names)."""

_EVERYBODY = "*"
_RELEASE_DIGITS = 16


def cache_scope(teacher: TeacherSettings) -> str:
    """Return what all keys of a configuration have in common: gateways before another teacher share nothing."""
    return hashlib.sha256(f"{teacher.base_url} {teacher.model}".encode()).hexdigest()[:8]


def cache_key(
    request: Json,
    *,
    tenant: str,
    task: str,
    generation: int,
    release: str | None = None,
    begun: bool = False,
    share: Literal["tenant", "task"],
    headers: Iterable[tuple[str, str]],
) -> str:
    """Return the key of a chat request's answer: `<tenant or *>/<task>/<generation and release>/<SHA-256 in hex>`.

    `request` is the parsed body, `headers` are the request's own with lower-case names. Requests that are
    the same JSON value, ignored fields aside, have one key: the order of fields and the spelling of numbers
    (1, 1.0, 1e0) don't matter. Everything else does: 1 and "1", 1 and true, null and absent, the order of
    messages. With `share` "task" all tenants have one key.

    A new release of a task has a new generation, and leaves behind whatever was cached under the old one.
    `release` is the checksum of the live one, if there is one: gateways that share a Redis and no state
    directory count generations each for itself, and a promise speaks of one release's answers only. `begun`: a student
    that streams is judged by the beginning of its answer where that is streamed, and by all of it where it is whole;
    what passed the one judgement isn't given to who asks for the other.

    Raises ValueError for what isn't JSON.
    """
    asked = {name: value for name, value in request.items() if name not in IGNORED_FIELDS}
    digest = hashlib.sha256(canonical_bytes(asked))
    chosen = sorted(pair for pair in headers if pair[0] in KEY_HEADERS)
    if chosen:
        digest.update(canonical_bytes([list(pair) for pair in chosen]))
    owner = tenant if share == "tenant" else _EVERYBODY
    era = str(generation) if release is None else f"{generation}-{release[:_RELEASE_DIGITS]}"
    return f"{owner}/{task}/{era}{'-begun' if begun else ''}/{digest.hexdigest()}"
