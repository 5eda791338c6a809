"""Pages in turn: a few at a time, one of each user, nobody forgotten."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest

from chassis import lifecycle
from services.events import log, paces


class _Record:
    """A record whose pages are read when the test lets them."""

    def __init__(self) -> None:
        self.began: list[str] = []
        self.open: dict[str, asyncio.Future[int]] = {}

    async def page(self, user_id: str, after: int, *, limit: int, max_bytes: int, run_id: str = "") -> log.Page:
        assert user_id not in self.open
        self.began.append(user_id)
        self.open[user_id] = asyncio.get_running_loop().create_future()
        try:
            last = await self.open[user_id]
        finally:
            del self.open[user_id]
        return log.Page([], after + 1, log.Position(last))


class _World:
    def __init__(self) -> None:
        self.record, self.tasks = _Record(), lifecycle.Tasks(on_failure=lambda error: None)
        self.pages = paces.Pages(self.record, 2)

    async def ask(self, *users: str) -> list[asyncio.Task[log.Page]]:
        asked = [self.tasks.spawn(self.pages.page(user, 0, limit=1, max_bytes=1), user) for user in users]
        await _settled()
        return asked

    async def answer(self, user: str, last: int = 1) -> None:
        self.record.open[user].set_result(last)
        await _settled()


@pytest.fixture
async def world() -> AsyncIterator[_World]:
    made = _World()
    yield made
    await made.tasks.close()


async def _settled() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def test_users_come_in_turn_and_one_user_takes_one_place(world: _World) -> None:
    await world.ask("a", "a", "a", "b", "c")
    assert world.record.began == ["a", "b"]
    await world.answer("b")
    assert world.record.began == ["a", "b", "c"]
    await world.answer("c")
    assert list(world.record.open) == ["a"]
    await world.ask("d", "a", "e")
    await world.answer("a")
    await world.answer("d")
    assert world.record.began == ["a", "b", "c", "d", "a", "e"]


async def test_who_gives_up_takes_no_place_and_keeps_none(world: _World) -> None:
    a, b, c, d = await world.ask("a", "b", "c", "d")
    c.cancel()
    a.cancel()
    await _settled()
    assert world.record.began == ["a", "b", "d"]
    await world.ask("e", "f")
    # given its turn and cancelled before it could begin
    world.record.open["b"].set_result(1)
    e = next(iter(asyncio.all_tasks() & {task for task in asyncio.all_tasks() if task.get_name() == "e"}))
    await asyncio.sleep(0)
    e.cancel()
    await _settled()
    assert {b.done(), d.done()} == {True, False}
    assert world.record.began[-1] == "f"
    assert world.pages._waiting == 0
    with contextlib.suppress(asyncio.CancelledError):
        await e


async def test_those_far_behind_have_every_second_turn_at_most(world: _World) -> None:
    for user in ("x", "y"):
        await world.ask(user)
        await world.answer(user, paces.FAR * 2)
    del world.record.began[:]
    await world.ask("a", "b", "x", "y", "c", "d", "e")
    for _ in range(7):
        await world.answer(next(iter(world.record.open)))
    assert world.record.began == ["a", "b", "x", "c", "y", "d", "e"]
