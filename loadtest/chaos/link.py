"""A TCP link that can go bad: it stands between the gateway and what it depends on.

What lies behind it stays as it is, so that a fault begins and ends within a millisecond, and what is broken
is the network and nothing else.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Literal

Fault = Literal["slow", "silent", "refused", "garbage", "cut"]

_End = tuple[asyncio.StreamReader, asyncio.StreamWriter]

_PIECE = 16 * 1024


class Link:
    """One link, listening on port `listening`. `fault` may be set at any time; None: all is well.

    `slow`: each answer is `delay_s` late. `silent`: connections are accepted, nothing ever comes back.
    `refused`: connections are reset. `garbage`: every eighth byte of the answers is another. `cut`: an answer ends
    after its first `cut_after` bytes.
    """

    def __init__(self, host: str, port: int) -> None:
        self.listening = 0
        self.fault: Fault | None = None
        self.delay_s = 0.2
        self.cut_after = 400
        self._host = host
        self._port = port
        self._writers: set[asyncio.StreamWriter] = set()
        self._carried: set[asyncio.Task[None]] = set()

    async def break_connections(self) -> None:
        """Reset every connection there is, as a restart of what lies behind the link does."""
        for writer in list(self._writers):
            writer.transport.abort()
        await asyncio.sleep(0)

    def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Take on a connection."""
        self._writers.add(writer)
        task = asyncio.create_task(self._connection(reader, writer))
        self._carried.add(task)
        task.add_done_callback(self._carried.discard)

    async def aclose(self) -> None:
        """End every connection."""
        for task in list(self._carried):
            task.cancel()
        await asyncio.gather(*self._carried, return_exceptions=True)
        # What was cancelled before it began, or couldn't say all it had.
        await self.break_connections()

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        ends = [writer]
        try:
            if self.fault == "refused":
                writer.transport.abort()
                return
            try:
                far_reader, far_writer = await asyncio.open_connection(self._host, self._port)
            except OSError:
                writer.transport.abort()
                return
            ends.append(far_writer)
            self._writers.add(far_writer)
            await self._carry_both((reader, writer), (far_reader, far_writer))
        finally:
            for end in ends:
                end.close()
            for end in ends:
                with contextlib.suppress(OSError):
                    await end.wait_closed()
                self._writers.discard(end)

    async def _carry_both(self, near: _End, far: _End) -> None:
        """Carry bytes both ways until one end is done."""
        ways = (
            asyncio.create_task(self._carry(near[0], far[1], answers=False)),
            asyncio.create_task(self._carry(far[0], near[1], answers=True)),
        )
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)

    async def _carry(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, answers: bool
    ) -> None:
        carried = 0
        with contextlib.suppress(ConnectionError):
            while piece := await reader.read(_PIECE):
                if self.fault == "refused":
                    writer.transport.abort()
                    return
                if self.fault == "silent":
                    continue
                if answers and self.fault == "slow":
                    await asyncio.sleep(self.delay_s)
                if answers and self.fault == "garbage":
                    piece = _garbled(piece)
                cut = answers and self.fault == "cut" and carried + len(piece) >= self.cut_after
                if cut:
                    piece = piece[: max(0, self.cut_after - carried)]
                carried += len(piece)
                writer.write(piece)
                await writer.drain()
                if cut:
                    writer.close()
                    return


@contextlib.asynccontextmanager
async def linked(host: str, port: int) -> AsyncIterator[Link]:
    """Open a link to `host:port` on a free port of the loopback interface while the context lasts."""
    link = Link(host, port)
    server = await asyncio.start_server(link.accept, "127.0.0.1", 0)
    link.listening = server.sockets[0].getsockname()[1]
    try:
        yield link
    finally:
        server.close()
        await link.aclose()


def _garbled(piece: bytes) -> bytes:
    changed = bytearray(piece)
    for position in range(0, len(changed), 8):
        changed[position] ^= 0x55
    return bytes(changed)
