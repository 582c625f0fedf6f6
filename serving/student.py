"""The seam behind which every student stands."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Protocol

from serving.exchange import Json, StudentAnswer

Failed = Callable[[float], None]
"""Hears the seconds that what a student runs on was at an answer that came to nothing."""


def unheard(seconds: float) -> None:
    """Nobody counts them."""


@dataclass(frozen=True, slots=True)
class Piece:
    """The next piece of an answer: `choices` as in a `chat.completion.chunk`, without log-probabilities.

    `checkpoints` are those that it reached, as in `StudentAnswer.checkpoints`.
    """

    choices: list[Json]
    checkpoints: list[Json]


class CommitPlan(Protocol):
    """Where an answer is judged that is sent on while it is made. All counts are of the student's tokens."""

    @property
    def commit_tokens(self) -> int:
        """A streamed answer is judged here, or at its end if that comes first."""
        ...

    @property
    def stop_below(self) -> float | None:
        """A rank below this at an earlier checkpoint is hopeless; None: none is."""
        ...

    @property
    def hold_back_s(self) -> float:
        """How long a streamed request waits for the judgement at most, in seconds."""
        ...


class StudentStream(Protocol):
    """A student's answer while it is made: from the beginning of the iteration on.

    Any exception while iterating means that it broke off.
    """

    plan: CommitPlan

    def __aiter__(self) -> AsyncIterator[Piece]:
        """The pieces, as they come."""
        ...

    def answer(self) -> StudentAnswer:
        """The answer as far as it has come; complete once the iteration has ended."""
        ...

    async def aclose(self, *, failed: bool = False) -> None:
        """Stop making it, if it isn't whole. `failed`: because it took too long. May be called again."""
        ...


class Student(Protocol):
    """A model that imitates the teacher on one task.

    `patience_s` is how long an answer may take, and infinity where it is made without waiting for anything; `streams`
    whether it can be had while it is made. `busy`: an answer is being made right now, so that closing would break it
    off.
    """

    patience_s: float
    streams: bool

    @property
    def busy(self) -> bool:
        """Whether an answer is being made."""
        ...

    async def prepare(self) -> None:
        """See that it can answer, as far as that takes others (an adapter that its server has to load).

        Called once, before it is asked anything. Any exception means that it can't; it may be tried again.
        """
        ...

    def unsupported(self, request: Json) -> str | None:
        """The feature of `request` this student was not made for (`tools`, `turns`, `content`, `n`, …), or None."""
        ...

    async def answer(self, request: Json, *, failed: Failed = unheard) -> StudentAnswer:
        """Answer a supported request. Any exception means: ask the teacher.

        `failed` hears before that, also of one that is broken off, for how long what the student runs on was at it:
        what comes to nothing costs as well. As far as that is known: of a student in process it isn't.
        """
        ...

    def stream(self, request: Json) -> StudentStream | None:
        """The same while it is made; to be closed. None if it doesn't stream: its answers are whole at once."""
        ...

    async def aclose(self) -> None:
        """Give back what the student holds."""
        ...
