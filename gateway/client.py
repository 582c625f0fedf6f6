"""The client's end of one HTTP request: reading its body, answering, and noticing that it has gone away."""

from __future__ import annotations

import asyncio
import random
import re
import time
from collections.abc import AsyncIterator, Iterable
from types import TracebackType

from starlette.types import Message, Receive, Scope, Send

from gateway import delivery, departure, names
from gateway.delivery import Delivery
from gateway.departure import Departure
from gateway.envelope import Refusal
from gateway.reply import JSON_TYPE, Reply
from gateway.turn import Turn
from serving.chat import sse
from serving.errors import RequestError

_DROPPED_AT_MOST = 1024 * 1024
_SAFE_ID = re.compile(r"[\x21-\x7e]{1,128}")


class ClientGone(Exception):
    """The client closed its connection before its request was whole."""


class Client:
    """One request over ASGI. `headers` have lower-case names; `request_id` is the client's or a new one.

    What is known of it when it is over: `status` (what was sent), `gone`, `turn` (of a chat request that was
    read) and `failure` (why it came to nothing, where the status can't say it).
    """

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.method: str = scope["method"]
        self.target = _target(scope)
        self.headers: list[tuple[str, str]] = [
            (name.decode("latin-1"), value.decode("latin-1")) for name, value in scope["headers"]
        ]
        self._first = dict(reversed(self.headers))
        self.request_id = request_id_of(self.header(names.REQUEST_ID_HEADER))
        self.began = time.perf_counter()
        self.status: int | None = None
        self.gone = False
        self.turn: Turn | None = None
        self.failure: str | None = None
        state = scope.get("state", {})
        self.departure: Departure | None = state.get(departure.STATE_KEY)
        # Taken out: it knows whose scope this is, and a circle, with all in it, waits for the garbage collector.
        self._delivery: Delivery | None = state.pop(delivery.STATE_KEY, None)
        self._head: list[tuple[bytes, bytes]] = []
        self._receive = receive
        self._send = send
        self._body_read = asyncio.Event()
        self._over = False

    @property
    def started(self) -> bool:
        """Whether the head of an answer was sent."""
        return self.status is not None

    def has_turn(self, turn: Turn) -> None:
        """Remember the turn that this request became."""
        self.turn = turn

    def header(self, name: str) -> str | None:
        """Return the first value of a header, by its lower-case name."""
        return self._first.get(name)

    def declared_bytes(self) -> int | None:
        """Return the length the client announced for its body, if it did."""
        declared = self.header("content-length")
        return int(declared) if declared is not None and declared.isdecimal() else None

    def has_body(self) -> bool:
        """Say whether the request announces a body."""
        return bool(self.declared_bytes()) or self.header("transfer-encoding") is not None

    def held_bytes(self, limit: int) -> int:
        """Return how many bytes its body may take, of `limit` at most; one of unknown length takes them all."""
        declared = self.declared_bytes()
        if declared is None:
            return limit if self.has_body() else 0
        return min(declared, limit)

    async def read(self, limit: int) -> bytes:
        """Return the body. Raises RequestError (413) beyond `limit` bytes, ClientGone if it ends early."""
        if (self.declared_bytes() or 0) > limit:
            raise too_large(limit, "server.max_body_bytes")
        size = 0
        read: list[bytes] = []
        while not self._body_read.is_set():
            piece = await self._next_piece()
            size += len(piece)
            if size > limit:
                raise too_large(limit, "server.max_body_bytes")
            read.append(piece)
        return b"".join(read)

    async def pieces(self) -> AsyncIterator[bytes]:
        """Give the body as it comes in. Raises ClientGone when it ends early."""
        while not self._body_read.is_set():
            piece = await self._next_piece()
            if piece:
                yield piece

    async def _next_piece(self) -> bytes:
        message = await self._receive()
        if message["type"] == "http.disconnect":
            self.gone = True
            raise ClientGone
        if not message.get("more_body", False):
            self._body_read.set()
        piece: bytes = message.get("body", b"")
        return piece

    def watched(self) -> Watched:
        """Cancel what is done inside once the client is gone, then leave quietly (`gone` says so)."""
        return Watched(self)

    def left(self) -> bool:
        """Say whether the client went away while an answer was made for it, and note it if so."""
        # One that goes before its request is whole is noticed by whoever reads that.
        self.gone = self.gone or (self._body_read.is_set() and not self._over)
        return self.gone

    async def until_left(self) -> None:
        """Return when ASGI says that the client has gone, or has its answer."""
        await self._body_read.wait()
        while (await self._receive())["type"] != "http.disconnect":
            pass

    async def answer(self, reply: Reply) -> None:
        """Send a reply whole, or frame by frame as its frames come."""
        if reply.frames is None:
            body = reply.body or b""
            if not self._delivered(reply.status, reply.headers, body):
                await self.whole(reply.status, reply.headers, body)
            return
        await self.start(reply.status, reply.headers)
        async for frame in reply.frames:
            await self.piece(frame)
        await self.end()

    def _delivered(self, status: int, headers: list[tuple[str, str]], body: bytes) -> bool:
        """Send a whole answer in one piece, if that can be done."""
        if self._delivery is None:  # not our own connection (gateway/edge.py)
            return False
        fields = [*headers, (names.REQUEST_ID_HEADER, self.request_id)]
        if not self._delivery.send(status, fields, body):
            return False
        self.status = status
        self._over = True
        return True

    async def refuse(self, refusal: Refusal, headers: Iterable[tuple[str, str]] = ()) -> None:
        """Send an error; if the request isn't whole, its connection closes (gateway/edge.py sees to how)."""
        whole = not self.has_body() or self._body_read.is_set()
        await self._refuse(refusal, headers if whole else [*headers, ("connection", "close")])

    async def break_off(self, refusal: Refusal) -> None:
        """End an answer that won't be finished: an error, or in a stream of events an error frame.

        Any other answer that has begun just isn't ended, so that the server closes the connection.
        """
        if not self.started:
            await self._refuse(refusal, [("connection", "close")])
        elif not self._over and any(
            name == b"content-type" and value.startswith(b"text/event-stream") for name, value in self._head
        ):
            await self.piece(sse(refusal.body))

    async def turn_away(self, refusal: Refusal) -> None:
        """Send an error without having read the body.

        What still comes of a small one is dropped, and the connection kept: a client that is closed on while
        it sends may never see why. One that is long, or doesn't say, isn't worth that.
        """
        declared = self.declared_bytes() if self.has_body() else 0
        close = declared is None or declared > _DROPPED_AT_MOST
        await self._refuse(refusal, [("connection", "close")] if close else [])

    async def _refuse(self, refusal: Refusal, headers: Iterable[tuple[str, str]]) -> None:
        await self.whole(refusal.status, [JSON_TYPE, *refusal.headers, *headers], refusal.body)

    async def whole(self, status: int, headers: Iterable[tuple[str, str]], body: bytes) -> None:
        """Send a whole answer."""
        await self.start(status, [*headers, ("content-length", str(len(body)))])
        self._over = True
        await self._send({"type": "http.response.body", "body": body})

    async def start(self, status: int, headers: Iterable[tuple[str, str]]) -> None:
        """Send the head of an answer; the request's id is added."""
        self.status = status
        encoded = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers]
        encoded.append((names.REQUEST_ID_HEADER.encode(), self.request_id.encode()))
        self._head = encoded
        head: Message = {"type": "http.response.start", "status": status, "headers": encoded}
        await self._send(head)

    async def piece(self, data: bytes) -> None:
        """Send a part of the body."""
        await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def end(self) -> None:
        """Send the end of the body."""
        self._over = True
        await self._send({"type": "http.response.body", "body": b""})


class Watched:
    """While its context lasts, a client that goes away has the current task cancelled."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._task: asyncio.Task[object]
        self._asking: asyncio.Task[None] | None = None

    def __enter__(self) -> None:
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("a client is watched from inside a task")
        self._task = task
        if self._client.departure is not None:
            self._client.departure.then(self._leave)
        else:  # not our own connection (gateway/edge.py)
            self._asking = asyncio.create_task(self._ask())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if self._asking is not None:
            self._asking.cancel()
        elif self._client.departure is not None:
            self._client.departure.then(None)
        if kind is None or not issubclass(kind, asyncio.CancelledError) or not self._client.gone:
            return False
        self._task.uncancel()
        return True

    async def _ask(self) -> None:
        await self._client.until_left()
        self._leave()

    def _leave(self) -> None:
        if self._client.left():
            self._task.cancel()


def request_id_of(given: str | None) -> str:
    """Return the client's own id if it may be repeated (printable ASCII, at most 128), else a new one."""
    if given is not None and _SAFE_ID.fullmatch(given):
        return given
    return f"req_{random.getrandbits(96):024x}"


def _target(scope: Scope) -> str:
    path: bytes = scope.get("raw_path") or scope["path"].encode()
    query: bytes = scope.get("query_string", b"")
    target = path.decode("latin-1")
    return f"{target}?{query.decode('latin-1')}" if query else target


def too_large(limit: int, setting: str) -> RequestError:
    """Refuse a body of more than `limit` bytes, which `setting` allows."""
    return RequestError(
        f"the request body is larger than the {limit} bytes this gateway takes ({setting})",
        status=413,
        code="request_too_large",
    )
