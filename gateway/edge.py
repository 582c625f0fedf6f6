"""The edge to the network: uvicorn's HTTP/1.1 with bounds on what a connection may cost, and an orderly end.

What uvicorn's parser (httptools, on llhttp) refuses by itself: anything whose length is ambiguous (both
Content-Length and Transfer-Encoding, several lengths, chunk sizes that aren't hexadecimal), white space before
a colon, line feeds without a carriage return. What is added here:

- the head of a request is bounded in bytes, in number of fields and in time; a body has to come on (408), and an
  answer to be taken;
- the trailer fields of a chunked body are dropped, not mixed with the headers that were judged already;
- a request that is refused before it is whole gets its answer: closing at once would have the system reset
  the connection, and the client would see that instead of a 413 or 401;
- a gateway that stops answers what comes on kept connections, with `connection: close`, and closes idle ones
  only when they have been idle for longer than clients keep them.

Every refusal is OpenAI's error envelope.
"""

from __future__ import annotations

import asyncio
import enum
from typing import Any

import httptools
import uvicorn
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol
from uvicorn.server import ServerState

from gateway import delivery, departure, names
from gateway.client import request_id_of
from gateway.delivery import Delivery
from gateway.departure import Departure
from gateway.envelope import refuse

HEAD_BYTES = 64 * 1024
MOST_HEADERS = 200
SLOWEST_BYTES_S = 1024
KEEP_ALIVE_S = 75
"""Longer than clients (5 s in httpx) and load balancers (60 s) keep an idle connection: they close it, not we."""
_DRAINING_KEEP_ALIVE_S = 5
_LINGER_S = 10.0
"""How long a client may go on sending after it was refused, before the connection is closed all the same."""
_SILENT_S = 2.0
"""How long it may send nothing."""


class _Stage(enum.Enum):
    """What of a request has come in."""

    BETWEEN = enum.auto()
    HEAD = enum.auto()
    BODY = enum.auto()
    IGNORED = enum.auto()
    """What comes in isn't read any more; the connection closes soon."""


class Door(ServerState):
    """What all connections of a server share.

    `receive_timeout_s`: how long the head of a request may take, and how long its body may dawdle. For twice as long
    a client may take nothing of its answer.
    """

    def __init__(self, *, receive_timeout_s: float) -> None:
        super().__init__()
        self.receive_timeout_s = receive_timeout_s
        self.draining = False


class _Dropped(list[tuple[bytes, bytes]]):
    """Takes trailer fields and keeps none."""

    def append(self, _: tuple[bytes, bytes]) -> None:
        """Keep nothing."""


class _Refused(Exception):
    """Stops the parser."""


class Edge(HttpToolsProtocol):
    """One connection."""

    def __init__(
        self,
        config: uvicorn.Config,
        server_state: Door,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._door = server_state
        self._stage = _Stage.BETWEEN
        self._piece = 0
        self._fed = 0
        """Bytes that came in since the last thing that came of them."""
        self._brought = 0
        """Bytes of the body since the last look at it."""
        self._held_up = False
        self._watch: asyncio.TimerHandle | None = None
        self._watched = _Stage.BETWEEN
        self._why: tuple[int, str, str] | None = None
        self._idle_since = self.loop.time()
        self._closes_at = 0.0
        self._untaken = 0
        """Bytes of an answer that the client was to take when that was last looked at."""
        self._taking: asyncio.TimerHandle | None = None

    # What the event loop calls

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin; a connection on which nothing comes is closed like one that is kept."""
        super().connection_made(transport)
        if self._door.draining:
            self.timeout_keep_alive = _DRAINING_KEEP_ALIVE_S
        self._keep()

    def data_received(self, data: bytes) -> None:
        """Feed the parser, then see whether the request comes on as it should."""
        if self._ignoring():
            self._fed += len(data)
            return
        self._piece = len(data)
        self._fed += self._piece
        self._feed(data)
        if self._stage is _Stage.BETWEEN:
            if self._watch is not None:
                self._rewatch()
            if self.timeout_keep_alive_task is None and not self._answering():
                self._keep()  # what came was no request: empty lines
            return
        if self._ignoring() or self.transport.is_closing():
            return
        if self._fed > HEAD_BYTES + self._piece:
            self._turn_away(*_TOO_LARGE)
            return
        if self._stage is _Stage.BODY and self.cycle.transport is self.transport:
            self.cycle.transport = _Lingering(self)  # type: ignore[assignment]
        if self._watched is not self._stage:
            self._rewatch()

    def connection_lost(self, exc: Exception | None) -> None:
        """End."""
        if self._answering():
            self.cycle.scope["state"][departure.STATE_KEY].happens()
        self._stage = _Stage.IGNORED
        self._rewatch()
        self._unset_keepalive_if_required()
        super().connection_lost(exc)
        if self._taking is not None:
            self._taking.cancel()

    def pause_writing(self) -> None:
        """Watch a client that is slow to take its answer."""
        super().pause_writing()
        self._watch_taking()

    def resume_writing(self) -> None:
        """Go on writing."""
        super().resume_writing()
        if self._taking is not None:
            self._taking.cancel()
            self._taking = None

    # What the parser calls

    def on_message_begin(self) -> None:
        """Note that a request begins."""
        super().on_message_begin()
        self.scope["state"][departure.STATE_KEY] = Departure()
        self._stage = _Stage.HEAD
        self._fed = self._piece

    def on_headers_complete(self) -> None:
        """Refuse a head that is too large; else let the request be served while its body comes in."""
        if self.parser.should_upgrade():
            return  # `_feed` is told once this is over
        if len(self.headers) > MOST_HEADERS or (
            self._fed > HEAD_BYTES
            and len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers) > HEAD_BYTES
        ):
            self._why = _TOO_LARGE
            raise _Refused
        super().on_headers_complete()
        self._stage = _Stage.BODY
        self._fed = 0
        self.headers = _Dropped()
        self.cycle.scope["state"][delivery.STATE_KEY] = Delivery(self.cycle)
        if self._door.draining:
            self.cycle.keep_alive = False

    def on_body(self, body: bytes) -> None:
        """Count what comes, and pass it on."""
        self._fed = 0
        self._brought += len(body)
        super().on_body(body)
        self._held_up = self._held_up or self.flow.read_paused

    def on_message_complete(self) -> None:
        """Note that the request is whole."""
        if self._stage is _Stage.HEAD:
            return  # an offer to upgrade, which the parser takes for the end of the request
        super().on_message_complete()
        if not self.pipeline:
            self.flow.resume_reading()  # else nobody would see the client go
        self._stage = _Stage.BETWEEN
        self._fed = 0

    def on_response_complete(self) -> None:
        """Note since when the connection is idle."""
        super().on_response_complete()
        self._idle_since = self.loop.time()

    # What the server calls

    def shutdown(self) -> None:
        """Begin to end: the connection takes one more request at most, or none if it stays idle."""
        self.timeout_keep_alive = _DRAINING_KEEP_ALIVE_S
        if self._answering():
            if not self.cycle.response_started:
                self.cycle.keep_alive = False
        elif self._stage is _Stage.BETWEEN and not self.transport.is_closing():
            self._keep(self._idle_since + self.timeout_keep_alive - self.loop.time())

    # Refusing

    def send_400_response(self, msg: str) -> None:
        """Refuse what can't be parsed, or what a callback of the parser wouldn't have."""
        self._turn_away(
            *(self._why or (400, f"this isn't HTTP/1.1 as it should be: {msg}", "invalid_http_request"))
        )

    def receiving(self) -> bool:
        """Say whether a body is still coming in."""
        return self._stage is _Stage.BODY

    def linger(self) -> None:
        """Close for writing, and read on for a while (as nginx's lingering_close does).

        Closed with bytes unread a connection is reset, and a client that is still sending would see that, and
        try again, instead of its answer.
        """
        if self._stage is _Stage.IGNORED or self.transport.is_closing():
            return
        self._stage = _Stage.IGNORED
        self._rewatch()
        self._unset_keepalive_if_required()
        self.flow.resume_reading()
        self.transport.write_eof()
        self._closes_at = self.loop.time() + _LINGER_S
        self._leave_if_silent()

    def _leave_if_silent(self) -> None:
        self._fed = 0
        self._watch = self.loop.call_later(_SILENT_S, self._leave)

    def _leave(self) -> None:
        """Close, unless the client is sending still and has time left."""
        if self._fed and self.loop.time() < self._closes_at:
            self._leave_if_silent()
        else:
            self.transport.close()

    def _turn_away(self, status: int, message: str, code: str) -> None:
        """Answer with an error if this connection's next answer is this request's, and close."""
        ours = self._stage is _Stage.BODY
        if ours and (self.cycle.response_started or self.pipeline):
            self.transport.close()
            return
        if not ours and self._answering():
            # An earlier request is being answered: nothing may come between, and nothing after it.
            self.cycle.keep_alive = False
            self._stage = _Stage.IGNORED
            self._rewatch()
            return
        if ours:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        body = refuse(status, message, kind="invalid_request_error", code=code).body
        head = (
            "content-type: application/json\r\n"
            f"content-length: {len(body)}\r\n"
            f"{names.REQUEST_ID_HEADER}: {request_id_of(None)}\r\n"
            "connection: close\r\n\r\n"
        )
        self.transport.write(STATUS_LINE[status] + head.encode() + body)
        self.linger()

    # Parsing

    def _feed(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as offer:
            self._decline(data[offer.args[0] :])
        except httptools.HttpParserCallbackError:
            self.send_400_response("its method, target or headers can't be read")
        except httptools.HttpParserError as error:
            self.send_400_response(str(error))

    def _decline(self, rest: bytes) -> None:
        """Go on as if no other protocol had been offered.

        Java's HttpClient offers HTTP/2 with every request. The parser believes that all that follows is in
        the new protocol, the body included: another one reads the request again, without the offer.
        """
        method = self.parser.get_method()
        if method == b"CONNECT":
            self.send_400_response("this is no proxy")
            return
        kept = [header for header in self.headers if header[0] not in _OFFER]
        head = b"".join(b"%s: %s\r\n" % header for header in kept)
        version = self.parser.get_http_version().encode()
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
        self._feed(b"%s %s HTTP/%s\r\n%s\r\n" % (method, self.url, version, head) + rest)

    # Watching

    def _ignoring(self) -> bool:
        return self._stage is _Stage.IGNORED

    def _answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _keep(self, seconds: float | None = None) -> None:
        """Close the connection if it stays idle for so long."""
        self._unset_keepalive_if_required()
        delay = self.timeout_keep_alive if seconds is None else max(0.0, seconds)
        self.timeout_keep_alive_task = self.loop.call_later(delay, self.timeout_keep_alive_handler)

    def _rewatch(self) -> None:
        """Watch the stage there is now; nothing, if the request is whole."""
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None
        self._watched = self._stage
        self._brought = 0
        self._held_up = False
        if self._stage in (_Stage.HEAD, _Stage.BODY):
            self._watch = self.loop.call_later(self._door.receive_timeout_s, self._look)

    def _look(self) -> None:
        """End a request that doesn't come on. Where we didn't read, the client isn't the slow one."""
        allowed_s = self._door.receive_timeout_s
        paused = self.flow.read_paused
        if self._stage is _Stage.HEAD:
            slow = not self._answering()
            message = (
                f"the head of the request wasn't complete after {allowed_s:g} s (server.receive_timeout_s)"
            )
        else:
            slow = not (paused or self._held_up) and self._brought < SLOWEST_BYTES_S * allowed_s
            message = (
                f"the body of the request came too slowly: {self._brought} bytes in {allowed_s:g} s "
                f"(server.receive_timeout_s; at least {SLOWEST_BYTES_S} bytes a second)"
            )
        if slow:
            self._turn_away(408, message, "request_timeout")
            return
        self._rewatch()
        self._held_up = paused

    def _watch_taking(self) -> None:
        self._untaken = self.transport.get_write_buffer_size()
        self._taking = self.loop.call_later(2 * self._door.receive_timeout_s, self._look_at_taking)

    def _look_at_taking(self) -> None:
        """End a connection whose client takes nothing: it would hold memory and its place at the teacher for ever."""
        if self.transport.get_write_buffer_size() < self._untaken:
            self._watch_taking()
        else:
            self.transport.abort()


class _Lingering:
    """The way out of a connection whose request isn't whole yet: it lingers when it is closed."""

    def __init__(self, edge: Edge) -> None:
        self._edge = edge

    def write(self, data: bytes) -> None:
        """Write."""
        self._edge.transport.write(data)

    def is_closing(self) -> bool:
        """Say whether the connection is on its way out."""
        return self._edge.transport.is_closing()

    def close(self) -> None:
        """Close, in a way that lets the client read its answer first."""
        if self._edge.receiving():
            self._edge.linger()
        else:
            self._edge.transport.close()


_OFFER = frozenset({b"upgrade", b"connection", b"http2-settings"})
_TOO_LARGE = (
    431,
    f"the head of the request is too large: this gateway takes {HEAD_BYTES} bytes and {MOST_HEADERS} fields",
    "headers_too_large",
)
