"""One request to the stand-in, and every way to answer it: well, badly, or not at all.

Failures below HTTP (a reset, bytes that aren't HTTP, a wrong length) need the connection itself, which ASGI
doesn't give: `StandInHttp`, uvicorn's protocol, adds it to the scope.
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, MutableMapping
from typing import Any

import orjson
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from serving.errors import RequestError
from serving.exchange import Json
from serving.failures import Failure

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]

_JSON = b"application/json"
_EVENTS = b"text/event-stream; charset=utf-8"
_GARBAGE = b"<html><body>It works!</body></html>"
_NOISE = b"\x16\x03\x01 this is no HTTP\r\n\r\n"
_TRANSPORT = "stand_in.transport"
_LEFT_OPEN_S = 1.0
"""How long a connection stays open on which more came than was announced."""


class StandInHttp(HttpToolsProtocol):
    """uvicorn's HTTP, with the connection in the scope's extensions."""

    def on_message_begin(self) -> None:
        """Begin a request."""
        super().on_message_begin()
        self.scope["extensions"] = {_TRANSPORT: {"transport": self.transport}}


class ScriptedError(RequestError):
    """An error that was asked for; `retry_after` becomes the header."""

    def __init__(self, status: int, retry_after: str | None) -> None:
        kind = "server_error" if status >= 500 else "invalid_request_error"
        if status == 429:
            kind = "rate_limit_error"
        super().__init__("a scripted failure", status=status, kind=kind, code="scripted")
        self.retry_after = retry_after


class Call:
    """One HTTP request and the ways to answer it."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self._query: bytes = scope["query_string"]
        self._headers: Headers = scope["headers"]
        self._extensions: dict[str, dict[str, asyncio.Transport]] = scope.get("extensions") or {}
        self._receive = receive
        self._send = send

    def header(self, name: bytes) -> bytes | None:
        """Return the first header of this lower-case name."""
        for key, value in self._headers:
            if key == name:
                return value
        return None

    async def body(self) -> bytes:
        """Read the whole body. Raises ConnectionResetError."""
        return b"".join([part async for part in self._parts()])

    async def pause(self, seconds: float) -> None:
        """Wait; raise ConnectionResetError as soon as the client is gone. The body must have been read."""
        if seconds <= 0:
            return
        try:
            message = await asyncio.wait_for(self._receive(), seconds)
        except TimeoutError:
            return
        if message["type"] == "http.disconnect":
            raise ConnectionResetError("the client went away")

    async def answer(self, body: Json, failure: Failure | None = None) -> None:
        """Send JSON, or what `failure` makes of it."""
        raw = orjson.dumps(body)
        if failure is None:
            await self._send_all(200, raw, _JSON)
            return
        if failure.send is not None:
            await self._send_instead(failure.send, raw, _JSON)
            return
        end = _end_of(failure)
        await self._end_at_once(failure)
        await self._start(200, _JSON, [(b"content-length", str(len(raw)).encode())])
        await self._send_slowly(raw if end is None else raw[: len(raw) // 2 if end else 0], failure.drip)
        if end is None:
            await self._send_part(b"", last=True)
        else:
            await self._end_here(failure)

    async def refuse(self, error: RequestError) -> None:
        """Send OpenAI's error envelope."""
        extra: Headers = []
        if isinstance(error, ScriptedError) and error.retry_after is not None:
            extra.append((b"retry-after", error.retry_after.encode()))
        body = {"message": error.message, "type": error.kind, "param": error.param, "code": error.code}
        await self._send_all(error.status, orjson.dumps({"error": body}), _JSON, extra)

    async def stream(
        self, chunks: Iterator[Json], first_s: float, each_s: float, failure: Failure | None
    ) -> None:
        """Send events, one after `first_s` and the others `each_s` apart, or what `failure` makes of them."""
        if failure is not None and failure.send is not None:
            await self._send_instead(failure.send, b"".join(map(_event, chunks)), _EVENTS)
            return
        await self._end_at_once(failure)
        await self.pause(first_s)
        await self._start(200, _EVENTS)
        end = None if failure is None else _end_of(failure)
        for number, chunk in enumerate(chunks):
            if failure is not None and number == end:
                await self._end_here(failure)
                return
            if number:
                await self.pause(each_s)
            await self._send_slowly(_event(chunk), 0.0 if failure is None else failure.drip)
        if failure is not None and end is not None:
            await self._end_here(failure)
        else:
            await self._send_part(b"data: [DONE]\n\n", last=True)

    async def echo(self) -> None:
        """Send the body back as it comes, under its own content type."""
        await self._start(200, self.header(b"content-type") or b"application/octet-stream")
        async for part in self._parts():
            await self._send_part(part)
        await self._send_part(b"", last=True)

    async def echo_events(self) -> None:
        """Send each line of the body as an event."""
        body = await self.body()
        await self._start(200, b"text/event-stream")
        for line in body.splitlines():
            await self._send_part(b"data: " + line + b"\n\n")
        await self._send_part(b"data: [DONE]\n\n", last=True)

    async def describe(self) -> None:
        """Send what arrived as JSON; the key is shown as a digest only."""
        body = await self.body()
        headers = {key.decode("latin-1"): value.decode("latin-1") for key, value in self._headers}
        if "authorization" in headers:
            headers["authorization"] = (
                f"sha256:{hashlib.sha256(headers['authorization'].encode()).hexdigest()}"
            )
        await self.answer(
            {
                "object": "stand_in.request",
                "method": self.method,
                "path": self.path,
                "query": self._query.decode("latin-1"),
                "headers": headers,
                "length": len(body),
                "sha256": hashlib.sha256(body).hexdigest(),
            }
        )

    async def _send_instead(self, kind: str, raw: bytes, content_type: bytes) -> None:
        if kind == "truncated":
            await self._send_all(200, raw[: len(raw) // 2], content_type)
        elif kind == "garbage":
            await self._send_all(200, _GARBAGE, content_type)
        elif kind == "empty":
            await self._send_all(200, b"", content_type)
        elif kind == "noise":
            self._transport().write(_NOISE)
            self._transport().close()
            await self._until_gone()
        else:
            head = b"HTTP/1.1 200 OK\r\ncontent-type: %s\r\ncontent-length: %d\r\n\r\n"
            self._transport().write(head % (content_type, len(raw) // 2) + raw)
            await self.pause(_LEFT_OPEN_S)
            self._transport().close()
            await self._until_gone()

    async def _end_at_once(self, failure: Failure | None) -> None:
        """End before anything was sent, where the failure says so."""
        if failure is not None and (failure.hang_after == 0 or failure.reset_after == 0):
            await self._end_here(failure)

    async def _end_here(self, failure: Failure) -> None:
        """Fall silent, or end the connection. Raises ConnectionResetError when it is gone."""
        if failure.hang_after is not None:
            await self._until_gone()
        if failure.reset_after is not None:
            transport = self._transport()
            # Closed with a linger of no seconds, a socket sends RST.
            transport.get_extra_info("socket").setsockopt(
                socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
            )
            transport.abort()
            await self._until_gone()
        # Otherwise there is no final message, and the server closes the connection.

    async def _until_gone(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        raise ConnectionResetError("the client went away")

    def _transport(self) -> asyncio.Transport:
        if _TRANSPORT not in self._extensions:
            raise RequestError(
                "this failure needs the connection itself: serve the stand-in with StandInHttp", status=400
            )
        return self._extensions[_TRANSPORT]["transport"]

    async def _parts(self) -> AsyncIterator[bytes]:
        more = True
        while more:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise ConnectionResetError("the client went away")
            more = message.get("more_body", False)
            yield message.get("body", b"")

    async def _start(self, status: int, content_type: bytes, extra: Headers | None = None) -> None:
        request_id = self.header(b"x-request-id") or b"req-" + secrets.token_hex(8).encode()
        headers = [(b"content-type", content_type), (b"x-request-id", request_id), *(extra or [])]
        await self._send({"type": "http.response.start", "status": status, "headers": headers})

    async def _send_part(self, part: bytes, *, last: bool = False) -> None:
        await self._send({"type": "http.response.body", "body": part, "more_body": not last})

    async def _send_slowly(self, part: bytes, drip: float) -> None:
        """Send a part of the body at once, or a byte every `drip` seconds."""
        size = 1 if drip else len(part)
        for at in range(0, len(part), max(size, 1)):
            await self._send_part(part[at : at + size])
            await self.pause(drip)

    async def _send_all(
        self, status: int, body: bytes, content_type: bytes, extra: Headers | None = None
    ) -> None:
        length = (b"content-length", str(len(body)).encode())
        await self._start(status, content_type, [length, *(extra or [])])
        await self._send_part(body, last=True)


def _event(chunk: Json) -> bytes:
    return b"data: " + orjson.dumps(chunk) + b"\n\n"


def _end_of(failure: Failure) -> int | None:
    """Say after how many chunks the answer ends, if it does."""
    for count in (failure.hang_after, failure.break_after, failure.reset_after):
        if count is not None:
            return count
    return None
