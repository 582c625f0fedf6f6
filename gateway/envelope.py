"""OpenAI's error envelope, for every error there is, the framework's included.

    {"error": {"message": …, "type": …, "param": …, "code": …}}

https://platform.openai.com/docs/guides/error-codes
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import orjson

from gateway import names
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
from serving.wire import forwardable_response

_NEVER_RETRIED = 404
_QUOTED = 500
_OURS = frozenset({"cache-control", "location"})


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
    """Return an upstream's error body if it is in the envelope already, else put into it.

    What is recognised: an error that is a string (Ollama), fields beside each other (vLLM), a list of one
    envelope (Gemini), `message` or `detail` (other gateways). Anything else is quoted.
    """
    try:
        parsed = orjson.loads(body)
    except orjson.JSONDecodeError:
        parsed = None
    if isinstance(parsed, dict) and _is_detail(parsed.get("error")):
        return body
    if isinstance(parsed, list) and len(parsed) == 1 and isinstance(parsed[0], dict):
        parsed = parsed[0]
    said = body.decode("utf-8", "replace").strip()
    detail: Json = {}
    if isinstance(parsed, dict):
        error = parsed.get("error")
        detail = error if isinstance(error, dict) else parsed
        found = [error, *(detail.get(name) for name in ("message", "detail", "error"))]
        said = next((text for text in found if isinstance(text, str) and text), said)
    message = said[:_QUOTED] if detail and said else f"the teacher answered with status {status}"
    if not detail and said:
        message = f"{message}: {said[:_QUOTED]}"
    kept = {name: detail.get(name) for name in ("type", "param", "code")}
    return orjson.dumps({"error": {"message": message, **kept, "type": kept["type"] or "upstream_error"}})


def passed_on(headers: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Keep what a teacher's headers tell the client: rate limits, when to try again, who answered where.

    What describes its body, and what we say ourselves (a teacher behind another gateway like this one says it
    too), is left out.
    """
    return [
        (name, value)
        for name, value in forwardable_response(list(headers), whole=False)
        if name not in _OURS and not name.startswith(names.OWN_HEADER_PREFIX)
    ]


def _is_detail(error: object) -> bool:
    return isinstance(error, dict) and isinstance(error.get("message"), str)


def _forwarded(error: UpstreamRefused) -> Refusal:
    if error.status < 400:
        # Followed, it would take the key elsewhere; as 502 it would be asked for again and again.
        return refuse(
            _NEVER_RETRIED,
            f"the teacher answered with a redirect (status {error.status}), which isn't followed: the gateway's "
            "teacher.base_url should name the place it leads to",
            kind="upstream_error",
            code="upstream_redirect",
        )
    return Refusal(error.status, enveloped(error.status, error.body), passed_on(error.headers.items()))
