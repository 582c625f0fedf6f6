"""What of a request and of an answer may pass the gateway, and where it goes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from urllib.parse import unquote

from serving.errors import RequestError
from serving.upstream import Headers

_ONE_CONNECTION = frozenset(
    {
        "connection",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    }
)
"""Hop-by-hop headers (RFC 9110 §7.6.1): they speak of one connection and end with it."""

_NOT_UPSTREAM = _ONE_CONNECTION | {"authorization", "cookie", "expect", "forwarded", "host", "x-real-ip"}
_NOT_UPSTREAM_PREFIXES = ("x-understudy-", "x-forwarded-")
_OF_THE_BODY = frozenset(
    {"content-length", "content-encoding", "content-type", "content-md5", "date", "server"}
)
_NOT_IN_COMPLETIONS = _ONE_CONNECTION | _OF_THE_BODY | {"set-cookie", "alt-svc", "x-request-id"}

_STEPS_UP = re.compile(r"(^|[/\\])(\.|%2e){1,2}([/\\]|$)", re.IGNORECASE)
_NOT_IN_A_TARGET = re.compile(r"[\x00-\x20\x7f#\\]")


def forwardable_request(headers: Headers) -> list[tuple[str, str]]:
    """Keep the client's headers (lower-case names) that are meant for the teacher; no credentials."""
    named = _named_by_connection(headers)
    return [
        (name, value)
        for name, value in headers
        if name not in _NOT_UPSTREAM and name not in named and not name.startswith(_NOT_UPSTREAM_PREFIXES)
    ]


def forwardable_response(headers: Headers, *, whole: bool) -> list[tuple[str, str]]:
    """Keep the teacher's headers (lower-case names) that are meant for the client.

    `whole`: the body goes out as it came in, with the headers that describe it. Otherwise the gateway writes
    the body and what describes it, and has a request id of its own.
    """
    dropped = (_ONE_CONNECTION if whole else _NOT_IN_COMPLETIONS) | _named_by_connection(headers)
    return [(name, value) for name, value in headers if name not in dropped]


def leads_below(target: str, prefixes: Sequence[str]) -> bool:
    """Whether a target (path and query) under /v1 leads to one of these paths or below it, however it is encoded."""
    path = unquote(target.partition("?")[0]).removeprefix("/v1/")
    parts = re.split(r"[/\\]", path)
    if "%" in path or not all(parts[:-1]) or {".", ".."} & set(parts):
        return False  # servers disagree on where it leads
    return any(path == prefix or path.startswith(f"{prefix}/") for prefix in prefixes)


def upstream_path(target: str) -> str:
    """Cut "/v1" off the path and query a client sent; the rest is appended to the base URL.

    Raises RequestError (404) for what lies outside /v1, which includes paths that climb out of it: with the
    teacher's key on them they would reach what the operator didn't offer.
    """
    path, _, _ = target.partition("?")
    if not (path.startswith("/v1/") or path == "/v1"):
        raise RequestError(f"There is nothing at {path[:200]!r}: every path begins with /v1.", status=404)
    if _STEPS_UP.search(path) or _NOT_IN_A_TARGET.search(target):
        raise RequestError(f"The path {path[:200]!r} is not a plain path below /v1.", status=404)
    return target[len("/v1") :]


def _named_by_connection(headers: Headers) -> frozenset[str]:
    return frozenset(
        part.strip().lower() for name, value in headers if name == "connection" for part in value.split(",")
    )
