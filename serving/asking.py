"""How the upstream is asked: how often, for how long, and when not at all.

A failed attempt is repeated while the client has seen nothing of its answer: within the deadline, within the
budget of retries, and unless the breaker is open by then.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from serving.breaker import Breaker, State
from serving.errors import UpstreamError, UpstreamRefused, UpstreamTimeout, UpstreamUnavailable
from serving.retry import delay_before_retry
from serving.retry_budget import RetryBudget
from serving.upstream import NothingSent, StaleConnection

_T = TypeVar("_T")

_STALE_AT_MOST = 5
_NEVER_DONE = frozenset({501, 505})


class Asking:
    """Makes attempts until one gives something.

    `place` names the upstream in messages. `is_fault` says which errors the breaker counts; `breaker` None:
    none is counted. `on_retry` hears how each retry ended: `answered`, `failed`, or `over_budget` when there
    was to be one and wasn't.
    """

    def __init__(
        self,
        place: str,
        *,
        timeout_s: float,
        max_retries: int,
        breaker: Breaker | None,
        is_fault: Callable[[UpstreamError], bool],
        on_retry: Callable[[str], None] | None = None,
    ) -> None:
        self._place = place
        self._timeout_s = timeout_s
        self._max_retries = max_retries
        self._breaker = breaker
        self._is_fault = is_fault
        self._on_retry = on_retry
        self._budget = RetryBudget()

    async def until_answered(
        self,
        attempt: Callable[[], Awaitable[_T]],
        *,
        repeatable: Callable[[UpstreamError], bool],
        retries: bool = True,
    ) -> _T:
        """Repeat `attempt` within the deadline until it gives something or an error not worth repeating.

        `retries` False: it is made once. Raises what the last attempt raised, UpstreamTimeout when the
        deadline is over, UpstreamUnavailable when there must be none now.
        """
        clock = asyncio.get_running_loop().time
        deadline = clock() + self._timeout_s
        most = self._max_retries if retries else 0
        failed = stale = 0
        self._budget.request()
        while True:
            try:
                answer = await self._once(attempt, deadline)
            except UpstreamUnavailable:
                raise
            except UpstreamError as error:
                if isinstance(error, StaleConnection) and stale < _STALE_AT_MOST and repeatable(error):
                    # Not the teacher's failure: at once, and not counted. The pool may hold several of them.
                    stale += 1
                    continue
                if failed:
                    self._tell("failed")
                delay = delay_before_retry(error, failed) if repeatable(error) else None
                if delay is None or failed >= most or clock() + delay >= deadline:
                    raise
                if not self._budget.take():
                    self._tell("over_budget")
                    raise
                last = error
            else:
                if failed:
                    self._tell("answered")
                return answer
            failed += 1
            await asyncio.sleep(delay)
            if self._breaker is not None and not self._breaker.lets_through():
                raise last  # says more than that it isn't asked any more

    @property
    def is_well(self) -> bool:
        """Whether its breaker, if it has one, is closed."""
        return self._breaker is None or self._breaker.state is State.CLOSED

    def broke_off(self) -> None:
        """Count a fault of an answer that had begun well."""
        if self._breaker is not None:
            self._breaker.failed_later()

    async def _once(self, attempt: Callable[[], Awaitable[_T]], deadline: float) -> _T:
        """Make one attempt, and tell the breaker how it ended."""
        breaker = self._breaker
        if breaker is None:
            return await self._in_time(attempt, deadline)
        ticket = breaker.enter()
        if ticket is None:
            again_s = breaker.retry_after_s()
            raise UpstreamUnavailable(
                f"the teacher at {self._place} has failed most of the time just now and is left alone for a "
                f"moment: try again in {again_s} s",
                again_s,
            )
        try:
            answer = await self._in_time(attempt, deadline)
        except UpstreamError as error:
            if isinstance(error, StaleConnection):
                breaker.abandoned(ticket)
            elif self._is_fault(error):
                breaker.failed(ticket)
            elif isinstance(error, UpstreamTimeout):
                breaker.abandoned(ticket)
            else:
                breaker.succeeded(ticket)
            raise
        except BaseException:
            breaker.abandoned(ticket)
            raise
        breaker.succeeded(ticket)
        return answer

    async def _in_time(self, attempt: Callable[[], Awaitable[_T]], deadline: float) -> _T:
        try:
            # Here and not around the breaker: it would take the end of our patience for a client that went away.
            async with asyncio.timeout_at(deadline):
                return await attempt()
        except TimeoutError:
            raise UpstreamTimeout(
                f"the teacher at {self._place} didn't answer within {self._timeout_s:g} s"
            ) from None

    def _tell(self, outcome: str) -> None:
        if self._on_retry is not None:
            self._on_retry(outcome)


def failed_to_answer(error: UpstreamError) -> bool:
    """Whether an error is a fault of the upstream's.

    4xx are the request's or one key's, 429 included: what one tenant used up says nothing of the others.
    """
    if isinstance(error, UpstreamRefused):
        return error.status >= 500 and error.status not in _NEVER_DONE
    return True


def could_not_be_reached(error: UpstreamError) -> bool:
    """Whether there was no connection: all that the failures of unknown endpoints tell about the upstream."""
    return isinstance(error, NothingSent)
