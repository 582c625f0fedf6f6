from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from serving.breaker import Breaker, State


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def broken() -> tuple[Breaker, Clock, list[State]]:
    """A breaker that has just opened."""
    clock = Clock()
    heard: list[State] = []
    breaker = Breaker(clock=clock, on_change=heard.append)
    for _ in range(10):
        breaker.failed(enter(breaker))
    return breaker, clock, heard


def enter(breaker: Breaker) -> int:
    ticket = breaker.enter()
    assert ticket is not None
    return ticket


def state(breaker: Breaker) -> State:
    return breaker.state


def test_it_opens_when_half_of_the_attempts_fail_and_ten_at_least() -> None:
    breaker = Breaker(clock=Clock())
    for _ in range(9):
        breaker.failed(enter(breaker))
    assert state(breaker) is State.CLOSED, "nine are too few"
    breaker.failed(enter(breaker))
    assert (state(breaker), breaker.enter()) == (State.OPEN, None)
    breaker = Breaker(clock=Clock())
    for _ in range(200):
        breaker.succeeded(enter(breaker))
    for _ in range(199):
        breaker.failed(enter(breaker))
    assert state(breaker) is State.CLOSED, "less than half"
    breaker.failed(enter(breaker))
    assert state(breaker) is State.OPEN


def test_what_is_long_past_doesnt_count() -> None:
    clock = Clock()
    breaker = Breaker(clock=clock)
    for _ in range(40):
        breaker.failed(enter(breaker))
        clock.now += 2
    assert state(breaker) is State.CLOSED


def test_one_attempt_at_a_time_says_whether_it_is_over() -> None:
    breaker, clock, heard = broken()
    assert (breaker.retry_after_s(), breaker.lets_through()) == (5, False)
    clock.now += 4.9
    assert (breaker.retry_after_s(), breaker.enter()) == (1, None)
    clock.now += 0.2
    assert breaker.lets_through()
    trial = enter(breaker)
    assert (state(breaker), breaker.enter()) == (State.HALF_OPEN, None)
    breaker.succeeded(trial)
    assert state(breaker) is State.CLOSED
    assert heard == [State.OPEN, State.HALF_OPEN, State.CLOSED]
    for _ in range(9):
        breaker.failed(enter(breaker))
    assert state(breaker) is State.CLOSED, "what was before is forgotten"


def test_each_trial_that_fails_doubles_the_wait_up_to_a_minute() -> None:
    breaker, clock, _ = broken()
    waits = []
    for _ in range(6):
        clock.now += breaker.retry_after_s()
        breaker.failed(enter(breaker))
        waits.append(breaker.retry_after_s())
    assert waits == [10, 20, 40, 60, 60, 60]
    clock.now += 60
    breaker.succeeded(enter(breaker))
    for _ in range(10):
        breaker.failed(enter(breaker))
    assert breaker.retry_after_s() == 5, "from the beginning again"


def test_a_trial_that_was_given_up_makes_room_at_once() -> None:
    breaker, clock, _ = broken()
    clock.now += 5
    breaker.abandoned(enter(breaker))
    breaker.succeeded(enter(breaker))
    assert state(breaker) is State.CLOSED


def test_a_silent_trial_makes_room_after_a_while_and_is_heard_all_the_same() -> None:
    breaker, clock, _ = broken()
    clock.now += 5
    silent = enter(breaker)
    assert breaker.enter() is None
    clock.now += 5
    breaker.failed(enter(breaker))
    assert state(breaker) is State.OPEN
    breaker.succeeded(silent)
    assert state(breaker) is State.CLOSED


def test_attempts_from_before_say_nothing() -> None:
    clock = Clock()
    breaker = Breaker(clock=clock)
    early = enter(breaker)
    for _ in range(10):
        breaker.failed(enter(breaker))
    breaker.succeeded(early)
    breaker.failed(early)
    breaker.failed_later()
    assert state(breaker) is State.OPEN
    assert breaker.retry_after_s() == 5


def test_answers_that_break_off_count() -> None:
    breaker = Breaker(clock=Clock())
    for _ in range(10):
        breaker.succeeded(enter(breaker))
        breaker.failed_later()
    assert state(breaker) is State.OPEN


class AnyOrder(RuleBasedStateMachine):
    """Whatever happens in whatever order: closed lets everything through, open nothing before its time."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.breaker = Breaker(clock=self.clock)
        self.out: list[int] = []

    @rule(seconds=st.floats(0, 70))
    def wait(self, seconds: float) -> None:
        self.clock.now += seconds

    @rule()
    def begin(self) -> None:
        state, through = self.breaker.state, self.breaker.lets_through()
        ticket = self.breaker.enter()
        assert (ticket is not None) is through
        assert through or state is not State.CLOSED
        if ticket is not None:
            self.out.append(ticket)
        if state is not State.CLOSED:
            assert self.breaker.enter() is None, "one at a time"

    @precondition(lambda self: self.out)
    @rule(which=st.integers(0, 99), how=st.sampled_from(("succeeded", "failed", "abandoned")))
    def end(self, which: int, how: str) -> None:
        ticket = self.out.pop(which % len(self.out))
        {
            "succeeded": self.breaker.succeeded,
            "failed": self.breaker.failed,
            "abandoned": self.breaker.abandoned,
        }[how](ticket)

    @rule()
    def a_storm(self) -> None:
        for _ in range(30):
            ticket = self.breaker.enter()
            if ticket is not None:
                self.breaker.failed(ticket)
        assert self.breaker.state is not State.CLOSED

    @invariant()
    def it_is_never_shut_for_good(self) -> None:
        assert 1 <= self.breaker.retry_after_s() <= 60 or self.breaker.state is State.CLOSED


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=40, stateful_step_count=40, deadline=None)
