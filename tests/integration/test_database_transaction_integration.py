"""Transactions of the services over a real PostgreSQL: all or nothing, one user at a time, and a run that is in the record."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from chassis import postgres
from netra import errors
from standalone import prepare
from tests.fixtures import walled as rows
from tests.fixtures.stack import Standalone
from tests.fixtures.storage import Services
from tests.fixtures.walled import Walled

pytestmark = pytest.mark.real_services


class TestDatabaseTransactionIntegration:
    """What a transaction promises."""

    async def test_acid_transaction_rollback_on_error(self, walled: Walled) -> None:
        """Nothing of a transaction is seen before its end, all of it afterwards, and nothing when any statement of it failed."""
        database = await walled.pool()
        user_id = rows.user()
        async with database.transaction(user_id) as transaction:
            await rows.note(transaction, user_id, "first")
            await rows.count(transaction)
            assert await rows.seen(database, user_id) == []
            assert (await walled.counters())["a"] == 0
        assert await rows.seen(database, user_id) == ["first"]
        assert (await walled.counters())["a"] == 1

        async def write(*texts: str) -> None:
            async with database.transaction(user_id) as transaction:
                for text in texts:
                    await rows.note(transaction, user_id, text)
                    await rows.count(transaction)

        with pytest.raises(postgres.Conflict, match="one_of_each"):
            await write("second", "third", "first")
        assert await rows.seen(database, user_id) == ["first"]
        assert (await walled.counters())["a"] == 1

    @pytest.mark.multi_user
    async def test_concurrent_database_operations_isolation(self, walled: Walled) -> None:
        """Twenty users who write and read at once on few connections see whole transactions of their own, and nothing else."""
        database = await walled.pool(size=5)

        async def live(user_id: str) -> None:
            for number in range(4):
                async with database.transaction(user_id) as transaction:
                    await rows.note(transaction, user_id, f"{number} of {user_id}")
                    await rows.note(transaction, user_id, f"{number} again of {user_id}")
                found = await rows.seen(database, user_id)
                assert len(found) == 2 * (number + 1)
                assert all(text.endswith(user_id) for text in found)

        async def look(user_id: str) -> None:
            for _ in range(10):
                assert len(await rows.seen(database, user_id)) % 2 == 0

        async with asyncio.TaskGroup() as group:
            for _ in range(20):
                user_id = rows.user()
                group.create_task(live(user_id))
                group.create_task(look(user_id))
        assert len(await walled.notes()) == 160

    async def test_database_connection_pooling_and_session_management(self, walled: Walled) -> None:
        """A pool has as many connections as it may, no more; they are used again, wait for each other, and carry nothing over."""
        database = await walled.pool(size=3, name="pooling")
        most, now, pids = 0, 0, set[int]()

        async def use() -> None:
            nonlocal most, now
            async with database.transaction(rows.user()) as transaction:
                now += 1
                most = max(most, now)
                pids.add(await transaction.value("SELECT pg_backend_pid()"))
                await transaction.execute("SET LOCAL work_mem = '1MB'")
                now -= 1

        await asyncio.gather(*(use() for _ in range(30)))
        assert 1 <= most <= 3
        assert 1 <= len(pids) <= 3
        state = "SELECT state FROM pg_stat_activity WHERE application_name = 'pooling'"
        assert {row["state"] for row in await walled.asked(state)} == {"idle"}
        async with database.transaction() as transaction:
            left = "SELECT current_setting('netra.user_id', true), source FROM pg_settings WHERE name = 'work_mem'"
            row = await transaction.row(left)
        assert row is not None
        assert (row[0] or "", row["source"] == "session") == ("", False)

    @pytest.mark.multi_user
    async def test_data_consistency_across_user_boundaries(self, walled: Walled) -> None:
        """A row cannot be written for somebody else, moved to them, or taken from them, whatever the statement says."""
        database = await walled.pool()
        one, other = rows.user(), rows.user()
        async with database.transaction(other) as transaction:
            await rows.note(transaction, other, "theirs")

        async def do(statement: str) -> str:
            async with database.transaction(one) as transaction:
                return await transaction.execute(statement, other)

        # what the wall refuses is told without a word of what is behind it
        refused = ("INSERT INTO probe.notes (user_id, text) VALUES ($1, 'planted')", "UPDATE probe.notes SET user_id = $1")
        async with database.transaction(one) as transaction:
            await rows.note(transaction, one, "mine")
        for statement in refused:
            with pytest.raises(errors.PermissionDenied) as raised:
                await do(statement)
            assert "notes" not in raised.value.message
        assert await do("UPDATE probe.notes SET text = 'changed' WHERE user_id = $1") == "UPDATE 0"
        assert await do("DELETE FROM probe.notes WHERE user_id = $1") == "DELETE 0"
        assert sorted(await walled.notes()) == sorted([(other, "theirs"), (one, "mine")])

    async def test_agent_execution_data_persistence(
        self, services: Services, stores: Standalone, database: str, runs: Callable[[Services], object]
    ) -> None:
        """What a run did is in the database when it has ended: the run, its messages and every event, under its user."""
        await services.all()
        user, helper = await services.user(), runs(services)
        started = await helper.start(user)  # type: ignore[attr-defined]
        events = await helper.until(user, started.run_id, "agent_completed")  # type: ignore[attr-defined]
        async with postgres.connection(prepare.on_database(stores.postgres_admin_url, database)) as admin:
            run = await admin.row("SELECT user_id, state, ended_at FROM dispatcher.runs WHERE run_id = $1", started.run_id)
            recorded = await admin.fetch("SELECT user_id, seq, type FROM events.events WHERE run_id = $1 ORDER BY seq", started.run_id)
            messages = await admin.fetch(
                "SELECT user_id, role FROM context.messages WHERE thread_id = $1 ORDER BY position", started.thread_id
            )
            contexts = await admin.fetch("SELECT user_id FROM context.contexts WHERE run_id = $1", started.run_id)
        assert run is not None
        assert str(run["user_id"]) == user.user_id
        assert [row["seq"] for row in recorded] == list(range(1, len(recorded) + 1))
        assert [row["type"] for row in recorded][: len(events)] == [event["type"] for event in events]
        assert messages[0]["role"] == "user"
        assert {str(row["user_id"]) for row in (*recorded, *messages, *contexts)} == {user.user_id}
