"""The way out: HTTP/1.1 to one base URL. The only module that imports the HTTP client, aiohttp.

Bytes pass as they are: nothing is decompressed, no redirect is followed, no cookie is kept, no status is an
error, no URL is rewritten. `HTTPS_PROXY`, `HTTP_PROXY` and `NO_PROXY` are honoured, as people expect of
traffic that leaves the house; a base URL on the loopback interface never goes through a proxy. Certificates
are checked against the system's roots and certifi's.

Why aiohttp: `python -m loadtest.clients` measures it against the others, and with `--disconnects` shows that
requests that were given up leave nothing behind, which the fastest one (pyreqwest 0.15) fails: it keeps the
connection of a cancelled request until the upstream has answered.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import ipaddress
import os
import ssl
import urllib.request
from collections.abc import AsyncIterator, Callable, Sequence
from types import SimpleNamespace, TracebackType
from typing import Self
from urllib.parse import urlsplit, urlunsplit

import aiohttp
import certifi
from yarl import URL

from serving.errors import RequestError, UpstreamBroken, UpstreamTimeout

Headers = Sequence[tuple[str, str]]
"""Names and values as they go over the wire; a name may stand several times."""

_CONNECT_S = 10.0
_KEEP_ALIVE_S = 60.0
_LONGEST_HEADER = 64 * 1024
_AT_ONCE = 1024 * 1024
MOST_ANSWER_BYTES = 64 * 1024 * 1024
"""An answer that is read whole may be this long: no model writes so much, a broken upstream may."""


class NothingSent(UpstreamBroken):
    """No connection could be had: the upstream saw nothing, so that sending it again is safe."""


class StaleConnection(UpstreamBroken):
    """A kept connection ended before any byte of an answer: nearly always it had been closed while idle."""


class UpstreamResponse:
    """An answer whose head has arrived. The body is read once, with `read`, `read_chunk` or `chunks`.

    `headers` have lower-case names and keep repeated ones. An async context manager; leaving it (or
    `aclose`) gives the connection back when the body has come to its end, and closes it otherwise, which is
    how the upstream learns that nobody is listening any more. `brought_something`: some of the body has come.
    """

    def __init__(self, response: aiohttp.ClientResponse, who: str = "the teacher") -> None:
        self._response = response
        self._who = who
        self.brought_something = False
        self._when_closed: list[Callable[[], None]] = []
        self.status: int = response.status
        self.headers: list[tuple[str, str]] = [
            (name.decode("latin-1").lower(), value.decode("latin-1")) for name, value in response.raw_headers
        ]

    def header(self, name: str) -> str:
        """The first header of that (lower-case) name; empty if there is none."""
        return next((value for key, value in self.headers if key == name), "")

    async def read(self) -> bytes:
        """Read the rest of the body.

        Raises UpstreamBroken if it ends early or is longer than any answer, UpstreamTimeout if it stalls.
        """
        pieces = []
        size = 0
        while (piece := await self.read_chunk()) is not None:
            pieces.append(piece)
            size += len(piece)
            if size > MOST_ANSWER_BYTES:
                raise UpstreamBroken(f"{self._who}'s answer is longer than {MOST_ANSWER_BYTES} bytes")
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    async def read_chunk(self) -> bytes | None:
        """Read what has come in, or None at the end of the body. Raises as `read` does."""
        try:
            piece = await self._response.content.readany() or None
        except (aiohttp.ClientError, OSError) as error:
            raise _translated(error, self._who, "in the middle of its answer") from None
        self.brought_something = self.brought_something or piece is not None
        return piece

    async def chunks(self) -> AsyncIterator[bytes]:
        """Read the body piece by piece, as it comes in. Raises as `read` does."""
        while (chunk := await self.read_chunk()) is not None:
            yield chunk

    def when_closed(self, tell: Callable[[], None]) -> None:
        """Have `tell` called once the connection is given back or closed."""
        self._when_closed.append(tell)

    async def aclose(self) -> None:
        """Give the connection back, or close it. May be called again."""
        self._response.close()
        told, self._when_closed = self._when_closed, []
        for tell in told:
            tell()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()


class Upstream:
    """A pool of connections to one base URL.

    `timeout_s` bounds every silence: connecting (at most 10 s), waiting for the head of an answer and for
    each piece of its body. `max_connections` bounds the requests under way at once (0: not at all); the others wait for
    their turn. `who` is there, for messages. Belongs to the event loop of its first request.
    """

    def __init__(
        self, base_url: str, *, timeout_s: float, max_connections: int = 1000, who: str = "the teacher"
    ) -> None:
        self._who = who
        self._base = urlsplit(base_url)
        self._root = urlunsplit(self._base._replace(path=self._base.path.rstrip("/"), query="", fragment=""))
        self._query = self._base.query
        self._timeout_s = timeout_s
        self._silences = _silences(timeout_s)
        self._max_connections = max_connections
        self._proxy = _proxy_of(self._base.scheme, self._base.hostname or "")
        self._session: aiohttp.ClientSession | None = None

    @property
    def place(self) -> str:
        """Host and port, for messages: a base URL may hold credentials."""
        host = self._base.hostname or ""
        return host if self._base.port is None else f"{host}:{self._base.port}"

    @property
    def proxied(self) -> bool:
        """Whether a proxy of the environment stands between."""
        return self._proxy is not None

    def url(self, path: str) -> str:
        """Say where `path` (with its query) lies: below the base URL's own path, whose query is kept."""
        if not self._query:
            return self._root + path
        path, mark, query = path.partition("?")
        return f"{self._root}{path}?{self._query}{mark and '&'}{query}"

    async def request(
        self,
        method: str,
        path: str,
        *,
        headers: Headers,
        body: bytes | AsyncIterator[bytes],
        timeout_s: float | None = None,
        silence_s: float | None = None,
    ) -> UpstreamResponse:
        """Send a request and wait for the head of its answer.

        `path` begins with "/" and is appended to the base URL. `silence_s` bounds the silences of this request in
        place of what does for all. Cancelling the call closes the connection. Raises NothingSent when there is no
        connection, StaleConnection when a kept one had ended, UpstreamTimeout when there is no head after `timeout_s`,
        UpstreamBroken when the connection ended before it, RequestError when the request can't be written as HTTP at
        all.
        """
        session = self._session or self._open()
        reused = SimpleNamespace(connection=False)
        try:
            async with asyncio.timeout(timeout_s) if timeout_s is not None else contextlib.nullcontext():
                response = await session.request(
                    method,
                    URL(self.url(path), encoded=True),
                    headers=headers,
                    data=_in_pieces(body),
                    allow_redirects=False,
                    proxy=self._proxy,
                    trace_request_ctx=reused,
                    timeout=self._silences if silence_s is None else _silences(silence_s),
                )
        except aiohttp.ClientConnectorError as error:
            raise NothingSent(f"{self._who} at {self.place} can't be reached: {_cause(error)}") from None
        except aiohttp.ConnectionTimeoutError:
            raise NothingSent(
                f"{self._who} at {self.place} can't be reached: no connection in time"
            ) from None
        except (aiohttp.InvalidURL, ValueError):
            # The client's own message may quote a header's value, which may be a key.
            raise RequestError(
                "The request can't be passed on: method, path or a header has characters HTTP doesn't allow."
            ) from None
        except (aiohttp.ServerDisconnectedError, ConnectionError) as error:
            if reused.connection:
                raise StaleConnection(f"{self._who} had closed a kept connection") from None
            raise _translated(error, self._who, "before it answered") from None
        except TimeoutError:
            waited = next(s for s in (timeout_s, silence_s, self._timeout_s) if s is not None)
            raise UpstreamTimeout(
                f"{self._who} at {self.place} didn't answer within {waited:.3g} s"
            ) from None
        except (aiohttp.ClientError, OSError) as error:
            raise _translated(error, self._who, "before it answered") from None
        return UpstreamResponse(response, self._who)

    async def aclose(self) -> None:
        """Close every connection."""
        if self._session is not None:
            await self._session.close()

    def _open(self) -> aiohttp.ClientSession:
        """Make the pool: at the first request, since it binds to the running event loop."""
        trace = aiohttp.TraceConfig()
        trace.on_connection_reuseconn.append(_note_reuse)
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                limit=self._max_connections,
                keepalive_timeout=_KEEP_ALIVE_S,
                ttl_dns_cache=60,
                ssl=_certificates() if self._base.scheme == "https" else True,
            ),
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
            skip_auto_headers=("accept-encoding", "content-type"),
            headers={"user-agent": "understudy"},
            trace_configs=[trace],
            max_line_size=_LONGEST_HEADER,
            max_field_size=_LONGEST_HEADER,
        )
        return self._session


def _silences(seconds: float) -> aiohttp.ClientTimeout:
    return aiohttp.ClientTimeout(total=None, sock_connect=min(seconds, _CONNECT_S), sock_read=seconds)


def _in_pieces(body: bytes | AsyncIterator[bytes]) -> AsyncIterator[bytes] | io.BytesIO | bytes | None:
    """Have a large body written piece by piece: aiohttp would hold up the other requests, and warns of it."""
    if isinstance(body, bytes) and len(body) > _AT_ONCE:
        return io.BytesIO(body)
    return body or None


async def _note_reuse(
    _: aiohttp.ClientSession, trace: SimpleNamespace, __: aiohttp.TraceConnectionReuseconnParams
) -> None:
    trace.trace_request_ctx.connection = True


def _certificates() -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.load_verify_locations(certifi.where())
    return context


def _proxy_of(scheme: str, host: str) -> str | None:
    """Find the environment's proxy for a host. aiohttp's own way would read passwords from ~/.netrc too."""
    if _is_loopback(host) or urllib.request.proxy_bypass(host):
        return None
    proxies = urllib.request.getproxies()
    return proxies.get(scheme) or proxies.get("all")


def _is_loopback(host: str) -> bool:
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _translated(error: Exception, who: str, when: str) -> UpstreamBroken | UpstreamTimeout:
    if isinstance(error, TimeoutError):
        return UpstreamTimeout(f"{who} fell silent {when}")
    return UpstreamBroken(f"the connection to {who} ended {when}: {_cause(error)}")


def _cause(error: Exception) -> str:
    """Say what a person can act on. The client's own messages are left out: they may quote what was sent."""
    if isinstance(error, aiohttp.ClientConnectorCertificateError | aiohttp.ClientSSLError):
        return "its certificate isn't trusted or TLS failed"
    if isinstance(error, OSError) and error.errno is not None and error.errno > 0:
        return os.strerror(error.errno).lower()
    return type(error).__name__
