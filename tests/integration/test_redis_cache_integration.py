"""The cache of a service over the Valkey and the PostgreSQL that it has, with the rights that it has."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from chassis import cache, postgres
from netra import errors
from standalone import processes
from tests.fixtures import walled as rows
from tests.fixtures.stack import Standalone
from tests.fixtures.walled import Walled

pytestmark = pytest.mark.real_services


def _of(stores: Standalone, service: str, user: str, namespace: str) -> cache.Cache:
    """The cache of a service, as another one's user may try to have it."""
    password = (stores.secrets / user / "valkey").read_text().strip()
    address = processes.without_user(stores.valkey_admin_url).replace("redis://", f"redis://{user}:{password}@")
    return cache.Cache(address, service, namespace, patience_s=5.0)


@pytest.fixture
async def caches(stores: Standalone, database: str) -> AsyncIterator[list[cache.Cache]]:
    """Two processes' worth of the context service's cache."""
    made = [_of(stores, "context", "context", database) for _ in range(2)]
    yield made
    await asyncio.gather(*(one.close() for one in made))


class TestRedisCacheIntegration:
    """Values beside a database, by user."""

    async def test_cache_database_synchronization(self, walled: Walled, caches: list[cache.Cache]) -> None:
        """A value is read from the database once; a write takes it away before it is seen, and its readers get the new one."""
        database = await walled.pool()
        user_id, loads = rows.user(), 0
        here, there = (one.of(user_id) for one in caches)
        async with database.transaction(user_id) as transaction:
            await rows.note(transaction, user_id, "old")

        async def load() -> bytes:
            nonlocal loads
            loads += 1
            return (await rows.seen(database, user_id))[0].encode()

        async def change(transaction: postgres.Transaction, text: str) -> None:
            await transaction.execute("UPDATE probe.notes SET text = $2 WHERE user_id = $1", user_id, text)

        assert [await one.read("note", "1", load, 60) for one in (here, there, here)] == [b"old"] * 3
        assert loads == 1
        async with here.writing(("note", "1")), database.transaction(user_id) as transaction:
            await change(transaction, "new")
            # not committed: the old one is right, and is not kept for the time after the commit
            assert await there.read("note", "1", load, 60) == b"old"
        assert await there.read("note", "1", load, 60) == b"new"
        assert await here.get("note", "1") == b"new"

        async def fail() -> None:
            async with here.writing(("note", "1")), database.transaction(user_id) as transaction:
                await change(transaction, "never")
                raise KeyError("never")

        with pytest.raises(KeyError):
            await fail()
        assert await there.read("note", "1", load, 60) == b"new"
        assert await here.get("note", "1") == b"new"

    @pytest.mark.multi_user
    async def test_user_cache_isolation_and_namespacing(self, stores: Standalone, database: str, caches: list[cache.Cache]) -> None:
        """The same kind and id of two users, two systems and two services are different values; a service has no way to another's."""
        one, other = rows.user(), rows.user()
        dispatchers = _of(stores, "dispatcher", "dispatcher", database)
        elsewhere = _of(stores, "context", "context", f"{database}_b")
        places = [caches[0].of(one), caches[0].of(other), elsewhere.of(one), dispatchers.of(one)]
        for number, place in enumerate(places):
            assert await place.get("note", "1") is None
            assert await place.put("note", "1", str(number).encode(), 60)
            assert await place.count("calls", "1", number + 1, 60) == number + 1
        assert [await place.get("note", "1") for place in places] == [b"0", b"1", b"2", b"3"]
        await caches[1].of(one).forget_all()
        assert [await place.get("note", "1") for place in places] == [None, b"1", b"2", b"3"]
        # with the password of another service nothing is read, written or counted
        thief = _of(stores, "context", "dispatcher", database)
        assert await thief.of(other).get("note", "1") is None
        assert not await thief.of(other).put("note", "1", b"poison", 60)
        with pytest.raises(errors.Unavailable):
            await thief.of(other).count("calls", "1", 1, 60)
        assert await caches[0].of(other).get("note", "1") == b"1"
        await asyncio.gather(*(made.close() for made in (dispatchers, elsewhere, thief)))

    async def test_cache_ttl_and_invalidation_patterns(self, caches: list[cache.Cache]) -> None:
        """A value ends with its time, is kept longer when asked for, and goes alone, with its kind, or with all of its user."""
        here, there = (one.of(user_id) for user_id in [rows.user()] for one in caches)
        await here.put("note", "short", b"1", 0.05)
        await here.put("note", "long", b"1", 60)
        async with asyncio.timeout(20):
            while await there.get("note", "short") is not None:  # noqa: ASYNC110 - nobody tells
                await asyncio.sleep(0.01)
        assert await there.extend("note", "long", 600)
        assert not await there.extend("note", "short", 600)
        names = [("note", "1"), ("note", "2"), ("thread", "1"), ("thread", "2")]
        steps: list[tuple[Callable[[], Awaitable[None]], set[tuple[str, str]]]] = [
            (lambda: here.forget("note", "1"), {("note", "1")}),
            (lambda: here.forget_all("note"), {("note", "1"), ("note", "2")}),
            (here.forget_all, set(names)),
        ]
        for step, gone in steps:
            for kind, id_ in names:
                assert await there.put(kind, id_, b"1", 60)
            await step()
            assert {name for name in names if await there.get(*name) is None} == gone

    async def test_concurrent_cache_operations_thread_safety(self, walled: Walled, caches: list[cache.Cache]) -> None:
        """Tasks of two processes that read, write and count at once: one loads for all, each count counts, nothing stale stays."""
        database = await walled.pool()
        user_id = rows.user()
        values = [one.of(user_id) for one in caches]
        async with database.transaction(user_id) as transaction:
            await rows.note(transaction, user_id, "0")
        loads, written = 0, 0

        async def load() -> bytes:
            nonlocal loads
            loads += 1
            return (await rows.seen(database, user_id))[0].encode()

        found = await asyncio.gather(*(values[n % 2].read("note", "1", load, 60, wait_s=60, lease_s=60) for n in range(40)))
        assert (set(found), loads) == ({b"0"}, 1)

        async def read(number: int) -> None:
            for _ in range(10):
                before = written
                value = await values[number % 2].read("note", "1", load, 60)
                assert value is not None
                assert int(value) >= before

        async def write(number: int) -> None:
            nonlocal written
            for _ in range(5):
                async with values[number % 2].writing(("note", "1")), database.transaction(user_id) as transaction:
                    mine = await transaction.value("UPDATE probe.notes SET text = text::int + 1 WHERE user_id = $1 RETURNING text", user_id)
                written = max(written, int(mine))

        async with asyncio.TaskGroup() as group:
            for number in range(6):
                group.create_task(read(number))
                if number < 3:
                    group.create_task(write(number))
        assert written == 15
        assert await values[0].read("note", "1", load, 60) == b"15"
        counted = await asyncio.gather(*(values[n % 2].count("calls", "1", 1, 60) for n in range(50)))
        assert sorted(counted) == list(range(1, 51))
