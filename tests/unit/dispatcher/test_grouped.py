"""What is written at the same moment is written together, and each is answered by itself."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from netra import errors
from services.dispatcher import grouped


class Written:
    """Where things are written, one group after the other; held back while the gate is closed."""

    def __init__(self) -> None:
        self.groups: list[list[int]] = []
        self.gate, self.came = asyncio.Event(), asyncio.Event()
        self.gate.set()
        self.failures: list[Exception] = []

    async def write(self, numbers: Sequence[int]) -> list[bool]:
        """Odd ones are not done; 13 cannot be written."""
        self.groups.append(list(numbers))
        self.came.set()
        await self.gate.wait()
        if self.failures:
            raise self.failures.pop()
        if 13 in numbers:
            raise ValueError("13")
        return [number % 2 == 0 for number in numbers]


@pytest.fixture
def written() -> Written:
    """Nothing yet."""
    return Written()


async def _answers(group: grouped.Grouped[int], *numbers: int) -> list[object]:
    return list(await asyncio.gather(*map(group.put, numbers), return_exceptions=True))


async def test_those_of_one_moment_are_one_group_and_each_has_its_own_answer(written: Written) -> None:
    group = grouped.Grouped(written.write, 100)
    assert await _answers(group, 1, 2, 3, 4) == [False, True, False, True]
    assert await group.put(6)
    assert written.groups == [[1, 2, 3, 4], [6]]


async def test_those_that_come_during_a_write_are_the_next_group(written: Written) -> None:
    group = grouped.Grouped(written.write, 3)
    written.gate.clear()
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(group.put(0))
        await written.came.wait()
        for number in range(1, 6):
            tasks.create_task(group.put(number))
        await asyncio.sleep(0)
        written.gate.set()
    assert written.groups == [[0], [1, 2, 3], [4, 5]]


async def test_one_that_cannot_be_written_fails_alone(written: Written) -> None:
    failed, *others = sorted(await _answers(grouped.Grouped(written.write, 100), 2, 13, 4), key=str)
    assert (str(failed), others) == ("13", [True, True])


async def test_an_outage_is_the_answer_of_all_and_the_next_are_written(written: Written) -> None:
    group = grouped.Grouped(written.write, 100)
    written.failures = [errors.Unavailable("away")]
    found = await _answers(group, 2, 4)
    assert [type(answer) for answer in found] == [errors.Unavailable] * 2
    assert len(written.groups) == 1
    assert await _answers(group, 2, 4) == [True, True]


async def test_one_whose_caller_is_stopped_is_written_all_the_same(written: Written) -> None:
    group = grouped.Grouped(written.write, 100)
    written.gate.clear()
    async with asyncio.TaskGroup() as tasks:
        stopped, other = tasks.create_task(group.put(2)), tasks.create_task(group.put(4))
        await written.came.wait()
        stopped.cancel()
        await asyncio.wait({stopped})
        written.gate.set()
    assert (written.groups, other.result(), stopped.cancelled()) == ([[2, 4]], True, True)


async def test_what_waits_is_written_before_it_closes(written: Written) -> None:
    group = grouped.Grouped(written.write, 1)
    waiting = asyncio.gather(*map(group.put, (2, 4, 6)))
    await asyncio.sleep(0)
    await group.close()
    assert waiting.done()
    assert written.groups == [[2], [4], [6]]


async def test_what_cannot_be_written_in_time_is_told(written: Written, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grouped, "_FLUSH_S", 0.01)
    group = grouped.Grouped(written.write, 1)
    written.gate.clear()
    waiting = asyncio.gather(*map(group.put, (2, 4)), return_exceptions=True)
    await written.came.wait()
    await group.close()
    assert [type(answer) for answer in await waiting] == [errors.Unavailable] * 2
