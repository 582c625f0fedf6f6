from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from serving.breaker import Breaker
from serving.exchange import Json, StudentAnswer
from serving.guarded_student import GuardedStudent, StudentUnavailable
from serving.student import Failed, unheard

ANSWER = StudentAnswer("s", [{"index": 0, "message": {"role": "assistant", "content": "x"}}], None, 0.1, 1.0)


class Moody:
    """A student that does what its mood says."""

    patience_s = 5.0
    streams = False
    busy = False

    def __init__(self) -> None:
        self.mood = "well"
        self.asked = 0
        self.closed = False

    async def prepare(self) -> None:
        pass

    def unsupported(self, request: Json) -> str | None:
        return "tools" if "tools" in request else None

    async def answer(self, request: Json, *, failed: Failed = unheard) -> StudentAnswer:
        self.asked += 1
        if self.mood == "hangs":
            try:
                await asyncio.Event().wait()
            finally:
                failed(9.0)
        if self.mood == "fails":
            raise ValueError("no idea")
        return ANSWER

    def stream(self, request: Json) -> None:
        return None

    async def aclose(self) -> None:
        self.closed = True


def run(scenario: Coroutine[Any, Any, None]) -> None:
    asyncio.run(scenario)


def test_a_student_that_is_well_is_just_asked() -> None:
    async def scenario() -> None:
        student = Moody()
        guarded = GuardedStudent(student)
        assert await guarded.answer({}) is ANSWER
        assert (guarded.unsupported({"tools": []}), guarded.unsupported({})) == ("tools", None)
        await guarded.aclose()
        assert student.closed

    run(scenario())


def test_a_student_that_hangs_is_waited_for_a_moment_only() -> None:
    async def scenario() -> None:
        student = Moody()
        student.mood = "hangs"
        took: list[float] = []
        with pytest.raises(StudentUnavailable, match=r"within 0\.05 s"):
            await asyncio.wait_for(GuardedStudent(student, patience_s=0.05).answer({}, failed=took.append), 5)
        assert took == [9.0], "what it took until then is heard of"

    run(scenario())


@pytest.mark.parametrize("mood", ["hangs", "fails"])
def test_a_student_that_keeps_failing_is_left_alone_for_a_while(mood: str) -> None:
    async def scenario() -> None:
        now = [0.0]
        student = Moody()
        guarded = GuardedStudent(student, patience_s=0.01, breaker=Breaker(clock=lambda: now[0]))
        student.mood = mood
        for _ in range(30):
            with pytest.raises((ValueError, StudentUnavailable)):
                await guarded.answer({})
        assert student.asked == 10
        student.mood = "well"
        now[0] += 5
        assert await guarded.answer({}) is ANSWER
        assert await guarded.answer({}) is ANSWER

    run(scenario())


def test_a_client_that_leaves_says_nothing_of_the_student() -> None:
    async def scenario() -> None:
        student = Moody()
        guarded = GuardedStudent(student)
        student.mood = "hangs"
        for _ in range(20):
            asking = asyncio.create_task(guarded.answer({}))
            await asyncio.sleep(0)
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
        student.mood = "well"
        assert await guarded.answer({}) is ANSWER

    run(scenario())
