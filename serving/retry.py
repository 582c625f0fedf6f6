"""When to ask again, and how long to wait before: decided from the error alone."""

from __future__ import annotations

import email.utils
import random
import time

from serving.errors import UpstreamBroken, UpstreamError, UpstreamRefused

_BASE_S = 0.5
_CAP_S = 8.0
_LONGEST_TOLD_S = 60.0
"""A client that is told to come back later than that is better told so at once; OpenAI's own stop there too."""
_WORTH_REPEATING = frozenset({408, 409, 429})


def delay_before_retry(error: UpstreamError, failed_before: int) -> float | None:
    """Return the seconds to wait before the next attempt, or None when the error would only come again.

    A refused request is repeated as its headers say: `x-should-retry` overrides the status; `retry-after-ms`
    and `retry-after` (seconds or an HTTP date, RFC 9110 §10.2.3) override the backoff, which is a random
    time up to 0.5 s, doubled with each failure, at most 8 s. A wait of more than 60 s is left to the client.
    """
    if isinstance(error, UpstreamRefused):
        wanted = error.headers.get("x-should-retry")
        if wanted == "false":
            return None
        if wanted != "true" and error.status not in _WORTH_REPEATING and error.status < 500:
            return None
        told = _told(error.headers.get("retry-after-ms"), error.headers.get("retry-after"))
        if told is not None:
            return told if told <= _LONGEST_TOLD_S else None
    elif not isinstance(error, UpstreamBroken):
        return None
    return random.uniform(0.0, min(_CAP_S, _BASE_S * 2**failed_before))


def _told(milliseconds: str | None, after: str | None) -> float | None:
    for text, unit in ((milliseconds, 0.001), (after, 1.0)):
        seconds = _number(text)
        if seconds is not None:
            return max(0.0, seconds * unit)
    if after is None:
        return None
    try:
        return max(0.0, email.utils.parsedate_to_datetime(after).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None


def _number(text: str | None) -> float | None:
    try:
        number = float(text) if text is not None else None
    except ValueError:
        return None
    # "nan" compares false with everything, "inf" is no time to wait.
    return number if number is not None and abs(number) < 1e9 else None
