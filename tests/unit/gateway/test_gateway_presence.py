"""Sockets of one user at two gateways: counted together, replaced across, by each gateway alone while nobody counts for both."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from chassis import limits
from gateway import presence
from netra import errors, ids

_USER = ids.UserId.new()


class _Shared:
    """What all gateways see: places by key, and what is said."""

    def __init__(self) -> None:
        self.held: dict[str, set[str]] = {}
        self.away = False
        self.heard: list[asyncio.Queue[str]] = []
        self.renewed = asyncio.Event()

    def _ask(self) -> None:
        if self.away:
            raise errors.Unavailable

    async def take(self, key: str, holder: str, most: int, group: str = "") -> list[str] | None:
        self._ask()
        mine = self.held.setdefault(key, set())
        replaced = sorted(one for one in mine if group and one.startswith(group) and one != holder)
        if replaced and replaced[-1] > holder:
            raise limits.Superseded
        if len(mine) - len(replaced) >= most:
            return None
        mine.difference_update(replaced)
        mine.add(holder)
        return replaced

    async def renew(self, held: limits.Held) -> None:
        self._ask()
        for key, holder in held:
            self.held.setdefault(key, set()).add(holder)
        self.renewed.set()

    async def release(self, held: limits.Held) -> None:
        self._ask()
        for key, holder in held:
            self.held.get(key, set()).discard(holder)

    async def publish(self, channel: str, message: str) -> None:
        for one in self.heard:
            one.put_nowait(message)

    async def listen(self, channel: str) -> AsyncIterator[str]:
        heard: asyncio.Queue[str] = asyncio.Queue()
        self.heard.append(heard)
        while True:
            yield await heard.get()


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(presence, "_SECOND_LOOK_S", 0.0)


def _two(shared: _Shared) -> tuple[presence.Presence, presence.Presence]:
    return presence.Presence(shared, shared), presence.Presence(shared, shared)


async def test_two_gateways_count_together() -> None:
    one, other = _two(_Shared())
    assert await one.enter(_USER, "c1", "", 2)
    assert await other.enter(_USER, "c2", "", 2)
    assert not await one.enter(_USER, "c3", "", 2)
    assert await one.enter(ids.UserId.new(), "c4", "", 2)
    one.leave("c3")
    other.leave("c2")
    # what was closed here is given back before anything is asked
    assert await other.enter(_USER, "c5", "", 2)


async def test_one_that_is_being_closed_elsewhere_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    shared = _Shared()
    one, other = _two(shared)
    assert await one.enter(_USER, "c1", "", 1)
    monkeypatch.setattr(presence, "_SECOND_LOOK_S", 0.2)
    async with asyncio.timeout(5), asyncio.TaskGroup() as group:
        running = group.create_task(one.run(lambda _: None))
        entering = group.create_task(other.enter(_USER, "c2", "", 1))
        await asyncio.sleep(0)
        one.leave("c1")
        assert await entering
        running.cancel()


async def test_a_client_that_comes_to_another_gateway_leaves_the_first() -> None:
    shared = _Shared()
    one, other = _two(shared)
    sent_away: asyncio.Queue[str] = asyncio.Queue()
    async with asyncio.timeout(5), asyncio.TaskGroup() as group:
        running = group.create_task(one.run(sent_away.put_nowait))
        for _ in range(5):
            await asyncio.sleep(0)
        assert await one.enter(_USER, "c1", "tab", 1)
        assert await other.enter(_USER, "c2", "tab", 1)
        assert await sent_away.get() == "c1"
        # its own end does not take the place of the newer one away
        one.leave("c1")
        assert not await one.enter(_USER, "c3", "", 1)
        running.cancel()


async def test_while_nobody_counts_for_all_everyone_is_let_in_and_counted_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(presence, "_RENEW_S", 0.01)
    shared = _Shared()
    one, other = _two(shared)
    shared.away = True
    for connection_id in ("c1", "c2", "c3"):
        assert await one.enter(_USER, connection_id, "", 1)
    one.leave("c3")
    async with asyncio.timeout(5), asyncio.TaskGroup() as group:
        running = group.create_task(one.run(lambda _: None))
        shared.away = False
        await shared.renewed.wait()
        running.cancel()
    assert shared.held == {f"sockets:{_USER}": {" c1", " c2"}}
    assert not await other.enter(_USER, "c4", "", 1)


async def test_a_gateway_that_ends_gives_everything_back() -> None:
    shared = _Shared()
    one, other = _two(shared)
    assert await one.enter(_USER, "c1", "", 1)
    await one.close()
    assert await other.enter(_USER, "c2", "", 1)


async def test_an_older_handshake_of_a_client_does_not_send_the_newer_one_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(presence, "_SECOND_LOOK_S", 0.05)
    shared = _Shared()
    one, other = _two(shared)
    assert await other.enter(_USER, "x1", "", 9)
    assert await other.enter(_USER, "x2", "", 9)
    async with asyncio.timeout(5), asyncio.TaskGroup() as group:
        # there is no room at first; before it looks again the client has come anew
        older = group.create_task(_superseded(one, "c1"))
        await asyncio.sleep(0)
        one.leave("c1")
        other.leave("x1")
        await other._release()
        assert await one.enter(_USER, "c2", "tab", 2)
        await older
    assert shared.held == {f"sockets:{_USER}": {" x2", "tab c2"}}


async def test_a_slow_handshake_that_is_overtaken_at_another_gateway_is_the_older_one() -> None:
    shared = _Shared()
    one, other = _two(shared)
    assert await other.enter(_USER, "c2", "tab", 3)
    await _superseded(one, "c1")
    assert shared.held == {f"sockets:{_USER}": {"tab c2"}}


async def _superseded(one: presence.Presence, connection_id: str) -> None:
    with pytest.raises(errors.Unavailable):
        await one.enter(_USER, connection_id, "tab", 2)


async def test_what_is_given_back_while_it_is_renewed_stays_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(presence, "_RENEW_S", 0.01)
    shared = _Shared()
    one, other = _two(shared)
    assert await one.enter(_USER, "c1", "", 1)
    renew = shared.renew

    async def overtaken(held: limits.Held) -> None:
        one.leave("c1")
        await one._release()
        await renew(held)

    monkeypatch.setattr(shared, "renew", overtaken)
    async with asyncio.timeout(5), asyncio.TaskGroup() as group:
        running = group.create_task(one.run(lambda _: None))
        await shared.renewed.wait()
        for _ in range(5):
            await asyncio.sleep(0)
        assert await other.enter(_USER, "c2", "", 1)
        running.cancel()


async def test_a_renewal_that_failed_is_soon_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(presence, "_RENEW_S", 0.01)
    monkeypatch.setattr(presence, "_RETRY_S", 0.01)
    shared = _Shared()
    one, _ = _two(shared)
    renew = shared.renew

    async def failing(_: limits.Held) -> None:
        monkeypatch.setattr(shared, "renew", renew)
        raise errors.Unavailable

    monkeypatch.setattr(shared, "renew", failing)
    assert await one.enter(_USER, "c1", "", 1)
    async with asyncio.timeout(5), asyncio.TaskGroup() as group:
        running = group.create_task(one.run(lambda _: None))
        for _ in range(3):
            await asyncio.sleep(0)
        # from the second one on
        monkeypatch.setattr(presence, "_RENEW_S", 60.0)
        await shared.renewed.wait()
        running.cancel()
