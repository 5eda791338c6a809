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


# what runs as the owner, who is under the wall as well: each was looked at for whom it shows what
DEFINERS = {
    "auth.append_audit", "context.count_artifacts", "dispatcher.erase_said", "dispatcher.erase_some", "dispatcher.export_runs",
    "events.drop_day", "events.earlier_events", "events.earlier_steps", "events.earlier_without_run", "events.prepare_day",
    "events.reopen_days",
}  # fmt: skip
ROLES = [f"netra_{service}{kind}" for service in prepare.SERVICES for kind in ("", "_system")]
_TABLES = (
    "SELECT n.nspname || '.' || c.relname AS name, c.relforcerowsecurity AND c.relrowsecurity AS walled"
    " FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace"
    " WHERE n.nspname = ANY($1) AND c.relkind IN ('r', 'p')"
)
# per policy: its table, whom and what it is for, what it says, and which columns of the table say whose a row is
_POLICIES = (
    "SELECT p.polrelid::regclass::text AS name, p.polname AS policy, p.polcmd::text AS command, p.polpermissive AS permissive,"
    " ARRAY(SELECT CASE WHEN o = 0 THEN 'public' ELSE pg_get_userbyid(o) END FROM unnest(p.polroles) AS o) AS roles,"
    " coalesce(pg_get_expr(p.polqual, p.polrelid), '') AS using, coalesce(pg_get_expr(p.polwithcheck, p.polrelid), '') AS checked,"
    " ARRAY(SELECT attname::text FROM pg_attribute WHERE attrelid = p.polrelid AND attname IN ('user_id', 'owner_id')) AS owners"
    " FROM pg_policy AS p JOIN pg_class AS c ON c.oid = p.polrelid JOIN pg_namespace AS n ON n.oid = c.relnamespace"
    " WHERE n.nspname = ANY($1)"
)
_COMMANDS = {"SELECT": "r", "INSERT": "a", "UPDATE": "w", "DELETE": "d"}
# the transaction says whose rows it is about, and the policy looks at that; bytes of a file are seen with the file
_BOUND = tuple(f"current_setting('netra.{name}'" for name in ("user_id", "thread_id", "owned_thread_id", "written_thread_id"))
_BOUND_ELSEWHERE = {("context.artifact_chunks", "seen")}


async def _walls(url: str) -> dict[str, bool]:
    """Which tables of services are under forced row-level security."""
    async with postgres.connection(url) as admin:
        return {row["name"]: row["walled"] for row in await admin.fetch(_TABLES, list(prepare.SERVICES))}


async def test_every_table_with_user_data_forces_row_level_security(stores: Standalone, database: str) -> None:
    url = prepare.on_database(stores.postgres_admin_url, database)
    walls = await _walls(url)
    assert {name for name, walled in walls.items() if not walled} == SHARED
    assert len(walls) > 30


@pytest.mark.parametrize(
    "table", ["context.forgotten (user_id uuid)", "events.events_new PARTITION OF events.events FOR VALUES IN ('new')"]
)
async def test_a_new_table_without_a_wall_is_found(stores: Standalone, database: str, table: str) -> None:
    url = prepare.on_database(stores.postgres_admin_url, database)
    async with postgres.connection(url) as admin:
        await admin.execute(f"CREATE TABLE {table}")
    walls = await _walls(url)
    assert {name for name, walled in walls.items() if not walled} - SHARED == {table.split()[0]}


async def test_who_may_touch_a_table_has_a_policy_for_it(stores: Standalone, database: str) -> None:
    granted = (
        "SELECT n.nspname || '.' || c.relname AS name, r.rolname AS role, w.command FROM pg_class AS c"
        " JOIN pg_namespace AS n ON n.oid = c.relnamespace, pg_roles AS r, unnest($3::text[]) AS w (command)"
        " WHERE n.nspname = ANY($1) AND c.relkind IN ('r', 'p') AND c.relrowsecurity AND r.rolname = ANY($2)"
        " AND CASE w.command WHEN 'DELETE' THEN has_table_privilege(r.oid, c.oid, 'DELETE')"
        "     ELSE has_any_column_privilege(r.oid, c.oid, w.command) END"
    )
    async with postgres.connection(prepare.on_database(stores.postgres_admin_url, database)) as admin:
        grants = await admin.fetch(granted, list(prepare.SERVICES), ROLES, list(_COMMANDS))
        policies = await admin.fetch(_POLICIES, list(prepare.SERVICES))
    allowed = {(row["name"], role, row["command"]) for row in policies if row["permissive"] for role in row["roles"]}
    without = {
        (row["name"], row["role"], row["command"])
        for row in grants
        if not {(row["name"], row["role"], one) for one in ("*", _COMMANDS[row["command"]])} & allowed
    }
    # one may be told to look, so that a statement is allowed, and see nothing
    assert without == set()
    assert len(grants) > 60


async def test_a_policy_of_users_is_bound_to_whom_the_transaction_is_about(stores: Standalone, database: str) -> None:
    async with postgres.connection(prepare.on_database(stores.postgres_admin_url, database)) as admin:
        policies = await admin.fetch(_POLICIES, list(prepare.SERVICES))
    of_users = {f"netra_{service}" for service in prepare.SERVICES}
    loose, foreign = set(), set()
    for row in policies:
        assert "public" not in row["roles"], row["name"]
        if not of_users & set(row["roles"]):
            continue
        for text in (row["using"], row["checked"]):
            if text and not any(name in text for name in _BOUND) and (row["name"], row["policy"]) not in _BOUND_ELSEWHERE:
                loose.add((row["name"], row["policy"], text))
        # of a row that is made each column that says whose it is is looked at
        if row["command"] in ("a", "*"):
            checked = row["checked"] or row["using"]
            foreign |= {(row["name"], row["policy"], column) for column in row["owners"] if column not in checked}
    assert {one for one in loose if not _narrowing(one)} == set()
    assert foreign == set()


def _narrowing(one: tuple[str, str, str]) -> bool:
    # an UPDATE whose USING is bound already: what it leaves may say less
    return one[:2] == ("context.threads", "shared_write")


async def test_nothing_leads_around_the_walls(stores: Standalone, database: str) -> None:
    functions = (
        "SELECT n.nspname || '.' || p.proname AS name, p.prosecdef AS definer, coalesce(array_to_string(p.proconfig, ','), '') AS config,"
        " has_function_privilege('public', p.oid, 'EXECUTE') AS of_all"
        " FROM pg_proc AS p JOIN pg_namespace AS n ON n.oid = p.pronamespace WHERE n.nspname = ANY($1)"
    )
    views = (
        "SELECT n.nspname || '.' || c.relname AS name FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace"
        " WHERE n.nspname = ANY($1) AND (c.relkind IN ('m', 'f')"
        " OR c.relkind = 'v' AND NOT coalesce(array_to_string(c.reloptions, ','), '') LIKE '%security_invoker=%')"
    )
    members = "SELECT m.member::regrole::text AS member FROM pg_auth_members AS m WHERE m.member = ANY($1::regrole[])"
    async with postgres.connection(prepare.on_database(stores.postgres_admin_url, database)) as admin:
        found = await admin.fetch(functions, list(prepare.SERVICES))
        loose = await admin.fetch(views, list(prepare.SERVICES))
        joined = await admin.fetch(members, ROLES)
    definers = {row["name"]: row for row in found if row["definer"]}
    assert set(definers) == DEFINERS
    # a name that the caller brings would be found first
    assert {name for name, row in definers.items() if "search_path=pg_catalog" not in row["config"] or row["of_all"]} == set()
    assert [row["name"] for row in loose] == []
    assert [row["member"] for row in joined] == []


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
