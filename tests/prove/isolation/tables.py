"""The database as each role of a service sees it in somebody's name; and whether anything of the owner's has changed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from chassis import postgres
from standalone import prepare
from tests.fixtures.stack import Standalone
from tests.prove.isolation.answers import OK, Answer
from tests.prove.isolation.judge import Judge
from tests.prove.isolation.people import Party
from tests.prove.isolation.world import World

_TABLES = (
    "SELECT n.nspname AS schema, n.nspname || '.' || c.relname AS name, c.relforcerowsecurity AS walled,"
    " array(SELECT a.attname::text FROM pg_attribute AS a WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped"
    "   ORDER BY a.attnum) AS columns,"
    " array(SELECT a.attname::text FROM pg_attribute AS a WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped"
    "   AND has_column_privilege($2, c.oid, a.attname, 'SELECT') ORDER BY a.attnum) AS readable"
    " FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace"
    " WHERE n.nspname = ANY($1) AND c.relkind IN ('r', 'p') AND NOT c.relispartition"
)
_WHOSE = ("user_id", "owner_id", "grantee_id")
_DENIED, _NOTHING = "42501", " 0"
# who signed in when, what was looked at, and what goes by itself after a while
_MOVING = frozenset(
    "auth.audit auth.sessions auth.refresh_tokens auth.known_devices auth.api_keys auth.revocations auth.login_codes events.steps".split()
)


# what never becomes another while its owner goes on acting
_LASTING = frozenset("auth.users context.messages context.artifacts context.artifact_chunks context.grants events.events".split())


@dataclass(frozen=True, slots=True)
class Table:
    """One table, as one role may read it."""

    schema: str
    name: str
    walled: bool
    columns: tuple[str, ...]
    readable: tuple[str, ...]

    @property
    def whose(self) -> list[str]:
        """The columns that say whose a row is."""
        return [name for name in _WHOSE if name in self.columns]


async def _tables(admin: postgres.Transaction, role: str) -> list[Table]:
    rows = await admin.fetch(_TABLES, list(prepare.SERVICES), role)
    return [Table(row["schema"], row["name"], row["walled"], tuple(row["columns"]), tuple(row["readable"])) for row in rows]


async def probe(world: World, system: Standalone, judge: Judge) -> int:
    """Everything of every table for every role, in B's and C's name and in nobody's; how many tables, each counted once per role."""
    seen = 0
    async with postgres.connection(world.database_url) as admin:
        for service in prepare.SERVICES:
            for kind in ("", "_system"):
                role = f"netra_{service}{kind}"
                secret = (system.secrets / service / f"postgres{kind}").read_text().strip()
                address = prepare.dsn(system.postgres_admin_url, role, secret, system.database)
                async with postgres.connection(address) as mine:
                    for table in await _tables(admin, role):
                        seen += 1
                        await _one(world, judge, admin, mine, role, service, table)
    return seen


async def _one(
    world: World, judge: Judge, admin: postgres.Transaction, mine: postgres.Transaction, role: str, service: str, table: Table
) -> None:
    what = f"{role} on {table.name}"
    if table.schema != service:
        answer = await _tried(mine, None, f"SELECT 1 FROM {table.name} LIMIT 1")  # noqa: S608 - out of the catalogue
        judge.look(what, world["B"], (), answer)
        if answer.code != _DENIED:
            judge.findings.wrong.append(f"{what}: another service's table: {answer.code}")
    elif table.walled and not role.endswith("_system"):
        for who in (world["B"], world["C"], None):
            for statement, harmless in _statements(table, world["A"]):
                answer = await _tried(mine, who, statement)
                name = who.name if who is not None else "nobody"
                judge.look(f"{what} as {name}: {statement}"[:160], who or world["B"], (), answer)
                if answer.code != _DENIED and not answer.told.endswith(harmless):
                    judge.findings.leaks.append(f"{what} as {name}: {statement}: {answer.code} {answer.told}"[:300])
        await _control(world, judge, admin, mine, what, table)


def _statements(table: Table, victim: Party) -> Iterator[tuple[str, str]]:
    """SQL, and how what it says must end when it is not denied."""
    if table.readable:
        yield f"SELECT {', '.join(table.readable)} FROM {table.name}", ""  # noqa: S608 - out of the catalogue
    for column in table.whose:
        mine = f"WHERE {column} = '{victim.user_id}'"
        if column in table.readable:
            yield f"SELECT {column} FROM {table.name} {mine}", _NOTHING  # noqa: S608
        yield f"UPDATE {table.name} SET {column} = {column} {mine}", _NOTHING  # noqa: S608
        yield f"DELETE FROM {table.name} {mine}", _NOTHING  # noqa: S608
        yield f"INSERT INTO {table.name} ({column}) VALUES ('{victim.user_id}')", "denied"  # noqa: S608


async def _tried(mine: postgres.Transaction, who: Party | None, statement: str) -> Answer:
    """A statement in somebody's name, undone at once."""
    await mine.execute("BEGIN")
    try:
        if who is not None:
            await mine.execute("SELECT set_config('netra.user_id', $1, true)", who.user_id)
        if statement.startswith("SELECT"):
            rows = await mine.fetch(statement)
            values = [{name: _text(value) for name, value in row.items()} for row in rows]
            # in rows of one's own are ids that one has named oneself
            foreign: list[Any] = [row for row in values if who is None or who.user_id not in (row.get(name) for name in _WHOSE)]
            return Answer(OK, f"SELECT {len(rows)}", repr(values).encode(), [], foreign)
        return Answer(OK, await mine.execute(statement))
    except Exception as error:  # whatever the driver raises says in its code why
        return Answer(str(getattr(error, "sqlstate", "") or type(error).__name__), str(error))
    finally:
        await mine.execute("ROLLBACK")


def _text(value: Any) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


async def _control(world: World, judge: Judge, admin: postgres.Transaction, mine: postgres.Transaction, what: str, table: Table) -> None:
    """What the owner has there, the owner finds there: else nothing is shown by others finding nothing."""
    owner = world["A"]
    for column in [name for name in table.whose if name in table.readable][:1]:
        query = f"SELECT {column} FROM {table.name} WHERE {column} = '{owner.user_id}'"  # noqa: S608 - out of the catalogue
        if there := len(await admin.fetch(query)):
            answer = await _tried(mine, owner, query)
            judge.control(f"{what} as A", "" if answer.told == f"SELECT {there}" else f"{answer.code} {answer.told}, there are {there}")


async def digests(world: World, user_id: str) -> dict[str, set[str]]:
    """A digest of every row of a user's, by table; of tables in which something moves by itself, none."""
    found: dict[str, set[str]] = {}
    async with postgres.connection(world.database_url) as admin:
        for table in await _tables(admin, "netra_owner"):
            for column in [name for name in table.whose[:2] if table.name not in _MOVING]:
                rows = await admin.fetch(f"SELECT t::text AS said FROM {table.name} AS t WHERE {column} = $1", user_id)  # noqa: S608
                found.setdefault(table.name, set()).update(hashlib.sha256(row["said"].encode()).hexdigest() for row in rows)
    return found


def changed(before: dict[str, set[str]], after: dict[str, set[str]], *, more: bool) -> list[str]:
    """The tables in which something of a user's is another now; with `more` their owner has acted: rows have come on top, and what
    lasts is looked at alone."""
    return [
        f"{name}: {len(rows - after.get(name, set()))} of {len(rows)} rows are gone or others, {len(after.get(name, set()) - rows)} are new"
        for name, rows in before.items()
        if (not more or name in _LASTING) and (rows - after.get(name, set()) or (not more and after.get(name, set()) - rows))
    ]
