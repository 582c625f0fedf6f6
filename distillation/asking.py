"""Has a student answer logged requests that it hasn't answered yet: on day 0, stopped early, or another's then.

All of them or none: a look at only those that a faulty server happened to answer would judge another population than
the one that is served.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence

from distillation.dataset import Row
from distillation.kind import StudentSilent
from serving.errors import UnderstudyError
from serving.exchange import StudentAnswer
from serving.student import Student
from serving.student_server import StudentRefused

AT_ONCE = 16
"""Requests that are at the student's server at once: it serves clients meanwhile."""

_WAITS_S = (0.25, 1.0, 3.0)
"""After each failed attempt; then it is given up."""
_MOST_REFUSED = 0.05
_TOLD_EVERY_S = 0.2


async def ask(
    student: Student,
    rows: Sequence[Row],
    keep: Callable[[Row, StudentAnswer], None],
    *,
    progress: Callable[[str], None] = lambda _: None,
    at_once: int = AT_ONCE,
    waits_s: Sequence[float] = _WAITS_S,
) -> set[str]:
    """Ask about each row's request and `keep` each answer as it comes; the ids of the rows whose request it refuses.

    A refusal (status 400, 413 or 422: too long, mostly) comes again whenever the request does, and then the teacher
    answers. Raises StudentSilent when a row fails for any other reason, again and again, or when more than 5 % are
    refused: then it isn't the requests. What came by then is kept. Raises what `keep` raises.
    """
    refused: set[str] = set()
    told = _Told(len(rows), progress)
    waiting = iter(rows)

    async def work() -> None:
        for row in waiting:
            try:
                keep(row, await _answer(student, row, waits_s))
            except StudentRefused as error:
                refused.add(row.id)
                if len(refused) > max(1.0, _MOST_REFUSED * len(rows)):
                    raise StudentSilent(
                        f"{error}; and so for {len(refused)} of {told.done + 1} requests: see that student.model is "
                        "its name there, and that it takes requests as long as these"
                    ) from None
            told.one_more()

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(min(at_once, len(rows))):
                group.create_task(work())
    except BaseExceptionGroup as errors:
        raise next(_leaves(errors)) from None
    return refused


async def _answer(student: Student, row: Row, waits_s: Sequence[float]) -> StudentAnswer:
    """One answer, in as many attempts as there are waits, and one more."""
    if row.request is None:
        raise ValueError(f"row {row.id} has no request")
    waits = iter(waits_s)
    while True:
        try:
            return await student.answer(row.request)
        except StudentRefused:
            raise
        except UnderstudyError as error:
            wait = next(waits, None)
            if wait is None:
                raise StudentSilent(
                    f"{error} ({len(waits_s) + 1} attempts); every request has to be answered before a look"
                ) from error
        await asyncio.sleep(wait)


class _Told:
    """Says how far it has come, a few times a second."""

    def __init__(self, total: int, progress: Callable[[str], None]) -> None:
        self.done = 0
        self._total = total
        self._progress = progress
        self._began = time.monotonic()
        self._told_at = self._began

    def one_more(self) -> None:
        self.done += 1
        now = time.monotonic()
        if now - self._told_at < _TOLD_EVERY_S and self.done < self._total:
            return
        self._told_at = now
        left = (now - self._began) / self.done * (self._total - self.done)
        filled = round(20 * self.done / self._total)
        bar = "█" * filled + "░" * (20 - filled)
        self._progress(f"asking the student {bar} {self.done:,} of {self._total:,}, {left:,.0f} s left")


def _leaves(errors: BaseExceptionGroup[BaseException]) -> Iterator[BaseException]:
    for error in errors.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from _leaves(error)
        else:
            yield error
