"""What several ask at the same time is asked once, and nobody gets an answer that is older than their question."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from netra import errors
from services.events import together

pytestmark = pytest.mark.timeout(30)


class _Record:
    """Answers with what was asked, when it is let."""

    def __init__(self) -> None:
        self.asked: asyncio.Queue[list[int]] = asyncio.Queue()
        self.let: asyncio.Queue[Exception | None] = asyncio.Queue()

    async def put(self, asked: Sequence[int]) -> tuple[int, ...]:
        self.asked.put_nowait(list(asked))
        if (failure := await self.let.get()) is not None:
            raise failure
        return tuple(asked)


async def test_who_asks_meanwhile_is_answered_together_by_the_next_answer() -> None:
    shared, record = together.Together(), _Record()
    async with asyncio.TaskGroup() as group:
        first = group.create_task(shared.ask("q", 1, record.put))
        assert await record.asked.get() == [1]
        later = [group.create_task(shared.ask("q", number, record.put)) for number in (2, 3)]
        other = group.create_task(shared.ask("another", 4, record.put))
        record.let.put_nowait(None)
        assert await record.asked.get() == [2, 3]
        record.let.put_nowait(None)
        assert await record.asked.get() == [4]
        record.let.put_nowait(None)
    assert (first.result(), [task.result() for task in later], other.result()) == ((1,), [(2, 3)] * 2, (4,))
    assert (record.asked.empty(), shared._next) == (True, {})


async def test_when_the_one_who_asks_for_all_is_cancelled_another_does() -> None:
    shared, record = together.Together(), _Record()
    async with asyncio.TaskGroup() as group:
        asking = [group.create_task(shared.ask("q", number, record.put)) for number in (1, 2, 3)]
        assert await record.asked.get() == [1, 2, 3]
        asking[0].cancel()
        assert await record.asked.get() == [1, 2, 3]
        asking[2].cancel()
        record.let.put_nowait(None)
    assert asking[1].result() == (1, 2, 3)
    assert record.asked.empty()


@pytest.mark.parametrize("failure", [errors.Unavailable("away"), errors.DeadlineExceeded("slow")])
async def test_an_outage_is_everybodys_and_asked_about_once(failure: errors.NetraError) -> None:
    shared, record = together.Together(), _Record()
    record.let.put_nowait(failure)
    told = await asyncio.gather(*(shared.ask("q", number, record.put) for number in (1, 2)), return_exceptions=True)
    assert [type(error) for error in told] == [errors.Unavailable] * 2
    assert (record.asked.qsize(), shared._next) == (1, {})


async def test_what_is_wrong_with_one_who_asks_is_not_the_others() -> None:
    shared, record = together.Together(), _Record()
    for outcome in (ValueError(), None):
        record.let.put_nowait(outcome)
    told = await asyncio.gather(*(shared.ask("q", number, record.put) for number in (1, 2)), return_exceptions=True)
    assert [type(error) for error in told] == [ValueError, tuple]


async def test_of_whoever_gives_up_before_their_turn_nothing_is_left() -> None:
    shared, record = together.Together(), _Record()
    async with asyncio.TaskGroup() as group:
        group.create_task(shared.ask("q", 1, record.put))
        await record.asked.get()
        asking = group.create_task(shared.ask("q", 2, record.put))
        await asyncio.sleep(0)
        asking.cancel()
        await asyncio.wait([asking])
        assert shared._next == {}
        record.let.put_nowait(None)
