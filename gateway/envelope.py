"""OpenAI's error envelope, for every error there is, the framework's included.

    {"error": {"message": …, "type": …, "param": …, "code": …}}

https://platform.openai.com/docs/guides/error-codes
"""

from __future__ import annotations

from dataclasses import dataclass, field

import orjson

from serving.errors import (
    RequestError,
    UpstreamBroken,
    UpstreamError,
    UpstreamRefused,
    UpstreamTimeout,
    UpstreamUnavailable,
)
from serving.exchange import Json
from serving.slots import UpstreamBusy

FORWARDED_HEADERS = ("retry-after", "retry-after-ms", "x-should-retry")
"""What a refusal of the teacher tells the client beside its body: when and whether to try again."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """An error as it goes to the client: `body` is the envelope, `headers` what stands beside it."""

    status: int
    body: bytes
    headers: list[tuple[str, str]] = field(default_factory=list)

    def detail(self) -> Json:
        """Return the object inside the envelope."""
        detail: Json = orjson.loads(self.body)["error"]
        return detail


def refuse(
    status: int,
    message: str,
    *,
    kind: str,
    param: str | None = None,
    code: str | None = None,
    headers: list[tuple[str, str]] | None = None,
) -> Refusal:
    """Make a refusal of our own."""
    detail = {"message": message, "type": kind, "param": param, "code": code}
    return Refusal(status, orjson.dumps({"error": detail}), headers or [])


def overloaded(message: str) -> Refusal:
    """Refuse what there is no room for now: a client does well to try again in a moment."""
    again = [("retry-after", "1"), ("x-should-retry", "true")]
    return refuse(429, message, kind="rate_limit_error", code="overloaded", headers=again)


def refusal_of(error: Exception) -> Refusal:
    """Turn any error into what the client is told. Errors that aren't ours say nothing of the inside."""
    if isinstance(error, RequestError):
        return refuse(error.status, error.message, kind=error.kind, param=error.param, code=error.code)
    if isinstance(error, UpstreamRefused):
        return _forwarded(error)
    if isinstance(error, UpstreamUnavailable):
        again = [("retry-after", str(error.retry_after_s))]
        return refuse(503, str(error), kind="upstream_error", code="teacher_unavailable", headers=again)
    if isinstance(error, UpstreamBusy):
        return overloaded(str(error))
    if isinstance(error, UpstreamTimeout):
        return refuse(
            504, str(error) or "the teacher gave no answer in time", kind="timeout_error", code="timeout"
        )
    if isinstance(error, UpstreamBroken | UpstreamError):
        return refuse(
            502, str(error) or "the teacher can't be reached", kind="upstream_error", code="upstream_broken"
        )
    return internal_error()


def internal_error() -> Refusal:
    """Refuse because of a fault of our own, of which the client learns nothing but that."""
    return refuse(500, "the gateway failed on this request", kind="server_error", code="internal_error")


def stopping() -> Refusal:
    """Refuse because the gateway stops; another one, or this one started again, will do: clients retry 503."""
    return refuse(
        503, "the gateway is being stopped; send the request again", kind="server_error", code="stopping"
    )


def enveloped(status: int, body: bytes) -> bytes:
    """Return an upstream's error body if it is in an envelope already, else wrapped into one."""
    try:
        parsed = orjson.loads(body)
    except orjson.JSONDecodeError:
        parsed = None
    if isinstance(parsed, dict) and isinstance(parsed.get("error"), dict):
        return body
    said = body.decode("utf-8", "replace").strip()[:500]
    message = f"the teacher answered with status {status}" + (f": {said}" if said else "")
    return refuse(status, message, kind="upstream_error").body


def _forwarded(error: UpstreamRefused) -> Refusal:
    headers = [(name, error.headers[name]) for name in FORWARDED_HEADERS if name in error.headers]
    return Refusal(error.status, enveloped(error.status, error.body), headers)
