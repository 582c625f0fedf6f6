from __future__ import annotations

import asyncio
import random
from collections.abc import Coroutine
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.slots import Slots, UpstreamBusy


def run(scenario: Coroutine[Any, Any, None]) -> None:
    asyncio.run(scenario)


def test_so_many_at_once_so_many_waiting_and_no_more() -> None:
    async def scenario() -> None:
        slots = Slots(2, waiting=1, patience_s=10)
        await slots.take()
        await slots.take()
        third = asyncio.create_task(slots.take())
        await asyncio.sleep(0)
        with pytest.raises(UpstreamBusy, match="2 requests are at the teacher and 1 wait"):
            await slots.take()
        slots.give_back()
        await third

    run(scenario())


@pytest.mark.parametrize("limit", [1, 4, 5, 10, 1000])
def test_a_fifth_stays_free_of_what_isnt_needed(limit: int) -> None:
    async def scenario() -> None:
        slots = Slots(limit, waiting=1)
        taken = 0
        while slots.has_room:
            await slots.take()
            taken += 1
        assert limit - taken >= limit / 5 > limit - taken - 1

    run(scenario())


def test_patience_ends() -> None:
    async def scenario() -> None:
        slots = Slots(1, waiting=5, patience_s=0.05)
        async with slots.taken():
            with pytest.raises(UpstreamBusy):
                await slots.take()
        async with slots.taken():
            pass

    run(scenario())


def test_those_who_wait_are_served_in_turn() -> None:
    async def scenario() -> None:
        slots = Slots(1, waiting=10)
        order = []

        async def one(number: int) -> None:
            async with slots.taken():
                order.append(number)

        async with slots.taken():
            waiting = [asyncio.create_task(one(number)) for number in range(5)]
            await asyncio.sleep(0)
        await asyncio.gather(*waiting)
        assert order == list(range(5))

    run(scenario())


def test_the_background_lets_everybody_go_first_and_takes_a_fourth() -> None:
    async def scenario() -> None:
        slots = Slots(4, waiting=10)
        order = []

        async def one(name: str, *, background: bool) -> None:
            async with slots.taken(background=background):
                order.append(name)
                await asyncio.sleep(0)

        await slots.take(background=True)
        second = asyncio.create_task(slots.take(background=True))
        await asyncio.sleep(0)
        assert not second.done(), "a fourth of four is one"
        slots.give_back(background=True)
        await second
        for _ in range(3):
            await slots.take()
        slots.give_back(background=True)
        await slots.take()
        tasks = [
            asyncio.create_task(one("audit", background=True)),
            asyncio.create_task(one("first", background=False)),
            asyncio.create_task(one("second", background=False)),
        ]
        await asyncio.sleep(0)
        slots.give_back()
        await asyncio.gather(*tasks)
        assert order == ["first", "second", "audit"]

    run(scenario())


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5), st.integers(0, 5), st.integers(0, 2**32))
def test_no_slot_is_ever_lost_or_given_twice(limit: int, waiting: int, seed: int) -> None:
    """Requests come, go, give up and are cancelled in any order; in the end every slot is there."""
    dice = random.Random(seed)

    async def scenario() -> None:
        slots = Slots(limit, waiting=waiting, patience_s=0.002)
        inside = most = 0

        async def one(background: bool, steps: int) -> None:
            nonlocal inside, most
            try:
                async with slots.taken(background=background):
                    inside += 1
                    most = max(most, inside)
                    try:
                        for _ in range(steps):
                            await asyncio.sleep(0)
                    finally:
                        inside -= 1
            except UpstreamBusy:
                pass

        tasks = []
        for _ in range(60):
            tasks.append(asyncio.create_task(one(dice.random() < 0.3, dice.randrange(6))))
            if dice.random() < 0.3:
                dice.choice(tasks).cancel()
            if dice.random() < 0.5:
                await asyncio.sleep(0)
        await asyncio.gather(*tasks, return_exceptions=True)
        assert (inside, most <= limit) == (0, True)
        for _ in range(limit):
            async with asyncio.timeout(1):
                await slots.take()
        with pytest.raises(UpstreamBusy):
            await slots.take()

    run(scenario())
