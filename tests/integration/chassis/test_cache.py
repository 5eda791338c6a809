"""Values over a Valkey of our own: whose they are, how long they last, and that nothing stale is read once a write was answered."""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import redis.asyncio as redis
from redis.exceptions import ConnectionError as RedisConnectionError

from chassis import cache, lifecycle
from netra import errors, ids
from tests.fixtures.own_valkey import Server

_PATIENCE_S = 5.0


class _Source:
    """Where values come from: a row with a version, as a database that answers when it is let."""

    def __init__(self) -> None:
        self.version = 1
        self.loads = 0
        self.asked, self.answers = asyncio.Event(), asyncio.Event()
        self.answers.set()

    async def load(self) -> bytes:
        self.loads += 1
        read = str(self.version).encode()
        self.asked.set()
        await self.answers.wait()
        return read


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    """A Valkey for this test."""
    one = Server(tmp_path)
    await one.start()
    yield one
    one.kill()


@pytest.fixture
async def both(server: Server) -> AsyncIterator[list[cache.Cache]]:
    """Two processes' worth of caches over the same Valkey; patient, because the machine of the tests may be busy."""
    made = [cache.Cache(server.url, "context", "ns", patience_s=_PATIENCE_S) for _ in range(2)]
    yield made
    await asyncio.gather(*(one.close() for one in made))


@pytest.fixture
async def mine(both: list[cache.Cache]) -> list[cache.UserCache]:
    """One user's values, in both processes."""
    user_id = ids.uuid7()
    return [one.of(user_id) for one in both]


@pytest.fixture
async def tasks() -> AsyncIterator[lifecycle.Tasks]:
    """An owner of what runs beside a test."""
    made = lifecycle.Tasks(on_failure=lambda _error: None)
    yield made
    await made.close()


@contextlib.asynccontextmanager
async def _raw(server: Server) -> AsyncIterator[redis.Redis]:
    async with redis.from_url(server.url) as client:
        yield client


async def _gone(value: Callable[[], Awaitable[bytes | None]]) -> None:
    await _until(lambda: _missing(value))


async def _missing(value: Callable[[], Awaitable[bytes | None]]) -> bool:
    return await value() is None


async def _until(true: Callable[[], Awaitable[bool]]) -> None:
    """Returns when a condition holds."""
    async with asyncio.timeout(20):
        while not await true():  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0.01)


async def test_a_value_is_kept_for_its_time_and_as_long_as_it_is_extended(server: Server, mine: list[cache.UserCache]) -> None:
    here, there = mine
    assert await here.get("frame", "a") is None
    assert await here.put("frame", "a", b"1", 60)
    assert await here.put("frame", "b", b"2", 0.05)
    assert await there.get("frame", "a") == b"1"
    await _gone(lambda: there.get("frame", "b"))
    assert await there.extend("frame", "a", 600)
    assert not await there.extend("frame", "b", 600)
    async with _raw(server) as client:
        [key] = await client.keys("context:ns:cache:*:a")
        assert 60_000 < await client.pttl(key) <= 600_000
        # nothing stays for ever
        assert all([await client.pttl(one) > 0 for one in await client.keys("*")])


async def test_a_large_value_is_not_kept_and_no_value_outlives_a_day(server: Server, mine: list[cache.UserCache]) -> None:
    assert not await mine[0].put("frame", "large", bytes(cache.MAX_BYTES + 1), 60)
    assert await mine[0].get("frame", "large") is None
    assert await mine[0].put("frame", "long", b"1", 10 * cache.MAX_TTL_S)
    async with _raw(server) as client:
        values = await client.keys("context:ns:cache:*")
        generations = await client.keys("context:ns:cache-generation:*")
        assert len(values) == 1
        assert await client.pttl(values[0]) < min([await client.pttl(one) for one in generations])


async def test_users_kinds_and_ids_never_meet(both: list[cache.Cache]) -> None:
    one, other = ids.uuid7(), ids.uuid7()
    names = [
        ("frame", "a"),
        ("frame", "a:b"),
        ("frame", "a b"),
        ("frame", "=" + "a" * 64),
        ("frame", "x" * 300),
        ("frame", ""),
        ("row", "a"),
    ]
    for user_id in (one, other):
        for kind, id_ in names:
            assert await both[0].of(user_id).put(kind, id_, f"{user_id} {kind} {id_}".encode(), 60)
    for user_id in (one, other):
        for kind, id_ in names:
            assert await both[1].of(user_id).get(kind, id_) == f"{user_id} {kind} {id_}".encode()
    await both[0].of(one).forget_all()
    assert await both[1].of(one).get("frame", "a") is None
    assert await both[1].of(other).get("frame", "a") is not None
    for user_id in ("", "*", f"{one}:x", f"{one}\n"):
        with pytest.raises(ValueError, match="no user id"):
            both[0].of(user_id)
    for kind in ("", "a:b", "A", "a*", "a\n"):
        with pytest.raises(ValueError, match="no kind"):
            await both[0].of(one).get(kind, "a")


async def test_all_of_a_kind_are_forgotten_by_one_command(server: Server, mine: list[cache.UserCache]) -> None:
    here, there = mine
    for number in range(50):
        await here.put("frame", str(number), b"1", 60)
    await here.put("row", "1", b"1", 60)
    await here.forget("frame", "0")
    assert await there.get("frame", "0") is None
    assert await there.get("frame", "1") == b"1"
    async with _raw(server) as client:
        before = (await client.info("commandstats"))["cmdstat_evalsha"]["calls"]
        await here.forget_all("frame")
        after = await client.info("commandstats")
        # a script that is new is sent in full
        assert after["cmdstat_evalsha"]["calls"] + after.get("cmdstat_eval", {"calls": 0})["calls"] - before <= 20
        assert not {"cmdstat_scan", "cmdstat_keys"} & set(after)
    assert [await there.get("frame", str(number)) for number in range(50)] == [None] * 50
    assert await there.get("row", "1") == b"1"
    await here.put("frame", "1", b"2", 60)
    assert await there.get("frame", "1") == b"2"


async def test_of_many_who_miss_a_value_one_loads(mine: list[cache.UserCache], tasks: lifecycle.Tasks) -> None:
    source = _Source()
    source.answers.clear()
    readers = [tasks.spawn(mine[number % 2].read("row", "1", source.load, 60, wait_s=60, lease_s=60), "read") for number in range(50)]
    await source.asked.wait()
    source.answers.set()
    assert await asyncio.gather(*readers) == [b"1"] * 50
    assert source.loads == 1


class _Loses(cache.Cache):
    """Its connection breaks after the first command was done, before the answer is there."""

    lost = 0

    async def _answer(self, text: str, keys: list[str], arguments: tuple[str | int | bytes, ...]) -> Any:
        answer = await super()._answer(text, keys, arguments)
        if not self.lost:
            self.lost += 1
            raise RedisConnectionError
        return answer


async def test_who_is_not_told_that_the_lease_is_theirs_has_it_all_the_same(server: Server) -> None:
    lossy, source = _Loses(server.url, "context", patience_s=_PATIENCE_S), _Source()
    mine = lossy.of(ids.uuid7())
    # nobody else has the lease: there is nobody to wait for, and what was loaded is kept
    assert await mine.read("frame", "a", source.load, 60, wait_s=0.0, lease_s=600) == b"1"
    assert (await mine.get("frame", "a"), source.loads, lossy.lost) == (b"1", 1, 1)
    await lossy.close()


async def test_a_user_is_the_same_one_however_the_id_is_written(both: list[cache.Cache]) -> None:
    user_id = ids.uuid7()
    reader, writer = both[0].of(user_id), both[1].of(user_id.upper())
    assert user_id != user_id.upper()
    changes: list[Callable[[], Awaitable[None]]] = [
        lambda: writer.forget("frame", "a"), lambda: writer.forget_all("frame"), lambda: writer.forget_all(), lambda: _written(writer),
    ]  # fmt: skip
    for change in changes:
        assert await reader.put("frame", "a", b"1", 60)
        assert await writer.get("frame", "a") == b"1"
        await change()
        assert await reader.get("frame", "a") is None
    assert await reader.count("asked", "a", 1, 60) == 1
    assert await writer.count("asked", "a", 1, 60) == 2


async def _written(writer: cache.UserCache) -> None:
    async with writer.writing(("frame", "a")):
        pass


async def test_who_waits_too_long_loads(mine: list[cache.UserCache], tasks: lifecycle.Tasks) -> None:
    slow, quick = _Source(), _Source()
    slow.answers.clear()
    first = tasks.spawn(mine[0].read("row", "1", slow.load, 60, lease_s=60), "read")
    await slow.asked.wait()
    assert await mine[1].read("row", "1", quick.load, 60, wait_s=0.05) == b"1"
    # the first one still has the right to fill
    assert await mine[1].get("row", "1") is None
    slow.answers.set()
    assert await first == b"1"
    assert await mine[1].get("row", "1") == b"1"


@pytest.mark.parametrize("how", ["error", "cancel", "nothing"])
async def test_a_load_that_ends_badly_holds_up_nobody(mine: list[cache.UserCache], tasks: lifecycle.Tasks, how: str) -> None:
    source, asked = _Source(), asyncio.Event()

    async def bad() -> bytes | None:
        asked.set()
        if how == "cancel":
            await asyncio.Event().wait()
        if how == "error":
            raise KeyError("row")
        return None

    first = tasks.spawn(mine[0].read("row", "1", bad, 60, lease_s=600), "read")
    await asked.wait()
    if how == "cancel":
        first.cancel()
    ended = (await asyncio.gather(first, return_exceptions=True))[0]
    assert type(ended) is {"error": KeyError, "cancel": asyncio.CancelledError, "nothing": type(None)}[how]
    async with asyncio.timeout(30):
        assert await mine[1].read("row", "1", source.load, 60, wait_s=600) == b"1"
    assert await mine[0].get("row", "1") == b"1"


@pytest.mark.parametrize("how", ["write", "forget", "forget kind", "forget user", "put"])
async def test_a_slow_reader_does_not_bring_back_what_was_replaced(mine: list[cache.UserCache], tasks: lifecycle.Tasks, how: str) -> None:
    here, there = mine
    source = _Source()
    source.answers.clear()
    slow = tasks.spawn(here.read("row", "1", source.load, 60, lease_s=600), "read")
    await source.asked.wait()
    if how == "write":
        async with there.writing(("row", "1")):
            source.version = 2
    elif how == "put":
        assert await there.put("row", "1", b"2", 60)
    else:
        source.version = 2
        await (there.forget("row", "1") if how == "forget" else there.forget_all("row" if how == "forget kind" else None))
    source.answers.set()
    assert await slow == b"1"
    assert await there.read("row", "1", source.load, 60) == b"2"


async def test_while_somebody_writes_nothing_is_kept(mine: list[cache.UserCache]) -> None:
    here, there = mine
    source = _Source()
    await there.read("row", "1", source.load, 60)
    async with here.writing(("row", "1"), ("row", "2")):
        assert await there.get("row", "1") is None
        # before the commit the database has the old one: it may be read, not kept
        assert await there.read("row", "1", source.load, 60) == b"1"
        assert not await there.put("row", "2", b"1", 60)
        assert not await there.extend("row", "1", 60)
        source.version = 2
        async with there.writing(("row", "1")):
            pass
        # one writer is done, the other is not
        assert await there.read("row", "1", source.load, 60) == b"2"
        assert await there.get("row", "1") is None
        # other values are none of theirs
        assert await there.put("row", "3", b"1", 60)
    assert await there.read("row", "1", source.load, 60) == b"2"
    assert await there.get("row", "1") == b"2"


@pytest.mark.parametrize(("error", "kept"), [(KeyError, True), (errors.Unavailable, False), (errors.DeadlineExceeded, False)])
async def test_after_a_write_of_which_nobody_knows_values_stay_away(
    mine: list[cache.UserCache], error: type[Exception], kept: bool
) -> None:
    source = _Source()
    with pytest.raises(error):
        async with mine[0].writing(("row", "1")):
            raise error
    assert await mine[1].read("row", "1", source.load, 60) == b"1"
    assert (await mine[1].get("row", "1") is not None) is kept


async def test_a_fence_of_a_writer_that_died_runs_out(server: Server, mine: list[cache.UserCache], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "FENCE_S", 0.2)
    with pytest.raises(errors.Unavailable):
        async with mine[0].writing(("row", "1")):
            raise errors.Unavailable
    await _until(lambda: mine[0].put("row", "1", b"1", 60))
    async with _raw(server) as client:
        assert await client.keys("*fence*") == []


async def test_without_valkey_values_are_loaded_and_no_write_begins(server: Server, mine: list[cache.UserCache]) -> None:
    source, began = _Source(), False
    await mine[0].read("row", "1", source.load, 60)
    server.kill()
    source.version = 2
    assert await mine[0].read("row", "1", source.load, 60) == b"2"
    assert await mine[0].get("row", "1") is None
    assert not await mine[0].put("row", "1", b"1", 60)
    assert not await mine[0].extend("row", "1", 60)
    with pytest.raises(errors.Unavailable):
        await mine[0].count("calls", "1", 1, 60)
    with pytest.raises(errors.Unavailable):
        await mine[0].forget("row", "1")
    with pytest.raises(errors.Unavailable):
        await mine[0].forget_all()
    with pytest.raises(errors.Unavailable):
        async with mine[0].writing(("row", "1")):
            began = True
    assert not began
    await server.start()
    async with asyncio.timeout(20):
        while await mine[0].get("row", "1") is None:
            await mine[0].read("row", "1", source.load, 60)
    assert await mine[1].read("row", "1", source.load, 60) == b"2"


async def test_a_write_that_valkey_was_not_told_of_is_not_answered(server: Server, mine: list[cache.UserCache]) -> None:
    written = []

    async def write() -> None:
        async with mine[0].writing(("row", "1")):
            server.kill()
            written.append(1)

    with pytest.raises(errors.Unavailable):
        await write()
    assert written


async def test_a_wipe_in_the_middle_of_a_write_leaves_nothing_stale(server: Server, mine: list[cache.UserCache]) -> None:
    source = _Source()
    async with mine[0].writing(("row", "1")):
        server.kill()
        await server.start()
        # the fence is gone with all else: what is kept now is what was before the commit
        async with asyncio.timeout(20):
            while await mine[1].get("row", "1") is None:
                await mine[1].read("row", "1", source.load, 60)
        source.version = 2
    assert await mine[1].read("row", "1", source.load, 60) == b"2"


async def test_a_valkey_that_comes_back_with_an_older_state_is_not_believed(server: Server, mine: list[cache.UserCache]) -> None:
    source = _Source()
    await mine[0].read("row", "1", source.load, 600)
    async with _raw(server) as client:
        await client.save()
    async with mine[0].writing(("row", "1")):
        source.version = 2
    server.kill()
    await server.start()
    async with _raw(server) as client:
        assert len(await client.keys("context:ns:cache:*")) == 1
    async with asyncio.timeout(20):
        while True:
            assert await mine[1].read("row", "1", source.load, 600) == b"2"
            if await mine[1].get("row", "1") == b"2":
                return


async def test_a_generation_that_was_evicted_brings_nothing_back(server: Server, mine: list[cache.UserCache]) -> None:
    for kind in (None, "row"):
        await mine[0].put("row", "1", b"1", 60)
        await mine[0].forget_all(kind)
        async with _raw(server) as client:
            await client.delete(*await client.keys("*generation*"))
        assert await mine[1].get("row", "1") is None
        await mine[0].put("row", "2", b"1", 60)
        assert await mine[1].get("row", "1") is None


async def test_a_valkey_that_is_stopped_is_not_waited_for_long(server: Server) -> None:
    one, source = cache.Cache(server.url, "context", patience_s=0.3), _Source()
    values = one.of(ids.uuid7())
    server.tell(signal.SIGSTOP)
    try:
        async with asyncio.timeout(30):
            for _ in range(100):
                assert await values.read("row", "1", source.load, 60) == b"1"
    finally:
        server.tell(signal.SIGCONT)
    async with asyncio.timeout(30):
        while await values.get("row", "1") is None:
            await values.read("row", "1", source.load, 60)
            await asyncio.sleep(0.01)
    await one.close()


async def test_counters_count_each_once(server: Server, mine: list[cache.UserCache]) -> None:
    counted = await asyncio.gather(*(mine[number % 2].count("calls", "1", 1, 60) for number in range(100)))
    assert sorted(counted) == list(range(1, 101))
    assert await mine[0].count("calls", "1", -40, 600) == 60
    assert await mine[0].count("calls", "2", 5, 60) == 5
    async with _raw(server) as client:
        assert all([0 < await client.pttl(key) <= 60_000 for key in await client.keys("*count*")])


@pytest.mark.parametrize("seed", range(4))
async def test_nothing_stale_is_read_after_a_write_was_answered(both: list[cache.Cache], seed: int) -> None:
    """Readers, writers and who forgets, in any order: a read that begins after a write was answered sees it, or a later one."""
    random_, user_id = random.Random(seed), ids.uuid7()
    row, written = {"1": 0, "2": 0}, {"1": 0, "2": 0}
    locks = {"1": asyncio.Lock(), "2": asyncio.Lock()}
    hits = 0

    async def a_moment() -> None:
        for _ in range(random_.randrange(8)):
            await asyncio.sleep(0)

    async def read(values: cache.UserCache, id_: str) -> None:
        nonlocal hits

        async def load() -> bytes:
            nonlocal hits
            hits -= 1
            await a_moment()
            seen = row[id_]
            await a_moment()
            return str(seen).encode()

        hits += 1
        at_least = written[id_]
        value = await values.read("row", id_, load, 60)
        assert value is not None
        assert int(value) >= at_least

    async def write(values: cache.UserCache, id_: str) -> None:
        async with values.writing(("row", id_)):
            await a_moment()
            async with locks[id_]:
                row[id_] += 1
                mine = row[id_]
                await a_moment()
            await a_moment()
        written[id_] = max(written[id_], mine)

    async def work(values: cache.UserCache) -> None:
        for _ in range(60):
            id_, what = random_.choice("12"), random_.random()
            if what < 0.8:
                await read(values, id_)
            elif what < 0.95:
                await write(values, id_)
            else:
                await (values.forget("row", id_) if what < 0.98 else values.forget_all())

    async with asyncio.TaskGroup() as group:
        for number in range(8):
            group.create_task(work(both[number % 2].of(user_id)))
    assert hits > 0
