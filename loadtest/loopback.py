"""A trivial upstream for measuring clients: it answers at once, streams or stalls, and notes who hung up.

    POST /v1/answer                  a small completion, at once
    POST /at-once/chat/completions   the same
    POST /v1/stream                  ten events, at once
    POST /v1/chat/completions        never an answer; with `"stream":true` the head and one chunk, then nothing
    GET  /v1/connections             {"open": int, "hung_up": {x-request-id: seconds on the machine's monotonic clock}}

Run as a process of its own, so that the client under test doesn't share its event loop:
`python -m loadtest.loopback [MODEL]` prints its port and ends when its standard input is closed.
"""

from __future__ import annotations

import asyncio
import sys
import time
from typing import cast

import httptools
import orjson
import uvloop

MODEL = "gpt-4o"
_CHUNK = b'data: {"choices":[{"index":0,"delta":{"content":"a"},"finish_reason":null}]}\n\n'
_STREAM_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
EVENTS = 10
"""How many chunks /v1/stream sends before [DONE]."""


def _whole(body: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%s" % (
        len(body),
        body,
    )


def _framed(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def _completion(model: str) -> bytes:
    return orjson.dumps(
        {
            "id": "chatcmpl-1",
            "object": "chat.completion",
            "created": 1,
            "model": model,
            "choices": [
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": "card_arrival"},
                    "finish_reason": "stop",
                }
            ],
            "usage": {"prompt_tokens": 300, "completion_tokens": 4, "total_tokens": 304},
        }
    )


_STREAM = _STREAM_HEAD + _framed(_CHUNK) * EVENTS + _framed(b"data: [DONE]\n\n") + b"0\r\n\r\n"


class Loopback(asyncio.Protocol):
    """One connection. `answer`, a whole response, `connections` and `hung_up` are shared by all of a server."""

    def __init__(self, answer: bytes, connections: set[Loopback], hung_up: dict[str, float]) -> None:
        self._answer = answer
        self._connections = connections
        self._hung_up = hung_up
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpRequestParser(self)
        self._waiting = ""
        self._reset()

    def _reset(self) -> None:
        self._path = b""
        self._id = ""
        self._body = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Count the connection."""
        # uvloop's transports aren't instances of asyncio's classes.
        self._transport = cast("asyncio.Transport", transport)
        self._connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """Note when the one who waited for an answer hung up."""
        self._connections.discard(self)
        if self._waiting:
            self._hung_up[self._waiting] = time.monotonic()

    def data_received(self, data: bytes) -> None:
        """Parse; the parser calls the methods below."""
        self._parser.feed_data(data)

    def on_url(self, url: bytes) -> None:
        """Take the next piece from the parser."""
        self._path += url

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take the next piece from the parser."""
        if name.lower() == b"x-request-id":
            self._id = value.decode()

    def on_body(self, body: bytes) -> None:
        """Take the next piece from the parser."""
        self._body += body

    def on_message_complete(self) -> None:
        """Answer, or don't."""
        if self._transport is None:
            return
        match self._path:
            case b"/v1/answer" | b"/at-once/chat/completions":
                self._transport.write(self._answer)
            case b"/v1/stream":
                self._transport.write(_STREAM)
            case b"/v1/connections":
                report = {"open": len(self._connections), "hung_up": self._hung_up}
                self._transport.write(_whole(orjson.dumps(report)))
            case _:
                self._waiting = self._id
                if b'"stream":true' in self._body:
                    self._transport.write(_STREAM_HEAD + _framed(_CHUNK))
        self._reset()


async def serve(model: str) -> None:
    """Serve on a free port of the loopback interface until standard input is closed; answers come from `model`."""
    answer = _whole(_completion(model))
    loop = asyncio.get_running_loop()
    connections: set[Loopback] = set()
    hung_up: dict[str, float] = {}
    server = await loop.create_server(
        lambda: Loopback(answer, connections, hung_up), "127.0.0.1", 0, backlog=1024
    )
    sys.stdout.write(f"{server.sockets[0].getsockname()[1]}\n")
    sys.stdout.flush()
    await asyncio.to_thread(sys.stdin.read)
    server.close()


if __name__ == "__main__":
    uvloop.run(serve(*sys.argv[1:] or [MODEL]))
