"""The database as each role of a service sees it in somebody's name; and whether anything of the owner's has changed."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from chassis import postgres
from standalone import prepare
from tests.fixtures.stack import Standalone
from tests.prove.isolation import granted, rows
from tests.prove.isolation.answers import OK, Answer
from tests.prove.isolation.judge import Judge
from tests.prove.isolation.rows import Name, Statement, Table
from tests.prove.isolation.world import World

_TABLES = (
    "SELECT n.nspname AS schema, n.nspname || '.' || c.relname AS name, c.relrowsecurity AND c.relforcerowsecurity AS walled,"
    " array(SELECT a.attname::text FROM pg_attribute AS a WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped"
    "   ORDER BY a.attnum) AS columns,"
    " array(SELECT a.attname::text FROM pg_attribute AS a WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped"
    "   AND has_column_privilege($2, c.oid, a.attname, 'SELECT') ORDER BY a.attnum) AS readable,"
    " array(SELECT a.attname::text FROM pg_attribute AS a WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped"
    "   AND has_column_privilege($2, c.oid, a.attname, 'UPDATE') ORDER BY a.attnum) AS writable"
    " FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace"
    " WHERE n.nspname = ANY($1) AND c.relkind IN ('r', 'p')"
)
# what policies look at beside the user, by schema
_SETTINGS = (
    "SELECT n.nspname AS schema, array_agg(DISTINCT found[1]) AS names FROM pg_policy AS p JOIN pg_class AS c ON c.oid = p.polrelid"
    " JOIN pg_namespace AS n ON n.oid = c.relnamespace,"
    " regexp_matches(concat_ws(' ', pg_get_expr(p.polqual, p.polrelid), pg_get_expr(p.polwithcheck, p.polrelid)),"
    "   'netra\\.([a-z_]+)', 'g') AS found"
    " WHERE n.nspname = ANY($1) GROUP BY n.nspname"
)
_KNOWN = {"user_id", *rows.OPENED}
_DENIED = "42501"
# what cannot be read as what it should be is nothing at all
_HARMLESS = {_DENIED, "22P02"}
# who signed in when, what was looked at, and what goes by itself after a while
_MOVING = frozenset("auth.audit auth.refresh_tokens auth.known_devices auth.login_codes events.steps".split())
# of what moves as well, the columns that do not, and whose a row is
_CHOSEN = {
    "auth.sessions": ("session_id, user_id, expires_at, ended_at, end_reason", "user_id = $1"),
    "auth.api_keys": ("key_id, user_id, session_id, name, prefix, secret_digest, scopes, expires_at", "user_id = $1"),
    "auth.revocations": (
        "session_id, user_id, security, revoked_at",
        "user_id = $1 OR session_id IN (SELECT session_id FROM auth.sessions WHERE user_id = $1)",
    ),
}
# runs of a user that are not over with all that is kept of them
_GOING_ON = (
    "SELECT count(*) FROM dispatcher.runs AS r WHERE r.user_id = $1 AND (r.ended_at IS NULL"
    " OR EXISTS (SELECT FROM context.contexts AS c WHERE c.run_id = r.run_id AND c.closed_at IS NULL))"
)
_STILL_S, _LOOK_S = 60.0, 0.2
# one signs in again, and after a while it does not matter any more what was revoked
_MORE, _LESS = frozenset({"auth.sessions", "auth.api_keys"}), frozenset({"auth.revocations"})
# what never becomes another while its owner goes on acting
_LASTING = frozenset(
    "auth.users auth.sessions auth.api_keys context.messages context.artifacts context.artifact_chunks context.grants events.events".split()
)


@dataclass(frozen=True, slots=True)
class _Asked:
    """One role that asks, with what is needed to judge what it gets."""

    world: World
    judge: Judge
    admin: postgres.Transaction
    mine: postgres.Transaction
    role: str
    settings: tuple[str, ...]


async def _tables(admin: postgres.Transaction, role: str) -> list[Table]:
    found = await admin.fetch(_TABLES, list(prepare.SERVICES), role)
    names = ("columns", "readable", "writable")
    return [Table(row["schema"], row["name"], row["walled"], *(tuple(row[name]) for name in names)) for row in found]


async def probe(world: World, system: Standalone, judge: Judge, only: frozenset[str] = frozenset()) -> int:
    """Everything of every table, or `only` of some, for every role, in B's and C's name and in nobody's; how many were asked for anything
    there, each counted once per role, and statements about threads that were granted."""
    seen = 0
    async with postgres.connection(world.database_url) as admin:
        settings = {row["schema"]: set(row["names"]) for row in await admin.fetch(_SETTINGS, list(prepare.SERVICES))}
        judge.findings.wrong += [f"policies look at netra.{name}: the proof does not" for name in set().union(*settings.values()) - _KNOWN]
        unwalled = {table.name: table for table in await _tables(admin, "netra_owner") if not table.walled and table.personal}
        judge.findings.leaks += [f"{name} has {', '.join(table.personal)} and no wall" for name, table in sorted(unwalled.items())]
        # of some tables alone, who has them: nobody else is let near any
        for service in [one for one in prepare.SERVICES if not only or any(name.startswith(f"{one}.") for name in only)]:
            for kind in ("", "_system"):
                role = f"netra_{service}{kind}"
                secret = (system.secrets / service / f"postgres{kind}").read_text().strip()
                async with postgres.connection(prepare.dsn(system.postgres_admin_url, role, secret, system.database)) as mine:
                    asked = _Asked(world, judge, admin, mine, role, tuple(sorted(settings.get(service, set()) & set(rows.OPENED))))
                    for table in await _tables(admin, role):
                        if not only or table.name in only:
                            seen += await _one(asked, service, table)
    return seen if only else seen + await granted.probe(world, system, judge)


async def _one(asked: _Asked, service: str, table: Table) -> int:
    """Whether it was asked for anything."""
    what, judge = f"{asked.role} on {table.name}", asked.judge
    if table.schema != service:
        answer, _ = await _tried(asked, rows.NOBODY, table, Statement(f"SELECT 1 FROM {table.name} LIMIT 1", "SELECT"))  # noqa: S608
        judge.look(what, asked.world["B"], (), answer)
        if answer.code != _DENIED:
            judge.findings.wrong.append(f"{what}: another service's table: {answer.code}")
        return 1
    # what the service does in nobody's name, its policies narrow
    if asked.role.endswith("_system") or not table.walled:
        return 0
    victim = asked.world["A"]
    for who in rows.names(asked.world, victim, asked.settings):
        for statement in rows.statements(table, who, victim):
            before = await _allowed(asked, statement)
            answer, many = await _tried(asked, who, table, statement)
            judge.look(f"{what} as {who.name}: {statement.text}"[:160], who.party or asked.world["B"], (), answer)
            _judged(judge, f"{what} as {who.name}", statement, answer, many, (before, await _allowed(asked, statement)))
    await _control(asked, what, table)
    return 1


async def _allowed(asked: _Asked, statement: Statement) -> int:
    """Of how many rows the policies say that this one may be told, or may change."""
    return int(await asked.admin.value(f"SELECT count(*) {statement.shown}")) if statement.shown else 0


def _judged(judge: Judge, what: str, statement: Statement, answer: Answer, many: int, allowed: tuple[int, int]) -> None:
    told = f"{what}: {statement.text}: {answer.code} {answer.told}"[:300]
    # not the statement was refused, but what a row would become: so the row was found
    found = answer.code == _DENIED and statement.verb != "INSERT" and "permission denied" not in answer.told
    if answer.code in _HARMLESS and not found:
        if statement.shown and allowed[0]:
            judge.control(what, told)
    elif answer.code != OK or statement.verb == "INSERT" or not min(allowed) <= many <= max(allowed):
        judge.findings.leaks.append(f"{told} ({many} rows, {allowed[0]} of them allowed)")
    elif statement.shown and allowed[0]:
        judge.control(what, "")


async def _tried(asked: _Asked, who: Name, table: Table, statement: Statement) -> tuple[Answer, int]:
    """A statement in somebody's name, undone at once; and how many rows of others it found or changed."""
    mine = asked.mine
    await mine.execute("BEGIN")
    try:
        for name, value in who.settings.items():
            await mine.execute("SELECT set_config($1, $2, true)", f"netra.{name}", value)
        if statement.verb != "SELECT":
            tag = await mine.execute(statement.text)
            return Answer(OK, tag), int(tag.rpartition(" ")[2])
        values = [{name: _text(value) for name, value in row.items()} for row in await mine.fetch(statement.text)]
        # in rows of one's own are ids that one has named oneself
        others = [row for row in values if who.party is None or who.party.user_id not in (row.get(name) for name in rows.WHOSE)]
        # what a setting opens is counted, and else looked at as anything is
        hidden: list[Any] = [row for row in others if not rows.opened(table, who, row)]
        own = [row for row in values if row not in others]
        return Answer(OK, f"SELECT {len(values)}", repr([*own, *hidden]).encode(), [], hidden), len(others)
    except Exception as error:  # whatever the driver raises says in its code why
        return Answer(str(getattr(error, "sqlstate", "") or type(error).__name__), str(error)), 0
    finally:
        await mine.execute("ROLLBACK")


def _text(value: Any) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


async def _control(asked: _Asked, what: str, table: Table) -> None:
    """What the owner has there, the owner finds there: else nothing is shown by others finding nothing."""
    owner = asked.world["A"]
    for column in [name for name in table.whose if name in table.readable][:1]:
        query = f"SELECT {column} FROM {table.name} WHERE {column} = '{owner.user_id}'"  # noqa: S608 - out of the catalogue
        if there := len(await asked.admin.fetch(query)):
            answer, _ = await _tried(asked, rows.of(owner), table, Statement(query, "SELECT"))
            failure = "" if answer.told == f"SELECT {there}" else f"{answer.code} {answer.told}, there are {there}"
            asked.judge.control(f"{what} as A", failure)


async def digests(world: World, user_id: str) -> dict[str, set[str]]:
    """A digest of every row of a user's, by table; of tables in which something moves by itself, of the columns that do not, or none."""
    found: dict[str, set[str]] = {}
    async with postgres.connection(world.database_url) as admin:
        for table in await _tables(admin, "netra_owner"):
            for columns, whose in _looked_at(table):
                query = f"SELECT ROW({columns})::text AS said FROM {table.name} AS t WHERE {whose}"  # noqa: S608 - out of the catalogue
                said = [row["said"] for row in await admin.fetch(query, user_id)]
                found.setdefault(table.name, set()).update(hashlib.sha256(one.encode()).hexdigest() for one in said)
    return found


async def still(world: World, user_id: str) -> dict[str, set[str]]:
    """What a user has, once none of their runs goes on any more and nothing of it changes."""
    before: dict[str, set[str]] | None = None
    async with asyncio.timeout(_STILL_S), postgres.connection(world.database_url) as admin:
        while True:
            after = None if await admin.value(_GOING_ON, user_id) else await digests(world, user_id)
            if after is not None and before == after:
                return after
            before = after
            await asyncio.sleep(_LOOK_S)


def _looked_at(table: Table) -> Iterator[tuple[str, str]]:
    if table.name in _CHOSEN:
        yield _CHOSEN[table.name]
    elif table.name not in _MOVING:
        yield from (("t.*", f"{column} = $1") for column in table.whose[:2])


def changed(before: dict[str, set[str]], after: dict[str, set[str]], *, more: bool) -> list[str]:
    """The tables in which something of a user's is another now; with `more` their owner has acted: rows have come on top, and what
    lasts is looked at alone."""
    found = []
    for name, rows_ in before.items():
        gone = set() if name in _LESS else rows_ - after.get(name, set())
        new = set() if more or name in _MORE else after.get(name, set()) - rows_
        if (not more or name in _LASTING) and (gone or new):
            found.append(f"{name}: {len(gone)} of {len(rows_)} rows are gone or others, {len(new)} are new")
    return found
