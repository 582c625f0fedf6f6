r"""Server-sent events: from bytes, however they were cut, to the data of each event.

Follows the WHATWG standard's stream interpretation
(https://html.spec.whatwg.org/multipage/server-sent-events.html) where it matters here: `\n`, `\r\n` and
`\r` end a line, several `data` lines are joined by a newline, comments and unknown fields are skipped. It
is more lenient in one point: data that isn't followed by a blank line when the stream ends counts as an
event, since some providers leave out the last newlines.
"""

from __future__ import annotations

from serving.errors import UpstreamBroken

_BOM = b"\xef\xbb\xbf"


class EventParser:
    """Cuts a byte stream into the data of its events. Any split of the same bytes gives the same events."""

    def __init__(self, *, max_event_bytes: int = 64 * 1024 * 1024) -> None:
        self._max = max_event_bytes
        self._pending: list[bytes] = []
        self._pending_bytes = 0
        self._data: list[bytes] = []
        self._data_bytes = 0
        self._after_cr = False
        self._at_start = True

    def feed(self, piece: bytes) -> list[bytes]:
        """Return the data of every event that `piece` completes.

        Raises UpstreamBroken when an event grows beyond `max_event_bytes`.
        """
        if not piece:
            return []
        if self._after_cr:
            # "\r\n" was cut in the middle: its line has ended already.
            self._after_cr = False
            if piece.startswith(b"\n"):
                piece = piece[1:]
        if b"\n" not in piece and b"\r" not in piece:
            self._keep(piece)
            return []
        if self._pending:
            piece = b"".join([*self._pending, piece])
            self._pending.clear()
            self._pending_bytes = 0
        self._after_cr = piece.endswith(b"\r")
        lines = piece.splitlines()
        if not piece.endswith((b"\n", b"\r")):
            self._keep(lines.pop())
        events: list[bytes] = []
        for line in lines:
            self._line(line, events)
        return events

    def end(self) -> list[bytes]:
        """Return the event that the end of the stream completes, if any."""
        events: list[bytes] = []
        if self._pending:
            line = b"".join(self._pending)
            self._pending.clear()
            self._line(line, events)
        self._dispatch(events)
        return events

    def _keep(self, piece: bytes) -> None:
        if piece:
            self._pending.append(piece)
            self._pending_bytes += len(piece)
            self._check(self._pending_bytes)

    def _line(self, line: bytes, events: list[bytes]) -> None:
        if self._at_start:
            self._at_start = False
            line = line.removeprefix(_BOM)
        if not line:
            self._dispatch(events)
        elif line.startswith(b"data:"):
            value = line[6:] if line.startswith(b"data: ") else line[5:]
            self._data.append(value)
            self._data_bytes += len(value)
            self._check(self._data_bytes)
        elif line == b"data":
            self._data.append(b"")

    def _dispatch(self, events: list[bytes]) -> None:
        if self._data:
            data = self._data[0] if len(self._data) == 1 else b"\n".join(self._data)
            self._data.clear()
            self._data_bytes = 0
            if data:
                events.append(data)

    def _check(self, size: int) -> None:
        if size > self._max:
            raise UpstreamBroken(f"an event of more than {self._max} bytes came in the stream")
