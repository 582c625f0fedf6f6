"""Errors that a teacher sends with status 200: instead of an answer, or in the middle of one."""

from __future__ import annotations

import orjson

from serving.errors import UpstreamRefused
from serving.exchange import Json
from serving.upstream import Headers
from serving.wire import forwardable_response

_STATUS_OF = {
    "invalid_request_error": 400,
    "authentication_error": 401,
    "permission_error": 403,
    "not_found_error": 404,
    "rate_limit_error": 429,
    "rate_limit_exceeded": 429,
    "insufficient_quota": 429,
}
"""What clients must not take for a fault that passes (or must), by the error's `type` or `code`."""


def error_in(body: Json) -> bytes | None:
    """Return the error that a completion or a chunk reports, in an envelope on one line; None: it is fine.

    An error counts even beside choices, or inside one (OpenRouter): such an answer isn't whole.
    """
    error = body.get("error")
    if not error and body.get("object") == "error":
        error = {key: value for key, value in body.items() if key != "object"}  # vLLM's older form
    if not error:
        choices = body.get("choices")
        for choice in choices if isinstance(choices, list) else ():
            if isinstance(choice, dict) and choice.get("finish_reason") == "error":
                error = choice.get("error") or "the model failed"
                break
    if not error:
        return None
    if not isinstance(error, dict):
        error = {"message": str(error), "type": "upstream_error", "param": None, "code": None}
    return orjson.dumps({"error": error})


def failure_of(body: bytes, headers: Headers) -> UpstreamRefused:
    """Turn an error that came with status 200 into the refusal it is, with its own status, or else 502.

    `body` is what `error_in` gave.
    """
    error = orjson.loads(body)["error"]
    kept = dict(forwardable_response(headers, whole=False))
    return UpstreamRefused(_status(error), {**kept, "content-type": "application/json"}, body)


def _status(error: Json) -> int:
    for name in ("status", "status_code", "code"):
        value = error.get(name)
        if isinstance(value, str) and value.isdecimal() and len(value) == 3:
            value = int(value)
        if isinstance(value, int) and 400 <= value <= 599:
            return value
    for name in ("type", "code"):
        value = error.get(name)
        if isinstance(value, str) and value in _STATUS_OF:
            return _STATUS_OF[value]
    return 502
