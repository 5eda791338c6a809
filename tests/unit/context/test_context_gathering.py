"""What several ask is asked together: each gets the answer to what they asked, whatever becomes of the others."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence

import pytest

from chassis import lifecycle
from netra import deadline, errors
from services.context import gathering as gathering_
from services.context.gathering import Gathering


class _Asked:
    """Answers with ten times what it is given, each time after it was let."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.began, self.let = asyncio.Event(), asyncio.Event()
        self.failure: Exception | None = None

    async def put(self, asked: Sequence[int]) -> list[int]:
        self.batches.append(list(asked))
        self.began.set()
        await self.let.wait()
        if self.failure is not None:
            raise self.failure
        return [10 * one for one in asked]


@pytest.fixture
async def asked() -> _Asked:
    return _Asked()


@contextlib.asynccontextmanager
async def _running(asked: _Asked, most: int = 3) -> AsyncIterator[tuple[Gathering[int, int], lifecycle.Tasks]]:
    gathering, tasks = Gathering(asked.put, most), lifecycle.Tasks(on_failure=lambda _error: None)
    tasks.spawn(gathering.run(), "run")
    try:
        yield gathering, tasks
    finally:
        await tasks.close()


async def test_what_comes_meanwhile_is_asked_together_next_and_not_too_much_of_it(asked: _Asked) -> None:
    async with _running(asked) as (gathering, tasks):
        first = tasks.spawn(gathering.ask(1), "first")
        await asked.began.wait()
        others = [tasks.spawn(gathering.ask(number), "other") for number in (2, 3, 4, 5)]
        await asyncio.sleep(0)
        assert asked.batches == [[1]]
        asked.let.set()
        assert await asyncio.gather(first, *others) == [10, 20, 30, 40, 50]
        assert asked.batches == [[1], [2, 3, 4], [5]]


@pytest.mark.parametrize("many", [2, 3])
async def test_where_several_ask_others_are_waited_for(asked: _Asked, monkeypatch: pytest.MonkeyPatch, many: int) -> None:
    # long enough for whatever this machine does meanwhile
    monkeypatch.setattr(gathering_, "_DELAY_S", 0.5)
    asked.let.set()
    async with _running(asked, most=10) as (gathering, tasks):
        first = [tasks.spawn(gathering.ask(number), "first") for number in range(many)]
        await asyncio.sleep(0.01)
        late = tasks.spawn(gathering.ask(7), "late")
        await asyncio.gather(*first, late)
    assert asked.batches == ([[0, 1], [7]] if many == 2 else [[0, 1, 2, 7]])


async def test_who_goes_away_before_is_not_asked_for_and_meanwhile_is_told_nothing(asked: _Asked) -> None:
    async with _running(asked) as (gathering, tasks):
        calls = [tasks.spawn(gathering.ask(number), "call") for number in (1, 2, 3, 4, 5, 6)]
        await asked.began.wait()
        for gone in (calls[1], calls[4]):
            gone.cancel()
        asked.let.set()
        answers = await asyncio.gather(*calls, return_exceptions=True)
        assert [answer for answer in answers if not isinstance(answer, BaseException)] == [10, 30, 40, 60]
        assert asked.batches == [[1, 2, 3], [4, 6]]


async def test_who_has_no_time_left_does_not_wait(asked: _Asked) -> None:
    async def hurried() -> int:
        deadline.bind(0.0)
        return await gathering.ask(2)

    async with _running(asked) as (gathering, tasks):
        patient = tasks.spawn(gathering.ask(1), "patient")
        with pytest.raises(errors.DeadlineExceeded):
            await tasks.spawn(hurried(), "hurried")
        assert not patient.done()
        asked.let.set()
        assert await patient == 10


@pytest.mark.parametrize(
    ("failure", "told"),
    [
        (errors.Unavailable("gone"), errors.Unavailable("gone")), (errors.DeadlineExceeded("late"), errors.DeadlineExceeded("late")),
        (KeyError("a secret"), errors.Internal()),
    ],
)  # fmt: skip
async def test_an_outage_is_told_to_all_and_does_not_last(asked: _Asked, failure: Exception, told: errors.NetraError) -> None:
    asked.failure = failure
    asked.let.set()
    async with _running(asked) as (gathering, _):
        found = await asyncio.gather(*(gathering.ask(number) for number in range(3)), return_exceptions=True)
        assert [(type(one), str(one)) for one in found] == [(type(told), str(told))] * 3
        # each has one of its own
        assert len(set(map(id, found))) == 3
        asked.failure = None
        assert await gathering.ask(4) == 40
