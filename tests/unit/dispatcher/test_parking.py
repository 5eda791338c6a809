"""When all strands of a run wait, and when not."""

from __future__ import annotations

import asyncio
import contextlib
import time

import pytest

from chassis import lifecycle
from services.dispatcher import parking


class World:
    """Strands of one run."""

    def __init__(self, *, stays: bool = False) -> None:
        self.root = parking.Strand()
        self.told = 0
        self.parking = parking.Parking(self.root, self._tell, stays=stays)
        self.tasks = lifecycle.Tasks()

    def _tell(self) -> None:
        self.told += 1

    async def waits(self, strand: parking.Strand, what: str, in_s: float = 1000.0, approval_id: str = "") -> asyncio.Task[None]:
        """A step of the strand waits."""

        async def step() -> None:
            strand.under_way += 1
            await self.parking.wait(strand, parking.Wait(what, time.time() + in_s, approval_id))
            strand.under_way -= 1

        task = self.tasks.spawn(step(), "step")
        await asyncio.sleep(0)
        return task

    def beside(self, many: int) -> list[parking.Strand]:
        """The root takes a step of so many strands."""
        strands = [parking.Strand(f"1.{number}:") for number in range(many)]
        self.root.under_way += 1
        self.root.groups.append(parking.Group(strands))
        return strands


async def test_one_strand_that_waits_is_all_of_them() -> None:
    world = World()
    task = await world.waits(world.root, parking.MESSAGE)
    assert (world.told, world.parking.away and world.parking.away.waits_for) == (1, "message")
    world.parking.wake()
    await asyncio.sleep(0)
    assert not task.done()
    await world.tasks.close()


async def test_while_one_goes_on_nobody_is_put_away() -> None:
    world = World()
    first, second = world.beside(2)
    second.under_way = 1
    task = await world.waits(first, parking.MESSAGE)
    assert world.parking.away is None
    world.parking.wake()
    await asyncio.wait_for(task, 5)
    task = await world.waits(first, parking.APPROVAL, approval_id="a")
    second.under_way, second.over = 0, True
    world.parking.look()
    assert world.parking.away is not None
    assert (world.parking.away.waits_for, world.parking.away.approvals) == ("approval", ("a",))
    await world.tasks.close()


async def test_one_that_is_woken_goes_on_from_that_moment() -> None:
    world = World()
    first, second = world.beside(2)
    await world.waits(first, parking.MESSAGE)
    world.parking.wake()
    second.under_way = second.parked = 1
    world.parking.look()
    assert world.parking.away is None
    await world.tasks.close()


async def test_one_that_has_failed_lets_the_strand_behind_it_go_on() -> None:
    world = World()
    first, second = world.beside(2)
    world.root.groups[0].failed = second.over = True
    await world.waits(first, parking.MESSAGE)
    assert world.parking.away is None
    await world.tasks.close()


async def test_all_over_is_not_waiting() -> None:
    world = World()
    for strand in world.beside(2):
        strand.over = True
    world.parking.look()
    assert (world.parking.away, world.root.idle()) == (None, False)


@pytest.mark.parametrize(("in_s", "away"), [(4.0, False), (6.0, True)])
async def test_who_sleeps_for_a_short_while_stays(in_s: float, away: bool) -> None:
    world = World()
    await world.waits(world.root, parking.TIMER, in_s)
    assert (world.parking.away is not None) is away
    await world.tasks.close()


async def test_what_is_waited_for_together_is_told_by_its_first() -> None:
    world = World()
    strands = world.beside(3)
    for strand, what, in_s in zip(strands, (parking.TIMER, parking.APPROVAL, parking.MESSAGE), (50.0, 10.0, 1000.0), strict=True):
        await world.waits(strand, what, in_s, "a" if what == parking.APPROVAL else "")
    away = world.parking.away
    assert away is not None
    assert (away.waits_for, away.approvals) == ("message", ("a",))
    assert away.until == pytest.approx(time.time() + 10, abs=5)
    await world.tasks.close()


async def test_a_run_that_stays_is_never_put_away_and_time_passes_for_it() -> None:
    world = World(stays=True)
    await asyncio.wait_for(await world.waits(world.root, parking.MESSAGE, 0.01), 5)
    assert (world.parking.away, world.root.parked) == (None, 0)


async def test_one_that_is_stopped_waits_no_more() -> None:
    world = World(stays=True)
    task = await world.waits(world.root, parking.MESSAGE)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    assert world.root.parked == 0
