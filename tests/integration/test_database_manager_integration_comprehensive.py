"""The database manager over a real PostgreSQL: start, users, errors, load, and the addresses it is reached by."""

from __future__ import annotations

import asyncio
import secrets
from pathlib import Path

import pytest
from pydantic import SecretStr, ValidationError

from chassis import migrations, postgres
from chassis import settings as settings_
from netra import errors
from standalone import prepare, processes
from tests.fixtures import walled as rows
from tests.fixtures.stack import ROOT, Standalone
from tests.fixtures.walled import Walled

pytestmark = pytest.mark.real_services


class TestDatabaseManagerIntegrationComprehensive:
    """What every service takes for granted."""

    async def test_database_manager_real_sqlite_initialization(self, stores: Standalone, database: str) -> None:
        """PostgreSQL that comes with Netra takes the place of SQLite: a pool opens as soon as roles and database are there."""
        password = (stores.secrets / "context" / "postgres").read_text().strip()
        address = prepare.dsn(stores.postgres_admin_url, "netra_context", password, database)
        opened = await postgres.open_pool(address, "start")
        async with opened.transaction() as transaction:
            row = await transaction.row(
                "SELECT current_user AS who, current_database() AS place, current_setting('application_name') AS name,"
                " current_setting('transaction_isolation') AS isolation, current_setting('server_version_num')::int AS version,"
                " current_setting('idle_in_transaction_session_timeout') AS idle"
            )
        assert row is not None
        assert (row["who"], row["place"], row["name"]) == ("netra_context", database, "start")
        assert (row["isolation"], row["idle"]) == ("read committed", "15s")
        assert row["version"] >= 140000
        assert await postgres.schema_version(opened, "context") == migrations.latest(ROOT / "services" / "context" / "migrations")
        assert await postgres.schema_version(opened, "nowhere") == 0
        await opened.close()
        with pytest.raises(errors.Unavailable):
            await opened.check()

    @pytest.mark.multi_user
    async def test_multi_user_data_isolation_real_sessions(self, walled: Walled) -> None:
        """Users see and change their own rows, however the statement asks."""
        database = await walled.pool()
        people = [rows.user() for _ in range(5)]

        async def live(user_id: str) -> None:
            async with database.transaction(user_id) as transaction:
                await rows.note(transaction, user_id, "mine")
            async with database.transaction(user_id) as transaction:
                assert await transaction.execute("UPDATE probe.notes SET text = text || $1::text", f" of {user_id}") == "UPDATE 1"

        await asyncio.gather(*(live(user_id) for user_id in people))
        for user_id in people:
            assert await rows.seen(database, user_id) == [f"mine of {user_id}"]
            async with database.transaction(user_id) as transaction:
                others = "SELECT count(*) FROM probe.notes WHERE user_id <> $1"
                assert await transaction.value(others, user_id) == 0
        assert await rows.seen(database, None) == []
        assert len(await walled.notes()) == 5

    async def test_transaction_rollback_real_database(self, walled: Walled) -> None:
        """A transaction that ends with an error leaves nothing, however much it had done."""
        database = await walled.pool()
        user_id = rows.user()

        async def write() -> None:
            async with database.transaction(user_id) as transaction:
                await transaction.many("INSERT INTO probe.notes (user_id, text) VALUES ($1, $2)", [(user_id, str(n)) for n in range(100)])
                assert await transaction.value("SELECT count(*) FROM probe.notes") == 100
                await rows.count(transaction)
                raise KeyError("not yet")

        with pytest.raises(KeyError, match="not yet"):
            await write()
        assert await walled.notes() == []
        assert (await walled.counters())["a"] == 0

    async def test_connection_health_check_real_database(self, walled: Walled) -> None:
        """The check tells a database that answers from one that does not, and one that is well again."""
        database = await walled.pool(size=1)
        await database.check(timeout_s=10)
        name = walled.dsn.rpartition("/")[2]
        async with postgres.connection(prepare.on_database(walled.admin_dsn, "postgres")) as admin:
            await admin.execute(f"ALTER DATABASE {name} CONNECTION LIMIT 0")
            await admin.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = $1", name)
            with pytest.raises(errors.Unavailable):
                await database.check(timeout_s=10)
            await admin.execute(f"ALTER DATABASE {name} CONNECTION LIMIT -1")
        await database.check(timeout_s=10)

    async def test_concurrent_database_access_thread_safety(self, walled: Walled) -> None:
        """Tasks that write, fail and are cancelled at once over few connections: what is counted is what was told to have succeeded."""
        database = await walled.pool(size=3)

        async def write(number: int) -> bool:
            async with database.transaction(rows.user()) as transaction:
                await rows.count(transaction)
                if number % 5 == 0:
                    raise KeyError(number)
                return True

        async def abandon() -> None:
            # ends in the middle of anything: waiting for a connection, for a lock, or for the commit
            async with asyncio.timeout(secrets.randbelow(20) / 1000):
                await write(0)

        told = await asyncio.gather(*(write(number) for number in range(60)), *(abandon() for _ in range(20)), return_exceptions=True)
        assert (await walled.counters())["a"] == told.count(True) == 48
        assert database.waiting == 0
        await asyncio.gather(*(database.check(timeout_s=10) for _ in range(3)))

    async def test_database_url_builder_integration_real_scenarios(self, stores: Standalone, database: str, tmp_path: Path) -> None:
        """Addresses are made of a place without a password, a role, and a secret file with whatever signs."""
        awkward = "p@ss:w/rd?#%&ü "
        assert settings_.with_credentials("postgresql://h:1/d?sslmode=require", "r@le", SecretStr(awkward)) == (
            "postgresql://r%40le:p%40ss%3Aw%2Frd%3F%23%25%26%C3%BC%20@h:1/d?sslmode=require"
        )
        # credentials that somebody left in the address are not used
        assert settings_.with_credentials("redis://old:pw@h:1/0", "new", SecretStr("x")) == "redis://new:x@h:1/0"
        role = f"awkward_{secrets.token_hex(4)}"
        (tmp_path / "postgres").write_text(awkward.strip())
        url = processes.without_user(stores.postgres_admin_url, database)
        mine = settings_.ProcessSettings(postgres_url=url, secrets_dir=tmp_path)
        async with postgres.connection(prepare.on_database(stores.postgres_admin_url, database)) as admin:
            await admin.execute(f"CREATE ROLE {role} LOGIN PASSWORD '{awkward.strip()}'")
            await admin.execute(f"GRANT CONNECT ON DATABASE {database} TO {role}")
            try:
                opened = await postgres.open_pool(mine.postgres_dsn(role, "postgres"), "awkward", size=1)
                async with opened.transaction() as transaction:
                    assert await transaction.value("SELECT current_user") == role
                await opened.close()
            finally:
                await admin.execute(f"REVOKE ALL ON DATABASE {database} FROM {role}; DROP ROLE {role}")
        with pytest.raises(settings_.MissingSecret, match="nothing_here"):
            mine.postgres_dsn(role, "nothing_here")

    async def test_bulk_operations_performance_realistic_load(self, walled: Walled) -> None:
        """Thousands of rows in one statement or in one message; read back by pages of a key, each once."""
        database = await walled.pool()
        user_id = rows.user()
        async with database.transaction(user_id) as transaction:
            texts = [f"bulk {number:05}" for number in range(5000)]
            await transaction.execute("INSERT INTO probe.notes (user_id, text) SELECT $1, unnest($2::text[])", user_id, texts)
            query = "INSERT INTO probe.notes (user_id, text) VALUES ($1, $2)"
            await transaction.many(query, [(user_id, f"many {number:05}") for number in range(1000)])
        after, found = 0, list[str]()
        async with database.transaction(user_id) as transaction:
            while page := await transaction.fetch(
                "SELECT note_id, text FROM probe.notes WHERE user_id = $1 AND note_id > $2 ORDER BY note_id LIMIT 500", user_id, after
            ):
                found += [row["text"] for row in page]
                after = page[-1]["note_id"]
        assert found == [*texts, *(f"many {number:05}" for number in range(1000))]

    async def test_error_handling_recovery_scenarios(self, walled: Walled) -> None:
        """Each failure comes as an error of ours that says whether to try again, and costs the pool nothing."""
        database = await walled.pool(size=1, lock_timeout="100ms")
        user_id = rows.user()
        statements = {
            "INSERT INTO probe.notes (user_id, text) VALUES ('{user}', 'x'), ('{user}', 'x')": postgres.Conflict,
            "INSERT INTO probe.notes (user_id, text) VALUES ('{user}', NULL)": postgres.Unfit,
            "SELECT 'no uuid'::uuid": postgres.Unfit,
            "SELECT 1 / 0": postgres.Unfit,
            "SET LOCAL statement_timeout = 20; SELECT pg_sleep(60)": errors.DeadlineExceeded,
            "SELECT pg_terminate_backend(pg_backend_pid())": errors.Unavailable,
            "DO $$ BEGIN RAISE SQLSTATE '40001'; END $$": postgres.Victim,
            "DO $$ BEGIN RAISE SQLSTATE '53300'; END $$": errors.Unavailable,
            "UPDATE probe.counters SET n = 1": postgres.Locked,
        }

        async def do(statement: str) -> None:
            async with database.transaction(user_id) as transaction:
                await transaction.execute(statement.format(user=user_id))

        async with postgres.connection(walled.admin_dsn) as admin, admin.savepoint():
            await admin.execute("UPDATE probe.counters SET n = 0")
            for statement, kind in statements.items():
                with pytest.raises(kind) as raised:
                    await do(statement)
                assert getattr(raised.value, "retryable", False) is (kind not in (postgres.Conflict, postgres.Unfit)), statement
                assert await rows.seen(database, user_id) == []

    async def test_database_migration_url_format_validation(self, stores: Standalone, database: str, tmp_path: Path) -> None:
        """The address of migrations names their owner and the database; their files are in order, and what was applied is not edited."""
        password = (stores.secrets / "postgres" / "owner").read_text().strip()
        owner = prepare.dsn(stores.postgres_admin_url, prepare.OWNER, password, database)
        assert owner.startswith(f"postgresql://{prepare.OWNER}:")
        assert owner.endswith(f"/{database}")
        assert prepare.on_database(owner, "other").endswith("/other")
        assert "@" not in processes.without_user(owner, database)
        for name in ("0002_late.sql", "1_short.sql", "0001_Upper.sql"):
            (tmp_path / name).write_text("SELECT 1")
            with pytest.raises(migrations.MigrationError, match="must be named 0001_what"):
                migrations.files(tmp_path)
            (tmp_path / name).unlink()
        async with postgres.connection(stores.postgres_admin_url) as admin:
            await admin.execute(f"GRANT CONNECT, CREATE ON DATABASE {database} TO {prepare.OWNER}")
        file, schema = tmp_path / "0001_things.sql", f"s{secrets.token_hex(4)}"
        file.write_text(f"CREATE TABLE {schema}.things (n int)")
        assert await migrations.apply(owner, schema, tmp_path) == [f"{schema}/0001_things"]
        assert await migrations.apply(owner, schema, tmp_path) == []
        file.write_text(f"CREATE TABLE {schema}.others (n int)")
        with pytest.raises(migrations.MigrationError, match="was edited"):
            await migrations.apply(owner, schema, tmp_path)

    async def test_cross_service_consistency_patterns(self, stores: Standalone, database: str) -> None:
        """Every service has a role and a schema of its own, made by the same rules, and no way into another's."""
        for service in prepare.SERVICES:
            password = (stores.secrets / service / "postgres").read_text().strip()
            address = prepare.dsn(stores.postgres_admin_url, f"netra_{service}", password, database)
            opened = await postgres.open_pool(address, service, size=1)
            assert await postgres.schema_version(opened, service) == migrations.latest(ROOT / "services" / service / "migrations")
            async with opened.transaction() as transaction:
                usable = await transaction.fetch("SELECT nspname FROM pg_namespace WHERE has_schema_privilege(oid, 'USAGE')")
                create = await transaction.value("SELECT bool_or(has_schema_privilege(oid, 'CREATE')) FROM pg_namespace")
                # of the database that was set up as those of users are; the one of this test is a copy without its grants
                temporary = await transaction.value("SELECT has_database_privilege($1, 'TEMPORARY')", stores.database)
            assert {row["nspname"] for row in usable} & set(prepare.SERVICES) == {service}
            assert (create, temporary) == (False, False)
            await opened.close()

    async def test_global_database_manager_singleton_pattern(self, walled: Walled) -> None:
        """There is no global manager: each is made once by whoever wires a process, has limits of its own, and ends on its own."""
        one, two = await walled.pool(size=1, name="one"), await walled.pool(size=2, name="two")
        async with one.transaction() as first:
            async with two.transaction() as second, two.transaction() as third:
                pids = {await held.value("SELECT pg_backend_pid()") for held in (first, second, third)}
            assert len(pids) == 3
            # one is full, and the other knows nothing of it
            with pytest.raises(errors.DeadlineExceeded):
                await one.check(timeout_s=0.05)
            await two.check(timeout_s=10)
        await one.close()
        with pytest.raises(errors.Unavailable):
            await one.check()
        await two.check(timeout_s=10)
        assert settings_.ProcessSettings(postgres_pool=3).postgres_pool == 3
        for size in (1, 0, -1, 201):
            with pytest.raises(ValidationError, match="postgres_pool"):
                settings_.ProcessSettings(postgres_pool=size)

    async def test_realistic_business_scenario_user_lifecycle(self, walled: Walled) -> None:
        """Somebody comes, works, shares with a signed permission, changes their mind, and goes; others notice what they should."""
        database = await walled.pool()
        anna, ben, thread_id = rows.user(), rows.user(), rows.user()

        async def come(transaction: postgres.Transaction) -> int:
            await rows.note(transaction, anna, "draft")
            query = "INSERT INTO probe.notes (user_id, thread_id, text) VALUES ($1, $2, 'shared') RETURNING note_id"
            return int(await transaction.value(query, anna, thread_id))

        note_id = await database.retried(anna, come)
        async with database.transaction(ben, within={"thread_id": thread_id}) as transaction:
            assert await transaction.value("SELECT text FROM probe.notes WHERE note_id = $1", note_id) == "shared"
            # what is shared may be read, not changed
            assert await transaction.execute("UPDATE probe.notes SET text = 'ben was here' WHERE note_id = $1", note_id) == "UPDATE 0"
            assert await transaction.execute("DELETE FROM probe.notes WHERE note_id = $1", note_id) == "DELETE 0"
        with pytest.raises(postgres.Conflict, match="one_of_each"):
            await database.retried(anna, come)
        async with database.transaction(anna) as transaction:
            await transaction.execute("UPDATE probe.notes SET thread_id = NULL WHERE note_id = $1", note_id)
        async with database.transaction(ben, within={"thread_id": thread_id}) as transaction:
            assert await transaction.value("SELECT count(*) FROM probe.notes") == 0
        async with database.transaction(anna) as transaction:
            assert await transaction.execute("DELETE FROM probe.notes") == "DELETE 2"
        assert await walled.notes() == []
