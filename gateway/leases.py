"""Leases: which of several replicas asks the teacher, while the others wait for its answer."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to answer one key, until it is released or its time is over.

    `token` is None where nobody else has to be kept out: single flight within the process only, or a Redis
    that can't be reached, when everyone leads.
    """

    key: str
    token: int | None = None
