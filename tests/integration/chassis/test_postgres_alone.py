"""A statement alone: a transaction of one round trip, and what becomes of it when its connection dies."""

from __future__ import annotations

import asyncio

import pytest

from chassis import postgres
from netra import errors
from tests.fixtures import proxy
from tests.fixtures import walled as rows
from tests.fixtures.walled import Walled


async def test_a_statement_alone_takes_one_round_trip_and_is_a_transaction(walled: Walled) -> None:
    trips = proxy.Trips(rows.port(walled))
    server = await asyncio.start_server(trips.serve, "127.0.0.1", 0)
    async with server:
        database = await walled.pool(size=1, port=server.sockets[0].getsockname()[1])
        query = "UPDATE probe.counters SET n = n + $1 WHERE name = 'a' RETURNING n"
        for more in (1, 2):
            # the second time it is prepared
            trips.sent.clear()
            assert [row["n"] for row in await database.alone(query, more)] == [2 * more - 1]
        assert len(trips.sent) == 1, trips.sent
    assert (await walled.counters())["a"] == 3


async def test_what_is_set_in_a_statement_alone_is_gone_after_it(walled: Walled) -> None:
    database, user_id = await walled.pool(size=1), rows.user()
    async with database.transaction(user_id) as transaction:
        await rows.note(transaction, user_id, "mine")
    query = (
        "SELECT n.text FROM (SELECT set_config('netra.user_id', $1, true)::uuid AS user_id OFFSET 0) wall"
        " CROSS JOIN LATERAL (SELECT text FROM probe.notes WHERE user_id = wall.user_id) n"
    )
    assert [row["text"] for row in await database.alone(query, user_id)] == ["mine"]
    assert await rows.seen(database, None) == []


@pytest.mark.parametrize(
    ("query", "values", "expected"),
    [
        ("UPDATE probe.counters SET n = 1 / $1::int", (0,), postgres.Unfit), ("SELECT $1::int", ("x",), postgres.Unfit),
        ("INSERT INTO probe.counters VALUES ('a', $1)", (1,), postgres.Conflict), ("SELECT pg_sleep($1)", (60,), errors.DeadlineExceeded),
    ],
    ids=["at the server", "in the driver", "conflict", "too long"],
)  # fmt: skip
async def test_an_error_of_a_statement_alone_is_its_answer(
    walled: Walled, query: str, values: tuple[object, ...], expected: type[Exception]
) -> None:
    database = await walled.pool(size=1, statement_timeout="300ms")
    with pytest.raises(expected) as raised:
        await database.alone(query, *values)
    assert type(raised.value) is expected
    assert await walled.counters() == {"a": 0, "b": 0}
    assert database.waiting == database._asking == 0
    await database.check(timeout_s=10)


async def test_nobody_knows_whether_a_statement_alone_was_done_when_its_time_is_over(walled: Walled) -> None:
    database = await walled.pool(size=1)
    with pytest.raises(postgres.Undecided):
        await database.alone("SELECT pg_sleep(60)", timeout_s=0.2)
    async with database.transaction():
        # nothing was asked yet: it is known
        with pytest.raises(errors.DeadlineExceeded):
            await database.alone("SELECT 1", timeout_s=0.05)
    assert [row["one"] for row in await database.alone("SELECT 1 AS one")] == [1]


async def test_a_statement_alone_is_done_again_when_its_connection_died(walled: Walled) -> None:
    database = await walled.pool(size=3)
    ended = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'tests'"
    # however much of its death has been heard of
    for heard in range(12):
        await asyncio.gather(*(database.check(timeout_s=10) for _ in range(3)))
        await walled.asked(ended)
        for _ in range(heard):
            await asyncio.sleep(0)
        assert [row["one"] for row in await database.alone("SELECT 1 AS one")] == [1]


async def test_a_statement_alone_whose_connection_is_killed_in_use_is_done_again_on_another(walled: Walled) -> None:
    database = await walled.pool(size=2)
    waits = "SELECT pid FROM pg_stat_activity WHERE application_name = 'tests' AND wait_event = 'advisory'"
    async with postgres.connection(walled.admin_dsn) as admin, asyncio.TaskGroup() as group:
        await admin.execute("SELECT pg_advisory_lock(7)")
        query = "UPDATE probe.counters SET n = n + 1 WHERE name = 'a' AND pg_advisory_xact_lock_shared(7) IS NOT NULL RETURNING n"
        task, killed = group.create_task(database.alone(query)), set[int]()
        async with asyncio.timeout(20):
            while len(killed) < 2:
                for row in await admin.fetch(waits):
                    await admin.execute("SELECT pg_terminate_backend($1)", row["pid"])
                    killed.add(row["pid"])
        await admin.execute("SELECT pg_advisory_unlock(7)")
    assert [row["n"] for row in task.result()] == [1]
    assert (await walled.counters())["a"] == 1


async def test_nobody_knows_of_a_statement_alone_that_no_connection_outlives(walled: Walled) -> None:
    database = await walled.pool(size=2)
    with pytest.raises(postgres.Undecided):
        await database.alone("SELECT pg_terminate_backend(pg_backend_pid())")
    with pytest.raises(postgres.Undecided):
        await database.alone("INSERT INTO probe.counters VALUES ('lost', 1)")
    assert "lost" not in await walled.counters()
    assert database.waiting == database._asking == 0
    await database.check(timeout_s=10)


async def test_a_statement_alone_that_had_to_give_way_is_done_again(walled: Walled) -> None:
    database = await walled.pool(size=1)
    waits = "SELECT pid FROM pg_stat_activity WHERE application_name = 'tests' AND wait_event = 'advisory'"
    async with postgres.connection(walled.admin_dsn) as admin, asyncio.TaskGroup() as group:
        # of two that wait for each other the one that looks first gives way
        await admin.execute("SET deadlock_timeout = '60s'")
        await admin.execute("SELECT pg_advisory_lock(8)")
        task = group.create_task(database.alone("SELECT pg_advisory_xact_lock(7) IS NULL AS a, pg_advisory_xact_lock(8) IS NULL AS b"))
        async with asyncio.timeout(20):
            found: list[postgres.Row] = []
            while not found:
                found = await admin.fetch(waits)
        await admin.execute("SELECT pg_advisory_lock(7)")
        await admin.execute("SELECT pg_advisory_unlock_all()")
    assert [tuple(row) for row in task.result()] == [(False, False)]
    assert database.waiting == database._asking == 0
