"""The way out: HTTP/1.1 to one base URL. The only module that imports the HTTP client.

Bytes pass as they are: nothing is decompressed, no redirect is followed, no cookie is kept, no status is an
error. `HTTPS_PROXY`, `HTTP_PROXY`, `ALL_PROXY` and `NO_PROXY` are honoured, as people expect of traffic
that leaves the house; a base URL on the loopback interface never goes through a proxy.
"""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import AsyncIterator, Sequence
from datetime import timedelta
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit, urlunsplit

from pyreqwest.client import Client, ClientBuilder
from pyreqwest.exceptions import (
    BuilderError,
    ConnectError,
    ConnectTimeoutError,
    DetailedPyreqwestError,
    PoolTimeoutError,
    PyreqwestError,
    RequestTimeoutError,
)
from pyreqwest.request import StreamRequest
from pyreqwest.response import Response

from serving.errors import RequestError, UpstreamBroken, UpstreamTimeout

Headers = Sequence[tuple[str, str]]
"""Names and values as they go over the wire; a name may stand several times."""

_WITH_BODY = frozenset({"POST", "PUT", "PATCH"})
"""Methods that say how long their body is even if it is empty: some servers answer 411 otherwise."""


class NothingSent(UpstreamBroken):
    """No connection could be had: the upstream saw nothing, so that sending it again is safe."""


class UpstreamResponse:
    """An answer whose head has arrived. The body is read once, with `read`, `read_chunk` or `chunks`.

    `headers` have lower-case names and keep repeated ones. An async context manager; leaving it (or
    `aclose`) gives the connection back when the body was read to its end, and closes it otherwise, which is
    how the upstream learns that nobody is listening any more.
    """

    def __init__(self, request: StreamRequest, response: Response) -> None:
        self._request = request
        self._response = response
        self._reader = response.body_reader
        self._closed = False
        self.status: int = response.status
        self.headers: list[tuple[str, str]] = list(response.headers.items())

    async def read(self) -> bytes:
        """Read the rest of the body. Raises UpstreamBroken if it ends early, UpstreamTimeout if it stalls."""
        try:
            return (await self._reader.bytes()).to_bytes()
        except PyreqwestError as error:
            raise _translated(error, "in the middle of its answer") from None

    async def read_chunk(self) -> bytes | None:
        """Read what has come in, or None at the end of the body. Raises as `read` does."""
        try:
            chunk = await self._reader.read_chunk()
        except PyreqwestError as error:
            raise _translated(error, "in the middle of its answer") from None
        return None if chunk is None else chunk.to_bytes()

    async def chunks(self) -> AsyncIterator[bytes]:
        """Read the body piece by piece, as it comes in. Raises as `read` does."""
        while (chunk := await self.read_chunk()) is not None:
            yield chunk

    async def aclose(self) -> None:
        """Give the connection back, or close it. May be called again."""
        if not self._closed:
            self._closed = True
            await self._request.__aexit__(None, None, None)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()


class Upstream:
    """A pool of connections to one base URL.

    `timeout_s` bounds every silence: connecting (at most 10 s), waiting for the head of an answer and for
    each piece of its body. `max_connections` bounds the requests under way at once; the others wait for
    their turn.
    """

    def __init__(self, base_url: str, *, timeout_s: float, max_connections: int = 1000) -> None:
        self._base = urlsplit(base_url)
        builder = (
            ClientBuilder()
            .follow_redirects(False)
            .referer(False)
            .gzip(False)
            .brotli(False)
            .zstd(False)
            .deflate(False)
            .http1_only()
            .tcp_nodelay(True)
            .http1_lower_case_headers()
            .user_agent("understudy")
            .connect_timeout(timedelta(seconds=min(timeout_s, 10.0)))
            .read_timeout(timedelta(seconds=timeout_s))
            .max_connections(max_connections)
        )
        if _is_loopback(self._base.hostname or ""):
            builder = builder.no_proxy()
        self._client: Client = builder.build()

    @property
    def place(self) -> str:
        """Host and port, for messages: a base URL may hold credentials."""
        host = self._base.hostname or ""
        return host if self._base.port is None else f"{host}:{self._base.port}"

    def url(self, path: str) -> str:
        """Say where `path` (with its query) lies: below the base URL's own path, whose query is kept."""
        path, _, query = path.partition("?")
        query = "&".join(part for part in (self._base.query, query) if part)
        base = self._base.path.rstrip("/")
        return urlunsplit(self._base._replace(path=base + path, query=query, fragment=""))

    async def request(
        self,
        method: str,
        path: str,
        *,
        headers: Headers,
        body: bytes | AsyncIterator[bytes],
        timeout_s: float | None = None,
    ) -> UpstreamResponse:
        """Send a request and wait for the head of its answer.

        `path` begins with "/" and is appended to the base URL. Cancelling the call closes the connection.
        Raises NothingSent when there is no connection, UpstreamTimeout when there is no head after
        `timeout_s`, UpstreamBroken when the connection ended before it, RequestError when the request can't
        be written as HTTP at all.
        """
        try:
            builder = self._client.request(method, self.url(path)).headers(headers)
            if not isinstance(body, bytes):
                builder = builder.body_stream(body)
            elif body or method in _WITH_BODY:
                builder = builder.body_bytes(body)
            request = builder.build_streamed()
        except (BuilderError, ValueError):
            # The client's own message quotes the header's value, which may be a key.
            raise RequestError(
                "The request can't be passed on: method, path or a header has characters HTTP doesn't allow."
            ) from None
        try:
            if timeout_s is None:
                response = await request.__aenter__()
            else:
                async with asyncio.timeout(timeout_s):
                    response = await request.__aenter__()
        except (ConnectError, ConnectTimeoutError, PoolTimeoutError) as error:
            raise NothingSent(f"the teacher at {self.place} can't be reached: {_cause(error)}") from None
        except PyreqwestError as error:
            raise _translated(error, "before it answered") from None
        except TimeoutError:
            raise UpstreamTimeout(
                f"the teacher at {self.place} didn't answer within {timeout_s:.3g} s"
            ) from None
        return UpstreamResponse(request, response)

    async def aclose(self) -> None:
        """Close every connection."""
        await self._client.close()


def _is_loopback(host: str) -> bool:
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _translated(error: PyreqwestError, when: str) -> UpstreamBroken | UpstreamTimeout:
    if isinstance(error, RequestTimeoutError):
        return UpstreamTimeout(f"the teacher fell silent {when}")
    return UpstreamBroken(f"the connection to the teacher ended {when}: {_cause(error)}")


def _cause(error: PyreqwestError) -> str:
    """Find the innermost cause, which is what a person can act on; it holds neither headers nor bodies."""
    causes = error.details["causes"] if isinstance(error, DetailedPyreqwestError) else None
    return causes[-1]["message"] if causes else error.message
