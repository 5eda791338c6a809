"""The pool and the transaction: what concurrent writers, deadlocks, errors, deadlines and a server that goes away may not spoil."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

import pytest

from chassis import lifecycle, postgres
from netra import deadline, errors
from standalone import ports, processes, supervise
from tests.fixtures import proxy
from tests.fixtures import walled as rows
from tests.fixtures.stack import ROOT
from tests.fixtures.walled import Walled

_T = TypeVar("_T")
_STATE = (
    "SELECT current_setting('netra.user_id', true) AS user_id, current_setting('netra.thread_id', true) AS thread_id,"
    " current_setting('search_path') AS path, current_setting('role') AS role,"
    " (SELECT count(*) FROM pg_locks WHERE pid = pg_backend_pid() AND locktype = 'advisory') AS locks,"
    " (SELECT count(*) FROM pg_class WHERE relpersistence = 't') AS temporary, pg_current_xact_id_if_assigned() IS NOT NULL AS wrote"
)


async def _until(true: Callable[[], bool]) -> None:
    """Returns when a condition holds."""
    async with asyncio.timeout(20):
        while not true():  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def _tasks() -> AsyncIterator[lifecycle.Tasks]:
    tasks = lifecycle.Tasks(on_failure=lambda _error: None)
    try:
        yield tasks
    finally:
        await tasks.close()


async def _called(work: Coroutine[Any, Any, _T]) -> _T:
    """In a task of its own, as a call is."""
    async with asyncio.TaskGroup() as group:
        task = group.create_task(work)
    return task.result()


@pytest.fixture
async def proxied(walled: Walled) -> AsyncIterator[proxy.Proxy]:
    """A proxy before PostgreSQL; pools are closed before it ends."""
    async with proxy.listening() as one:
        one.to = rows.port(walled)
        yield one


async def test_twenty_writers_lose_no_update(walled: Walled) -> None:
    database = await walled.pool(size=4)

    async def write(user_id: str) -> None:
        async with database.transaction(user_id) as transaction:
            await rows.count(transaction)

    async with asyncio.TaskGroup() as group:
        for _ in range(20):
            group.create_task(write(rows.user()))
    assert (await walled.counters())["a"] == 20


async def test_a_transaction_takes_three_round_trips(walled: Walled) -> None:
    trips = proxy.Trips(rows.port(walled))
    server = await asyncio.start_server(trips.serve, "127.0.0.1", 0)
    async with server:
        database = await walled.pool(size=1, port=server.sockets[0].getsockname()[1])
        user_id = rows.user()
        for _ in range(2):
            # the second time the statement is prepared
            trips.sent.clear()
            async with database.transaction(user_id, within={"thread_id": rows.user()}) as transaction:
                await transaction.value("SELECT count(*) FROM probe.notes WHERE user_id = $1", user_id)
        assert len(trips.sent) == 3, trips.sent
        assert b"BEGIN" in trips.sent[0]
        assert user_id.encode() in trips.sent[0]
        assert b"COMMIT" in trips.sent[2]


async def test_a_new_connection_does_not_ask_what_types_are_that_come_with_postgresql(walled: Walled) -> None:
    given = [rows.user(), rows.user()]
    for _ in range(2):
        trips = proxy.Trips(rows.port(walled))
        server = await asyncio.start_server(trips.serve, "127.0.0.1", 0)
        async with server:
            database = await walled.pool(size=1, port=server.sockets[0].getsockname()[1])
            async with database.transaction() as transaction:
                assert await transaction.value("SELECT $1::uuid[]", given) == given
    # the first one may have been the first of this process
    assert not any(b"typeinfo" in sent for sent in trips.sent)


@pytest.mark.parametrize("how", ["error", "cancel", "deadline"])
async def test_what_ends_badly_leaves_nothing(walled: Walled, how: str) -> None:
    database = await walled.pool(size=1)
    user_id, written = rows.user(), asyncio.Event()

    async def write() -> None:
        async with database.transaction(user_id, timeout_s=1.0 if how == "deadline" else 10.0) as transaction:
            await rows.note(transaction, user_id, "half")
            written.set()
            if how == "error":
                raise KeyError("half")
            await transaction.value("SELECT pg_sleep(60)")

    async with _tasks() as tasks:
        task = tasks.spawn(write(), "write")
        await written.wait()
        if how == "cancel":
            task.cancel()
        ended = (await asyncio.gather(task, return_exceptions=True))[0]
    assert isinstance(ended, {"error": KeyError, "cancel": asyncio.CancelledError, "deadline": errors.DeadlineExceeded}[how])
    # the one connection is of use, and nobody works on at the server
    assert await rows.seen(database, user_id) == []
    assert await walled.notes() == []
    query = "SELECT query FROM pg_stat_activity WHERE datname = current_database() AND state = 'active' AND pid <> pg_backend_pid()"
    assert await walled.asked(query) == []


async def test_a_deadlock_is_done_again_and_both_succeed(walled: Walled) -> None:
    database = await walled.pool()
    met, attempts = asyncio.Barrier(2), list[str]()

    async def count(first: str, second: str) -> None:
        async def work(transaction: postgres.Transaction) -> None:
            attempts.append(first)
            await rows.count(transaction, first)
            if attempts.count(first) == 1:
                await met.wait()
            await rows.count(transaction, second)

        await database.retried(rows.user(), work)

    await asyncio.gather(count("a", "b"), count("b", "a"))
    assert await walled.counters() == {"a": 2, "b": 2}
    assert len(attempts) == 3


async def test_a_transaction_that_cannot_be_serialised_is_done_again(walled: Walled) -> None:
    database = await walled.pool()
    met, attempts = asyncio.Barrier(2), [0]

    async def work(transaction: postgres.Transaction) -> None:
        attempts[0] += 1
        first = attempts[0] <= 2
        await transaction.execute("SET TRANSACTION ISOLATION LEVEL SERIALIZABLE")
        n = await transaction.value("SELECT n FROM probe.counters WHERE name = 'a'")
        if first:
            await met.wait()
        await transaction.execute("UPDATE probe.counters SET n = $1 WHERE name = 'a'", n + 1)

    await asyncio.gather(*(database.retried(rows.user(), work) for _ in range(2)))
    assert (await walled.counters())["a"] == 2
    assert attempts[0] == 3


@pytest.mark.parametrize("code", ["40001", "40P01"])
async def test_who_gives_way_each_time_is_told(walled: Walled, code: str) -> None:
    database = await walled.pool()
    attempts = [0]

    async def work(transaction: postgres.Transaction) -> None:
        attempts[0] += 1
        await rows.count(transaction)
        await transaction.execute(f"DO $$ BEGIN RAISE EXCEPTION 'again' USING ERRCODE = '{code}'; END $$")

    with pytest.raises(postgres.Victim):
        await database.retried(rows.user(), work, attempts=3)
    assert attempts == [3]
    assert (await walled.counters())["a"] == 0


async def test_nothing_else_is_done_again(walled: Walled) -> None:
    database = await walled.pool()
    user_id, attempts = rows.user(), [0]

    async def work(transaction: postgres.Transaction) -> None:
        attempts[0] += 1
        await rows.note(transaction, user_id, "one")
        await rows.note(transaction, user_id, "one")

    with pytest.raises(postgres.Conflict, match="one_of_each"):
        await database.retried(user_id, work)
    assert attempts == [1]


async def test_a_statement_has_as_long_as_the_call_it_is_for(walled: Walled) -> None:
    database = await walled.pool(size=1)

    async def left_ms(timeout_s: float = 10.0) -> int:
        async with database.transaction(timeout_s=timeout_s) as transaction:
            return int(await transaction.value("SELECT setting FROM pg_settings WHERE name = 'statement_timeout'"))

    async def of_a_call(remaining_s: float | None, timeout_s: float = 10.0) -> int:
        deadline.bind(remaining_s)
        return await left_ms(timeout_s)

    assert 0 < await _called(of_a_call(4.0)) < 4_000
    assert 9_000 < await _called(of_a_call(None)) <= 10_000
    assert await _called(of_a_call(60.0, timeout_s=3.0)) <= 3_000
    assert 9_000 < await left_ms() <= 10_000


async def test_the_callers_deadline_ends_a_statement_at_the_server_too(walled: Walled) -> None:
    database = await walled.pool(size=1)

    async def call() -> None:
        deadline.bind(0.5)
        async with database.transaction() as transaction:
            await transaction.value("SELECT pg_sleep(60)")

    with pytest.raises(ExceptionGroup) as raised:
        await _called(call())
    assert [type(error) for error in raised.value.exceptions] == [errors.DeadlineExceeded]
    await database.check(timeout_s=10)


async def test_what_goes_on_behind_a_call_is_not_bound_to_its_deadline() -> None:
    async def behind() -> float | None:
        return deadline.timeout(10.0)

    deadline.bind(0.0)
    async with _tasks() as tasks:
        assert await tasks.spawn(behind(), "behind") == 10.0
    assert deadline.timeout(10.0) == 0.001
    deadline.bind(None)


async def test_a_hundred_users_in_turn_leave_nothing_behind_on_connections(walled: Walled) -> None:
    database = await walled.pool(size=2)

    async def use(number: int) -> None:
        user_id = rows.user()
        async with database.transaction(user_id, within={"thread_id": rows.user()}) as transaction:
            await rows.note(transaction, user_id, "mine")
            await transaction.execute("SELECT pg_advisory_xact_lock($1)", number)
            if number % 4 == 1:
                raise KeyError(number)
            if number % 4 == 2:
                await transaction.execute("SELECT 1 / 0")
            if number % 4 == 3:
                asyncio.current_task().cancel()  # type: ignore[union-attr]
                await transaction.execute("SELECT pg_sleep(60)")

    async def look() -> None:
        async with database.transaction() as transaction:
            row = await transaction.row(_STATE)
        assert row is not None
        assert (row["user_id"] or "", row["thread_id"] or "", row["role"], row["locks"]) == ("", "", "none", 0)
        assert (row["temporary"], row["wrote"]) == (0, False)
        assert row["path"] == '"$user", public'
        assert await rows.seen(database, None) == []

    async with _tasks() as tasks:
        for number in range(100):
            ended = (await asyncio.gather(tasks.spawn(use(number), "use"), return_exceptions=True))[0]
            expected = (type(None), KeyError, postgres.Unfit, asyncio.CancelledError)[number % 4]
            assert isinstance(ended, expected), ended
            await asyncio.gather(look(), look())
    assert len(await walled.notes()) == 25


async def test_users_at_the_same_time_on_few_connections_see_their_own(walled: Walled) -> None:
    database = await walled.pool(size=3)

    async def use(user_id: str) -> None:
        for number in range(5):
            async with database.transaction(user_id) as transaction:
                await rows.note(transaction, user_id, f"{user_id} {number}")
        assert await rows.seen(database, user_id) == [f"{user_id} {number}" for number in range(5)]

    async with asyncio.TaskGroup() as group:
        for _ in range(20):
            group.create_task(use(rows.user()))


async def test_a_value_that_policies_look_at_cannot_carry_a_statement(walled: Walled) -> None:
    database = await walled.pool(size=1)
    mine, other = rows.user(), rows.user()
    for user_id in ("", "x", f"{mine}'", f"{mine}'; SET LOCAL netra.user_id = '{other}", mine + "\n", "' OR true --"):
        with pytest.raises(postgres.Unfit):
            async with database.transaction(user_id):
                raise AssertionError
    hostile = (
        {"thread_id": "x'; RESET ALL; --"}, {"thread_id": "\\"}, {"thread_id": "ä"}, {"user_id": other}, {"a b": "1"}, {"A": "1"},
    )  # fmt: skip
    for within in hostile:
        with pytest.raises(postgres.Unfit):
            async with database.transaction(mine, within=within):
                raise AssertionError


async def test_what_a_token_allows_beyond_is_seen_in_its_transaction_only(walled: Walled) -> None:
    database = await walled.pool(size=1)
    owner, grantee, thread_id = rows.user(), rows.user(), rows.user()
    async with database.transaction(owner) as transaction:
        query = "INSERT INTO probe.notes (user_id, thread_id, text) VALUES ($1, $2, 'shared'), ($1, $3, 'not shared')"
        await transaction.execute(query, owner, thread_id, rows.user())
    async with database.transaction(grantee, within={"thread_id": thread_id}) as transaction:
        assert [row["text"] for row in await transaction.fetch("SELECT text FROM probe.notes")] == ["shared"]
    assert await rows.seen(database, grantee) == []


async def test_a_statement_that_failed_and_was_swallowed_is_no_success(walled: Walled) -> None:
    database = await walled.pool(size=1)
    user_id = rows.user()

    async def swallow() -> None:
        async with database.transaction(user_id) as transaction:
            await rows.note(transaction, user_id, "lost")
            with contextlib.suppress(Exception):
                await transaction.execute("SELECT 1 / 0")

    with pytest.raises(errors.Internal):
        await swallow()
    assert await walled.notes() == []


async def test_an_error_in_a_savepoint_undoes_what_was_done_in_it(walled: Walled) -> None:
    database = await walled.pool(size=1)
    user_id = rows.user()

    async def inside(transaction: postgres.Transaction, *texts: str, then: str = "SELECT 1") -> None:
        async with transaction.savepoint():
            for text in texts:
                await rows.note(transaction, user_id, text)
            await transaction.execute(then)

    async def too_long(transaction: postgres.Transaction) -> None:
        async with asyncio.timeout(0.2):
            await inside(transaction, "too late", then="SELECT pg_sleep(60)")

    async with database.transaction(user_id) as transaction:
        await rows.note(transaction, user_id, "before")
        async with transaction.savepoint():
            await rows.note(transaction, user_id, "kept")
            with pytest.raises(postgres.Conflict):
                await inside(transaction, "undone", "kept")
            with pytest.raises(TimeoutError):
                await too_long(transaction)
        with pytest.raises(postgres.Unfit):
            await inside(transaction, "undone", then="SELECT 1 / 0")
        await inside(transaction, "after")
    assert [text for _, text in await walled.notes()] == ["before", "kept", "after"]


async def test_outside_of_a_transaction_a_savepoint_is_one(walled: Walled) -> None:
    async def inside(connection: postgres.Transaction) -> None:
        async with connection.savepoint():
            await rows.count(connection)
            async with connection.savepoint():
                await rows.count(connection)
            await connection.execute("SELECT 1 / 0")

    async with postgres.connection(walled.dsn) as connection:
        with pytest.raises(postgres.Unfit):
            await inside(connection)
        async with connection.savepoint():
            await rows.count(connection, "b")
    assert await walled.counters() == {"a": 0, "b": 1}


async def test_who_waits_for_a_connection_is_counted_and_served(walled: Walled) -> None:
    database = await walled.pool(size=2)
    free, inside = asyncio.Event(), [0]

    async def hold() -> None:
        async with database.transaction():
            inside[0] += 1
            await free.wait()

    async with asyncio.TaskGroup() as group:
        for _ in range(5):
            group.create_task(hold())
        await _until(lambda: inside[0] == 2 and database.waiting == 3)
        with pytest.raises(errors.DeadlineExceeded):
            await database.check(timeout_s=0.05)
        assert (database.waiting, inside[0]) == (3, 2)
        free.set()
    assert (database.waiting, inside[0]) == (0, 5)
    assert (await walled.asked("SELECT count(*) AS n FROM pg_stat_activity WHERE application_name = 'tests'"))[0]["n"] == 2


# a commit that takes too long is ended by whichever end is first: the server knows what became of it, we do not
_SLOW = (errors.DeadlineExceeded, postgres.Undecided)


@pytest.mark.parametrize(("name", "expected"), [("lost", (postgres.Undecided,)), ("slow", _SLOW), ("wrong", (postgres.Conflict,))])
async def test_a_commit_that_fails_does_not_look_committed(walled: Walled, name: str, expected: tuple[type[Exception], ...]) -> None:
    database = await walled.pool(size=1)
    with pytest.raises(expected):
        async with database.transaction(timeout_s=1.0 if name == "slow" else 10.0) as transaction:
            await transaction.execute("INSERT INTO probe.counters VALUES ($1, 1)", name)
    assert name not in await walled.counters()
    await database.check(timeout_s=10)


class _Returning:
    """The driver's pool, which takes a connection back only once a time is over, or not at all."""

    def __init__(self, pool: Any, wait_until: float, error: Exception | None) -> None:
        self._pool, self._wait_until, self._error = pool, wait_until, error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pool, name)

    async def release(self, connection: Any, *, timeout: float) -> None:
        loop = asyncio.get_running_loop()
        over = asyncio.Event()
        loop.call_at(self._wait_until, over.set)
        await over.wait()
        await self._pool.release(connection, timeout=timeout)
        if self._error is not None:
            raise self._error


@pytest.mark.parametrize("error", [None, TimeoutError(), ConnectionResetError()])
async def test_a_commit_that_was_answered_is_known_whatever_becomes_of_its_connection(
    walled: Walled, error: Exception | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    # nothing is waited for of one that rests
    monkeypatch.setattr(postgres._Connection, "rests", False)
    database = await walled.pool(size=1)
    loop = asyncio.get_running_loop()
    timeout_s = 2.0
    # the deadline comes between the answer and the return of the connection
    ends = loop.time() + timeout_s
    pool, database._pool = database._pool, _Returning(database._pool, ends + 0.05, error)
    async with database.transaction(timeout_s=timeout_s) as transaction:
        await transaction.execute("INSERT INTO probe.counters VALUES ('known', 1)")
    assert loop.time() > ends
    assert (await walled.counters())["known"] == 1
    database._pool = pool
    assert database.waiting == database._asking == 0
    await database.check(timeout_s=10)


async def test_a_connection_that_rests_is_back_at_once(walled: Walled) -> None:
    database = await walled.pool(size=1)
    async with database.transaction() as transaction:
        await transaction.value("SELECT 1")
    assert database._pool.get_idle_size() == 1
    with pytest.raises(postgres.Undecided):
        await database.alone("SELECT pg_sleep(10)", timeout_s=0.2)
    # whoever comes next must not be met by what the one before was cut with
    for _ in range(3):
        assert [row["one"] for row in await database.alone("SELECT 1 AS one")] == [1]
    assert database.waiting == database._asking == 0


async def test_nobody_does_again_what_may_be_done(walled: Walled) -> None:
    database = await walled.pool(size=1)
    attempts = [0]

    async def work(transaction: postgres.Transaction) -> None:
        attempts[0] += 1
        await transaction.execute("INSERT INTO probe.counters VALUES ('lost', 1)")

    with pytest.raises(postgres.Undecided):
        await database.retried(None, work)
    assert attempts == [1]


async def test_a_connection_that_died_in_the_pool_is_replaced(walled: Walled) -> None:
    database = await walled.pool(size=3)
    # however much of its death has been heard of
    for heard in range(12):
        await asyncio.gather(*(database.check(timeout_s=10) for _ in range(3)))
        await walled.asked("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'tests'")
        for _ in range(heard):
            await asyncio.sleep(0)
        await database.check()


async def test_a_connection_cut_in_the_middle_undoes_its_transaction(walled: Walled, proxied: proxy.Proxy) -> None:
    database = await walled.pool(size=1, port=proxied.port)
    user_id = rows.user()

    async def write() -> None:
        async with database.transaction(user_id) as transaction:
            await rows.note(transaction, user_id, "half")
            proxied.cut()
            await rows.note(transaction, user_id, "other half")

    with pytest.raises(errors.Unavailable):
        await write()
    assert await rows.seen(database, user_id) == []


async def test_a_silent_network_is_given_up_at_the_deadline_and_used_again(walled: Walled, proxied: proxy.Proxy) -> None:
    database = await walled.pool(size=1, port=proxied.port)
    user_id = rows.user()
    async with asyncio.timeout(30), proxied.stalled():
        for _ in range(2):
            with pytest.raises(errors.DeadlineExceeded):
                async with database.transaction(user_id, timeout_s=0.3) as transaction:
                    await rows.note(transaction, user_id, "never")
    assert await rows.seen(database, user_id) == []


async def test_the_pool_is_well_again_after_a_restart_of_the_server(tmp_path: Path) -> None:
    table = tuple(row for row in processes.TABLE if row.name in processes.STORES)
    stack = supervise.Stack(tmp_path, ports.free([row.name for row in table]), table=table, backend="embedded")
    async with stack:
        password = (stack.place.secrets / "context" / "postgres").read_text().strip()
        one = await rows.made(stack.backend.postgres_admin_url, password, "netra")
        async with one.stack:
            database, user_id = await one.pool(size=3), rows.user()
            await asyncio.gather(*(database.check(timeout_s=10) for _ in range(3)))

            async def write(text: str, then: Callable[[], object], wait: str) -> None:
                async with database.transaction(user_id) as transaction:
                    await rows.note(transaction, user_id, text)
                    then()
                    await transaction.execute(wait)

            await write("before", lambda: None, "SELECT 1")
            with pytest.raises(errors.Unavailable):
                await write("half", lambda: stack.kill("postgres"), "SELECT pg_sleep(60)")
            assert await _again(database, user_id) == ["before"]
            await asyncio.gather(*(database.check(timeout_s=10) for _ in range(6)))
            assert database.waiting == 0


async def _again(database: postgres.DatabaseManager, user_id: str) -> list[str]:
    """What a user sees once the server is back; until then the pool says that it is away, and nothing else."""
    async with asyncio.timeout(30):
        while True:
            try:
                return await rows.seen(database, user_id)
            except (errors.Unavailable, errors.DeadlineExceeded):
                await asyncio.sleep(0.05)


# what would stay on a connection when its transaction is over, for whoever has it next
_STAYS = (
    r"\bSET\s+(?!LOCAL|TRANSACTION)(SESSION\s+)?(netra|role|search_path|statement_timeout|lock_timeout)\b", r"\bpg_advisory_lock\b",
    r"\bpg_try_advisory_lock\b", r"\bLISTEN\s+\w", r"CREATE\s+(LOCAL\s+|GLOBAL\s+)?TEMP", r"set_config\([^)]*,\s*false\)", r"WITH\s+HOLD",
)  # fmt: skip


def test_no_statement_of_a_service_leaves_state_on_a_connection() -> None:
    places = [*(ROOT / "services").rglob("*.py"), *(ROOT / "chassis").glob("*.py")]
    files = [file for file in places if "postgres" in file.read_text(encoding="utf-8") and file.name != "migrations.py"]
    assert {"postgres.py", "store.py", "store_threads.py", "store_system.py"} <= {file.name for file in files}
    found = [
        (file.name, match[0]) for file in files for pattern in _STAYS for match in re.finditer(pattern, file.read_text(encoding="utf-8"))
    ]
    assert found == []
