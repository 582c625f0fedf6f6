"""A hedge: the teacher, started beside the student, since an escalation is foreseen.

What it brings is the teacher's answer if the student's is escalated, and is thrown away if it is accepted: an answer
that happened to be complete by then is no label, since whether it was depends on how fast both are (STATISTICS.md §2).
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any

from serving.teacher import TeacherReply, TeacherStream


@dataclass(frozen=True, slots=True)
class Opened:
    """A stream of the teacher's that has begun. Whoever has it leaves the `context` in the end."""

    context: AbstractAsyncContextManager[TeacherStream]
    stream: TeacherStream


class Hedge:
    """One request under way at the teacher. Whoever starts it either takes what it brings or drops it."""

    def __init__(self, asking: Coroutine[Any, Any, TeacherReply | Opened]) -> None:
        self._task = asyncio.get_running_loop().create_task(asking)
        self._task.add_done_callback(_heard)

    async def taken(self) -> TeacherReply | Opened:
        """What the teacher brings. Raises what it raises; cancelling this cancels the request."""
        return await self._task

    async def dropped(self) -> TeacherReply | Opened | None:
        """Give the request up; what had come of it by then, a stream already closed. None: nothing, or an error."""
        if self._task.cancel():
            await asyncio.wait([self._task])
        if self._task.cancelled() or self._task.exception() is not None:
            return None
        came = self._task.result()
        if isinstance(came, Opened):
            await came.context.__aexit__(None, None, None)
        return came


def _heard(task: asyncio.Task[TeacherReply | Opened]) -> None:
    """Take note of an error that nobody waits for: asyncio complains of those."""
    if not task.cancelled():
        task.exception()
