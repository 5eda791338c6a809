"""The walls in the stores themselves: row-level security on every table with user data, key prefixes in Valkey."""

from __future__ import annotations

import itertools

import pytest
import redis.asyncio as redis
from redis.exceptions import NoPermissionError

from chassis import postgres
from standalone import prepare, processes
from tests.fixtures.stack import Standalone

# tables that hold nothing of any user; a new table is either in this list or under forced row-level security
SHARED = {
    "auth.migrations", "auth.signing_keys", "auth.published_keys", "auth.oidc_attempts", "auth.policies", "auth.audit_head",
    "context.migrations", "context.signing_keys",
    "dispatcher.migrations",
    "events.migrations", "events.generation", "events.classes",
}  # fmt: skip


async def test_every_table_with_user_data_forces_row_level_security(stores: Standalone, database: str) -> None:
    query = (
        "SELECT n.nspname || '.' || c.relname AS name, c.relforcerowsecurity AND c.relrowsecurity AS walled"
        " FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace"
        " WHERE n.nspname = ANY($1) AND c.relkind IN ('r', 'p')"
    )
    async with postgres.connection(prepare.on_database(stores.postgres_admin_url, database)) as admin:
        tables = {row["name"]: row["walled"] for row in await admin.fetch(query, list(prepare.SERVICES))}
    assert {name for name, walled in tables.items() if not walled} == SHARED


async def test_the_roles_of_services_own_nothing_and_bypass_nothing(stores: Standalone, database: str) -> None:
    roles = [f"netra_{service}{kind}" for service in prepare.SERVICES for kind in ("", "_system")]
    async with postgres.connection(prepare.on_database(stores.postgres_admin_url, database)) as admin:
        found = await admin.fetch("SELECT rolname, rolsuper OR rolbypassrls AS strong FROM pg_roles WHERE rolname = ANY($1)", roles)
        owned = await admin.value("SELECT count(*) FROM pg_class WHERE pg_get_userbyid(relowner) = ANY($1)", roles)
    assert {row["rolname"]: row["strong"] for row in found} == dict.fromkeys(roles, False)
    assert owned == 0


@pytest.mark.parametrize(("service", "other"), list(itertools.permutations(prepare.SERVICES, 2)))
async def test_a_service_cannot_read_the_schema_of_another(stores: Standalone, database: str, service: str, other: str) -> None:
    password = (stores.secrets / service / "postgres").read_text().strip()
    address = prepare.dsn(stores.postgres_admin_url, f"netra_{service}", password, database)
    async with postgres.connection(address) as mine:
        visible = await mine.value("SELECT has_schema_privilege($1, 'USAGE')", other)
        tables = await mine.value(
            "SELECT count(*) FROM pg_class WHERE relnamespace = to_regnamespace($1) AND relkind IN ('r', 'p')"
            " AND has_table_privilege(oid, 'SELECT')",
            other,
        )
    assert (visible, tables) == (False, 0)


@pytest.mark.parametrize("command", [("GET", "events:x"), ("SET", "events:x", "1"), ("KEYS", "*"), ("SCAN", "0"), ("FLUSHALL",)])
async def test_valkey_keeps_each_service_to_its_prefix(stores: Standalone, command: tuple[str, ...]) -> None:
    password = (stores.secrets / "dispatcher" / "valkey").read_text().strip()
    address = processes.without_user(stores.valkey_admin_url).replace("redis://", f"redis://dispatcher:{password}@")
    async with redis.from_url(address) as mine:
        assert await mine.set("dispatcher:x", "1", ex=5)
        with pytest.raises(NoPermissionError):
            await mine.execute_command(*command)  # type: ignore[no-untyped-call]
