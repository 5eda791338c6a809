"""What does a read behind row-level security cost, in the transaction that says whose rows are meant, against a plain transaction?

python bench/rls.py [rounds] [seconds per round]

  plain       the driver's own pool and transaction (BEGIN, the read, COMMIT) for a role that no wall holds for
  bare        the same transaction on one connection, without a pool
  walled      the same read as the role of a service, in the transaction that every read of a user is in
  unwalled    that transaction without a user, where no wall holds: what it costs beside the wall

Ids come as text in all of them. Each for one row, for a page of 20 messages of a thread of one's own, and (walled) of a thread that was
granted. One connection each, one read after the other; PostgreSQL is a process of its own on this machine. 2,000 threads of 100 users with
20,000 messages.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import asyncpg
import uvloop

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.harness import report, stores
from chassis import postgres
from standalone import prepare, supervise

GOAL = 1.5
ROUNDS, SECONDS = 7, 0.5
_ID = "'0190{kind:04d}-0000-7000-8000-' || lpad(to_hex({n}), 12, '0')"


def _id(kind: int, n: str) -> str:
    return f"({_ID.format(kind=kind, n=n)})::uuid"


_OWNER, _THREAD = _id(1, "n % 100"), _id(2, "n")
_ROWS = f"""
INSERT INTO context.threads (thread_id, user_id, tenant_id, messages) SELECT {_THREAD}, {_OWNER}, {_id(9, "1")}, 10
FROM generate_series(1, 2000) AS n;
INSERT INTO context.messages (thread_id, position, message_id, user_id, owner_id, request_id, role, content, run_id)
SELECT {_THREAD}, p, {_id(3, "n * 100 + p")}, {_OWNER}, {_OWNER}, 'm' || n || ' ' || p, 'user', repeat('text ', 20), {_id(5, "n")}
FROM generate_series(1, 2000) AS n, generate_series(1, CASE WHEN n <= 100 THEN 100 ELSE 5 END) AS p;
INSERT INTO context.grants (thread_id, owner_id, tenant_id, grantee_id, access)
SELECT {_THREAD}, {_OWNER}, {_id(9, "1")}, {_id(1, "1000")}, 'read' FROM generate_series(1, 20) AS n;
VACUUM ANALYZE;
"""  # noqa: S608 - of constants
_USER, _GRANTEE, _OWN_THREAD = (f"0190{kind:04d}-0000-7000-8000-{n:012x}" for kind, n in ((1, 7), (1, 1000), (2, 7)))
_ONE = "SELECT thread_id, created_at, updated_at, messages FROM context.threads WHERE user_id = $1 AND thread_id = $2"
_PAGE = (
    "SELECT message_id, thread_id, position, role, content, run_id, created_at FROM context.messages"
    " WHERE owner_id = $1 AND thread_id = $2 AND position > 40 ORDER BY position LIMIT 20"
)
Read = Callable[[], Awaitable[None]]


async def _plainly(pool: asyncpg.Pool, query: str, rows: int) -> None:
    async with pool.acquire() as connection, connection.transaction():
        found = await connection.fetch(query, _USER, _OWN_THREAD)
    assert len(found) == rows


async def _barely(connection: asyncpg.Connection, query: str, rows: int) -> None:
    async with connection.transaction():
        found = await connection.fetch(query, _USER, _OWN_THREAD)
    assert len(found) == rows


async def _ids_as_text(connection: asyncpg.Connection) -> None:
    await connection.set_type_codec("uuid", schema="pg_catalog", encoder=str, decoder=str, format="text")


async def _within(pool: postgres.DatabaseManager, user_id: str | None, query: str, rows: int) -> None:
    async with pool.transaction(user_id) as transaction:
        found = await transaction.fetch(query, _USER, _OWN_THREAD)
    assert len(found) == rows


async def _timed(read: Read, seconds: float) -> float:
    """Reads per second."""
    began, until, many = time.perf_counter(), time.perf_counter() + seconds, 0
    while time.perf_counter() < until:
        await read()
        many += 1
    return many / (time.perf_counter() - began)


@contextlib.asynccontextmanager
async def _reads(stack: supervise.Stack) -> AsyncIterator[dict[str, Read]]:
    admin = prepare.on_database(stack.backend.postgres_admin_url, "netra")
    async with contextlib.AsyncExitStack() as opened:
        plain = await opened.enter_async_context(asyncpg.create_pool(admin, min_size=1, max_size=1, init=_ids_as_text))
        for statement in _ROWS.split(";\n"):
            if statement.strip():
                await plain.execute(statement)
        bare = await asyncpg.connect(admin)
        opened.push_async_callback(bare.close)
        await _ids_as_text(bare)
        walled = await postgres.open_pool(stores.dsn(stack, "context"), "bench", size=1, options=postgres.BY_KEY)
        unwalled = await postgres.open_pool(admin, "bench", size=1)
        opened.push_async_callback(walled.close)
        opened.push_async_callback(unwalled.close)
        yield {
            "plain one": functools.partial(_plainly, plain, _ONE, 1),
            "bare one": functools.partial(_barely, bare, _ONE, 1),
            "walled one": functools.partial(_within, walled, _USER, _ONE, 1),
            "unwalled one": functools.partial(_within, unwalled, None, _ONE, 1),
            "plain page": functools.partial(_plainly, plain, _PAGE, 20),
            "bare page": functools.partial(_barely, bare, _PAGE, 20),
            "walled page": functools.partial(_within, walled, _USER, _PAGE, 20),
            "unwalled page": functools.partial(_within, unwalled, None, _PAGE, 20),
            "granted page": functools.partial(_within, walled, _GRANTEE, _PAGE, 20),
        }


async def _measured(rounds: int, seconds: float) -> dict[str, list[float]]:
    async with stores.stack() as stack, _reads(stack) as reads:
        return await report.in_turn({name: functools.partial(_timed, read, seconds) for name, read in reads.items()}, rounds)


def main(rounds: int = ROUNDS, seconds: float = SECONDS) -> int:
    """Returns the exit code: 1 when a walled read takes longer than the goal allows."""
    stores.set_up()
    found = uvloop.run(_measured(rounds, seconds))
    report.table(("read", "reads_per_s_median", "lowest", "highest"), ((name, *report.spread(each, 0)) for name, each in found.items()))
    # how much longer, so the plain rate stands above
    times = {
        name: round(report.ratio(found[f"plain {name.rpartition(' ')[2]}"], found[name]), 2)
        for name in ("walled one", "walled page", "granted page", "unwalled one", "unwalled page", "bare one", "bare page")
    }
    worst = max(times["walled one"], times["walled page"])
    beside = {name.replace(" ", "_"): value for name, value in times.items()}
    return report.verdict("rls", worst <= GOAL, f"<= {GOAL:g} x", f"{worst:.2f} x", **beside, rounds=rounds)


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:2]), *map(float, sys.argv[2:3])))
