"""Tenants: whose request it is, as a hash of their key; the key itself is kept nowhere."""

from __future__ import annotations

import hashlib
import re

ANONYMOUS = "anonymous"
"""Who sends no key."""

_TENANT = re.compile(rf"[0-9a-f]{{16}}|{ANONYMOUS}")


def tenant_of(key: str) -> str:
    """The tenant with this key: 16 hex digits."""
    return hashlib.sha256(key.encode()).hexdigest()[:16]


def is_tenant(text: str) -> bool:
    """Whether `text` is a tenant as the log names it."""
    return _TENANT.fullmatch(text) is not None
