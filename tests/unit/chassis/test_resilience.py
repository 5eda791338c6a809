"""A breaker opens, tries and closes as it should; places go round."""

from __future__ import annotations

import asyncio

import pytest

from chassis import resilience


class Clock:
    """Goes on when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def broken(breaker: resilience.Breaker, count: int, source: str = "") -> list[bool]:
    """So many calls pass and fail."""
    changed = []
    for _ in range(count):
        assert breaker.refused_for_s() == 0
        changed.append(breaker.failed(breaker.enter(), source))
    return changed


def test_failures_in_a_row_open_it_and_one_success_between_them_does_not() -> None:
    breaker = resilience.Breaker(3, 10.0, now=Clock())
    assert broken(breaker, 2) == [False, False]
    assert breaker.succeeded(breaker.enter()) is False
    assert broken(breaker, 3) == [False, False, True]
    assert (breaker.state, breaker.refused_for_s(), breaker.failed_before) == ("open", 10.0, 3)


def test_after_its_time_one_call_tries_and_decides() -> None:
    clock = Clock()
    breaker = resilience.Breaker(1, 10.0, now=clock)
    broken(breaker, 1)
    clock.now += 9.9
    assert breaker.refused_for_s() == pytest.approx(0.1)
    clock.now += 0.1
    assert (breaker.state, breaker.refused_for_s()) == ("half_open", 0.0)
    trial = breaker.enter()
    # nobody else while it is tried
    assert breaker.refused_for_s() > 0
    # one that says nothing makes room for the next
    breaker.left(trial)
    assert breaker.refused_for_s() == 0
    assert breaker.failed(breaker.enter()) is True
    assert (breaker.state, breaker.refused_for_s()) == ("open", 10.0)
    clock.now += 10
    assert breaker.succeeded(breaker.enter()) is True
    assert (breaker.state, breaker.refused_for_s(), breaker.failed_before) == ("closed", 0.0, 0)


def test_calls_from_before_a_change_are_not_heard() -> None:
    clock = Clock()
    breaker = resilience.Breaker(2, 10.0, now=clock)
    early = [breaker.enter() for _ in range(4)]
    assert [breaker.failed(ticket) for ticket in early[:2]] == [False, True]
    assert breaker.succeeded(early[2]) is False
    assert breaker.failed(early[3]) is False
    assert (breaker.state, breaker.refused_for_s()) == ("open", 10.0)


def test_one_caller_alone_does_not_open_what_takes_two() -> None:
    breaker = resilience.Breaker(3, 10.0, sources=2, now=Clock())
    assert not any(broken(breaker, 50, "one"))
    assert broken(breaker, 1, "other") == [True]


async def test_places_go_to_who_has_fewest_then_to_who_came_first() -> None:
    places, order = resilience.Places(2, 4), list[str]()

    async def one(key: str) -> None:
        await places.take(key)
        order.append(key)

    await places.take("a")
    await places.take("a")
    async with asyncio.TaskGroup() as group:
        for key in ("a", "a", "b", "c"):
            group.create_task(one(key))
            await asyncio.sleep(0)
        assert (places.taken, places.waiting, places.taken_at_once("d")) == (2, 4, False)
        with pytest.raises(resilience.Full):
            await places.take("d")
        for taken in ("a", "a", "b", "c"):
            places.give_back(taken)
            for _ in range(3):
                await asyncio.sleep(0)
    assert order == ["b", "a", "c", "a"]
    places.give_back("a")
    places.give_back("a")
    assert (places.taken, places.waiting) == (0, 0)


async def test_who_stops_waiting_takes_no_place() -> None:
    places = resilience.Places(1, 4)
    await places.take("a")
    waiting = [asyncio.get_running_loop().create_task(places.take(key)) for key in "bc"]
    await asyncio.sleep(0)
    # one goes before, the other at the moment when it would have got the place
    waiting[0].cancel()
    await asyncio.sleep(0)
    places.give_back("a")
    waiting[1].cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    assert (places.taken, places.waiting) == (0, 0)
