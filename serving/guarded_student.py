"""A student whose failures cost nobody more than a moment."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator

from serving.breaker import Breaker
from serving.closed_answers import TextTooLong
from serving.errors import UnderstudyError
from serving.exchange import Json, StudentAnswer
from serving.student import CommitPlan, Failed, Piece, Student, StudentStream, unheard
from serving.student_server import StudentRefused
from serving.text_thread import StudentBusy


class StudentUnavailable(UnderstudyError):
    """The student took too long, or isn't asked because it has failed too often just now."""


class GuardedStudent:
    """Asks a student for `patience_s` seconds at most (its own), and not at all while it fails most of the time."""

    def __init__(
        self, student: Student, *, patience_s: float | None = None, breaker: Breaker | None = None
    ) -> None:
        self._student = student
        self.patience_s = student.patience_s if patience_s is None else patience_s
        self.streams = student.streams
        self._breaker = breaker or Breaker()

    @property
    def busy(self) -> bool:
        """As the student says."""
        return self._student.busy

    async def prepare(self) -> None:
        """As the student does."""
        await self._student.prepare()

    def unsupported(self, request: Json) -> str | None:
        """As the student says."""
        return self._student.unsupported(request)

    async def answer(self, request: Json, *, failed: Failed = unheard) -> StudentAnswer:
        """Return the student's answer. Raises StudentUnavailable, and whatever the student raises."""
        breaker = self._breaker
        ticket = _enter(breaker)
        try:
            if self.patience_s == math.inf:
                answer = await self._student.answer(request, failed=failed)
            else:
                async with asyncio.timeout(self.patience_s):
                    answer = await self._student.answer(request, failed=failed)
        except TimeoutError:
            breaker.failed(ticket)
            raise StudentUnavailable(f"it gave no answer within {self.patience_s:g} s") from None
        except StudentRefused:
            breaker.succeeded(ticket)  # the request's fault
            raise
        except (StudentBusy, StudentUnavailable, TextTooLong):
            breaker.abandoned(ticket)  # it wasn't asked
            raise
        except Exception:
            breaker.failed(ticket)
            raise
        except BaseException:
            breaker.abandoned(ticket)
            raise
        breaker.succeeded(ticket)
        return answer

    def stream(self, request: Json) -> StudentStream | None:
        """Return the student's answer while it is made, if it can be had so; guarded alike."""
        stream = self._student.stream(request)
        return None if stream is None else _GuardedStream(stream, self._breaker, self.patience_s)

    async def aclose(self) -> None:
        """Close the student."""
        await self._student.aclose()


class _GuardedStream:
    """A stream of which every silence lasts `patience_s` seconds at most; the breaker hears how it ended.

    One that was closed early went well if anything came of it, unless whoever closed it says otherwise.
    """

    def __init__(self, stream: StudentStream, breaker: Breaker, patience_s: float) -> None:
        self.plan: CommitPlan = stream.plan
        self._stream = stream
        self._pieces = aiter(stream)
        self._breaker = breaker
        self._patience_s = patience_s
        self._ticket: int | None = None
        self._brought_something = False
        self._reported = False

    def __aiter__(self) -> AsyncIterator[Piece]:
        return self

    async def __anext__(self) -> Piece:
        if self._ticket is None:
            self._ticket = _enter(self._breaker)
        try:
            async with asyncio.timeout(self._patience_s):
                piece = await anext(self._pieces)
        except StopAsyncIteration:
            self._report(well=True)
            raise
        except TimeoutError:
            self._report(well=False)
            raise StudentUnavailable(f"it fell silent for {self._patience_s:g} s") from None
        except StudentRefused:
            self._report(well=True)
            raise
        except StudentUnavailable:  # nobody was asked
            self._reported = True
            self._breaker.abandoned(self._ticket)
            raise
        except Exception:
            self._report(well=False)
            raise
        self._brought_something = True
        return piece

    def answer(self) -> StudentAnswer:
        return self._stream.answer()

    async def aclose(self, *, failed: bool = False) -> None:
        if failed or self._brought_something:
            self._report(well=not failed)
        elif self._ticket is not None and not self._reported:
            self._reported = True
            self._breaker.abandoned(self._ticket)
        await self._stream.aclose(failed=failed)

    def _report(self, *, well: bool) -> None:
        if self._ticket is None or self._reported:
            return
        self._reported = True
        (self._breaker.succeeded if well else self._breaker.failed)(self._ticket)


def _enter(breaker: Breaker) -> int:
    ticket = breaker.enter()
    if ticket is None:
        raise StudentUnavailable("it has failed most of the time just now and is left alone for a moment")
    return ticket
