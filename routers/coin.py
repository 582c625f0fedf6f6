"""The audit coin: how often a served student answer is checked against the teacher (STATISTICS.md §2)."""

from __future__ import annotations

FIRST_RATE = 0.05
LATER_RATE = 0.02
FIRST_AUDITS = 300


def audit_rate(accepted_audits: int, override: float | None = None) -> float:
    """The probability with which the coin falls for the next request.

    `accepted_audits` counts the audited student answers of the live release. A young release is watched more closely;
    the rate is never 0, since a release nobody checks promises nothing.
    """
    if override is not None:
        return override
    return FIRST_RATE if accepted_audits < FIRST_AUDITS else LATER_RATE
