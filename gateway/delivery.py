"""A whole answer on its way out: head and body in one piece, past what ASGI asks for step by step.

ASGI's two messages have uvicorn look at every field of the head by itself, and write twice. Here the head is looked at
once: nothing that a client or a teacher said may end a line of it. (The names of fields are ours, or were parsed.)
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, RequestResponseCycle

STATE_KEY = "understudy.delivery"
"""The key of a scope's `state` under which gateway/edge.py leaves a request's Delivery."""

_CONTROL = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")


class Delivery:
    """Sends the answer to one request, if it is there as a whole."""

    __slots__ = ("_cycle",)

    def __init__(self, cycle: RequestResponseCycle) -> None:
        self._cycle = cycle

    def send(self, status: int, fields: Iterable[tuple[str, str]], body: bytes) -> bool:
        """Send it, and return True; or do nothing, and return False where it has to go the long way.

        That is where the client is slow to take what it was sent before, has asked for a head alone, or is gone, or
        where a field of the head can't be sent as it is. `fields` say nothing of the connection or the body's length.
        """
        cycle = self._cycle
        if cycle.response_started or cycle.disconnected or cycle.flow.write_paused:
            return False
        if cycle.scope["method"] == "HEAD":
            return False
        try:
            said = [f"{name}: {value}".encode("latin-1") for name, value in fields]
        except UnicodeEncodeError:
            return False
        if _CONTROL.search(b"".join(said)):
            return False
        for name, value in cycle.default_headers:
            said.append(b"%s: %s" % (name, value))
        if not cycle.keep_alive:
            said.append(b"connection: close")
        said.append(b"content-length: %d\r\n\r\n%s" % (len(body), body))
        cycle.response_started = cycle.response_complete = True
        cycle.waiting_for_100_continue = False
        cycle.transport.write(STATUS_LINE[status] + b"\r\n".join(said))
        cycle.message_event.set()
        if not cycle.keep_alive:
            cycle.transport.close()
        cycle.on_response()
        return True
