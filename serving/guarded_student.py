"""A student whose failures cost nobody more than a moment."""

from __future__ import annotations

import asyncio

from serving.breaker import Breaker
from serving.errors import UnderstudyError
from serving.exchange import Json, StudentAnswer
from serving.student import Student

_PATIENCE_S = 5.0


class StudentUnavailable(UnderstudyError):
    """The student took too long, or isn't asked because it has failed too often just now."""


class GuardedStudent:
    """Asks a student for `patience_s` seconds at most, and not at all while it fails most of the time."""

    def __init__(
        self, student: Student, *, patience_s: float = _PATIENCE_S, breaker: Breaker | None = None
    ) -> None:
        self._student = student
        self._patience_s = patience_s
        self._breaker = breaker or Breaker()

    def unsupported(self, request: Json) -> str | None:
        """As the student says."""
        return self._student.unsupported(request)

    async def answer(self, request: Json) -> StudentAnswer:
        """Return the student's answer. Raises StudentUnavailable, and whatever the student raises."""
        breaker = self._breaker
        ticket = breaker.enter()
        if ticket is None:
            raise StudentUnavailable("it has failed most of the time just now and is left alone for a moment")
        try:
            async with asyncio.timeout(self._patience_s):
                answer = await self._student.answer(request)
        except TimeoutError:
            breaker.failed(ticket)
            raise StudentUnavailable(f"it gave no answer within {self._patience_s:g} s") from None
        except Exception:
            breaker.failed(ticket)
            raise
        except BaseException:
            breaker.abandoned(ticket)
            raise
        breaker.succeeded(ticket)
        return answer

    async def aclose(self) -> None:
        """Close the student."""
        await self._student.aclose()
