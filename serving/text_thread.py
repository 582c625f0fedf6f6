"""A model's texts, read in a thread of their own: the event loop serves others meanwhile.

What comes while the thread works waits in a line. A model that may read several texts together reads what has gathered,
a few at a time, those about as long as each other; nobody waits for more to come. Any other reads them one by one.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from serving.errors import UnderstudyError

if TYPE_CHECKING:
    from serving.text_model import TextModel, Tokens

Floats = NDArray[np.float32]

LIMIT = 64
"""So many texts are read or wait; at 256 tokens each they take less than the five seconds a student has."""
TOGETHER = 8
"""More at once are no faster on a core, and the first waits for the last."""


class StudentBusy(UnderstudyError):
    """The student isn't asked: as many texts as it can read in time wait already, or it is being closed."""


class UnreadableText(UnderstudyError):
    """The model made nothing of a text."""


@dataclass(frozen=True, slots=True)
class Read:
    """What a model made of a text: `numbers` float32[k], and the share it had of the time that took, in seconds."""

    numbers: Floats
    device_s: float


@dataclass(frozen=True, slots=True)
class _Waiting:
    text: str
    future: asyncio.Future[Read]
    loop: asyncio.AbstractEventLoop


class TextThread:
    """The thread of one student's model. It begins with the first text, and ends when it is closed."""

    def __init__(self, model: TextModel, *, limit: int = LIMIT) -> None:
        self._model = model
        self._limit = limit
        self._line: deque[_Waiting] = deque()
        self._changed = threading.Condition()
        self._open: set[asyncio.Future[Read]] = set()  # at most `limit`; touched by the event loop only
        self._closed = False
        self._thread: threading.Thread | None = None

    @property
    def busy(self) -> bool:
        """Whether a text is being read, or waits."""
        return bool(self._open)

    async def read(self, text: str) -> Read:
        """Read a text. A caller that is cancelled leaves the line, if it isn't being read yet.

        Raises StudentBusy, TextTooLong, UnreadableText, RuntimeError where no thread can be had, and what the model
        raises.
        """
        if len(self._open) >= self._limit:
            raise StudentBusy(f"{len(self._open)} texts wait for it already")
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Read] = loop.create_future()
        with self._changed:
            if self._closed:
                raise StudentBusy("it is being closed")
            if self._thread is None:
                thread = threading.Thread(target=self._work, name="understudy-texts", daemon=True)
                thread.start()  # where the system has no thread left, this text alone fails: the next tries again
                self._thread = thread
            self._line.append(_Waiting(text, future, loop))
            self._open.add(future)
            self._changed.notify()
        return await future

    async def aclose(self) -> None:
        """End the thread: what it has begun with is read, what waits is refused."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join)

    def _work(self) -> None:
        while taken := self._take():
            try:
                self._read_all(taken)
            except BaseException as error:  # none of them waits for a thread that isn't there
                for one in taken:
                    self._tell(one, error)
        for one in self._line:
            self._tell(one, StudentBusy("it was closed"))
        self._line.clear()

    def _take(self) -> list[_Waiting]:
        """What is to be read next; nothing: the thread is to end."""
        with self._changed:
            while not self._line and not self._closed:
                self._changed.wait()
            if self._closed:
                return []
            if not self._model.batches:
                return [self._line.popleft()]
            taken = list(self._line)
            self._line.clear()
            return taken

    def _read_all(self, taken: Sequence[_Waiting]) -> None:
        ready: list[tuple[_Waiting, Tokens]] = []
        for one in taken:
            if not self._wanted(one):
                continue
            try:
                ready.append((one, self._model.tokens(one.text)))
            except BaseException as error:  # a panic in the tokenizer is none of Exception
                self._tell(one, error)
        ready.sort(key=lambda pair: len(pair[1]))
        for start in range(0, len(ready), TOGETHER):
            self._read([pair for pair in ready[start : start + TOGETHER] if self._wanted(pair[0])])

    def _read(self, batch: Sequence[tuple[_Waiting, Tokens]]) -> None:
        if not batch:
            return
        began = time.perf_counter()
        try:
            numbers = self._model.read([tokens for _, tokens in batch])
        except BaseException as error:
            if len(batch) == 1:
                self._tell(batch[0][0], error)
            else:
                for pair in batch:  # only the one at fault fails
                    self._read([pair])
            return
        device_s = (time.perf_counter() - began) / len(batch)
        for (one, _), row in zip(batch, numbers, strict=True):
            sound = bool(np.isfinite(row).all())
            self._tell(
                one,
                Read(row, device_s) if sound else UnreadableText("the model gave numbers that aren't finite"),
            )

    def _wanted(self, one: _Waiting) -> bool:
        """Whether somebody still waits for it; if not, it is out of the line by that."""
        if one.future.cancelled():
            self._tell(one, None)
            return False
        return True

    def _tell(self, one: _Waiting, outcome: Read | BaseException | None) -> None:
        try:
            one.loop.call_soon_threadsafe(self._settle, one.future, outcome)
        except RuntimeError:
            return  # the event loop has ended, and with it whoever asked

    def _settle(self, future: asyncio.Future[Read], outcome: Read | BaseException | None) -> None:
        self._open.discard(future)
        if future.done():
            return
        if isinstance(outcome, Read):
            future.set_result(outcome)
        elif isinstance(outcome, Exception):
            future.set_exception(outcome)
        else:
            future.set_exception(UnreadableText(f"the model broke down over a text: {outcome}"))
