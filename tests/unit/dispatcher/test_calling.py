"""Interactive calls as those who asked for them see them: answered before their rows say how they ended."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from chassis import lifecycle
from netra import errors, ids
from services.dispatcher import admission, calling

_ME, _OTHER = ids.UserId.new(), ids.UserId.new()
_WANTED = admission.Wanted("tool", "look", "r", "", b"{}", "", "", 60.0)


class World:
    """One call, which the test answers and ends."""

    def __init__(self) -> None:
        self.calls, self.tasks = calling.Calls(), lifecycle.Tasks(on_failure=lambda _error: None)
        self.answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self.stored = asyncio.Event()
        self.refused: Exception | None = None
        self.call = self.calls.add(
            _ME, _WANTED, calling.Call(ids.RunId.new(), _WANTED.digest(), self.answer, self.tasks.spawn(self._work(), "call"))
        )

    async def _work(self) -> None:
        await self.stored.wait()
        if self.refused is not None:
            raise self.refused

    def fail(self, error: Exception) -> None:
        """It cannot be made."""
        self.refused = error
        self.stored.set()

    async def over(self) -> None:
        """Its row says how it ended."""
        self.stored.set()
        await asyncio.wait({self.call.task})
        # who is told of that has heard of it by then
        await asyncio.sleep(0)


async def test_whoever_asks_is_answered_before_the_row_says_so() -> None:
    world = World()
    asked = world.tasks.spawn(world.call.over(), "asked")
    world.answer.set_result(b"42")
    assert await asked == (world.call.run_id, b"42")
    assert world.calls.known(_ME, _WANTED) == (world.call.run_id, b"42")
    assert not world.call.task.done()
    await world.over()
    assert world.calls.known(_ME, _WANTED) is None


async def test_the_same_request_waits_for_the_answer_and_another_one_is_refused() -> None:
    world = World()
    with pytest.raises(errors.Busy):
        world.calls.known(_ME, _WANTED)
    other = admission.Wanted("tool", "look", "r", "", b'{"a":1}', "", "", 60.0)
    for answered in (False, True):
        with pytest.raises(errors.AlreadyExists):
            world.calls.known(_ME, other)
        if not answered:
            world.answer.set_result(b"42")
    assert world.calls.known(_OTHER, _WANTED) is None
    await world.over()


async def test_who_reads_after_an_answer_waits_for_the_row_and_nobody_else_does() -> None:
    world = World()
    # neither before the answer, nor for what is another user's
    async with asyncio.timeout(0.5):
        await world.calls.stored(_ME)
        world.answer.set_result(b"42")
        await world.calls.stored(_OTHER)
    reads = world.tasks.spawn(world.calls.stored(_ME), "reads")
    for _ in range(5):
        await asyncio.sleep(0)
    assert not reads.done()
    await world.over()
    async with asyncio.timeout(0.5):
        await reads


@pytest.mark.parametrize(
    ("ends", "error"),
    [
        (lambda world: world.call.task.cancel(), errors.Unavailable),
        (lambda world: world.fail(errors.QuotaExceeded("No.")), errors.QuotaExceeded),
    ],
    ids=["let go of", "failed"],
)
async def test_a_call_without_an_answer_says_why(ends: Callable[[World], object], error: type[Exception]) -> None:
    world = World()
    asked = world.tasks.spawn(world.call.over(), "asked")
    await asyncio.sleep(0)
    ends(world)
    with pytest.raises(error):
        await asked
    assert world.calls.known(_ME, _WANTED) is None


async def test_a_caller_who_goes_away_takes_nothing_along() -> None:
    world = World()
    asked = world.tasks.spawn(world.call.over(), "asked")
    await asyncio.sleep(0)
    asked.cancel()
    await asyncio.wait({asked})
    assert asked.cancelled()
    assert not world.call.task.done()
    assert not world.answer.cancelled()
    world.answer.set_result(b"42")
    assert world.calls.known(_ME, _WANTED) == (world.call.run_id, b"42")
    await world.over()
