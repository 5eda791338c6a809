"""Rows of contexts and of the audit trail, the same for both roles: their columns, their pages, and what they become."""

from __future__ import annotations

from collections.abc import Sequence

from chassis.postgres import Row, Transaction
from netra import ids
from netra.context import UserExecutionContext
from services.context.contexts import About, Entry, Filter, Stored, closed

FRAME = (
    "context_id, user_id, tenant_id, session_id, thread_id, run_id, request_id, connection_id, roles, tier, scope, created_at,"
    " deadline, depth, parent_request_id, correlation_id, agent_context, audit_metadata"
)
# the lock that whoever adds a line holds a share of, from before the line has its id
_SETTLED = "SELECT pg_advisory_xact_lock(6, uuid_hash($1::uuid) & 255)"
_ENTRY = "id, at, context_id, thread_id, actor, action, correlation_id, detail::text AS detail"
# a page of the longest contexts must fit into one answer
_PAGE_BYTES = 2 * 1024 * 1024
Query = tuple[str, list[object]]
# What is asked for under a request id when everything of a user is to be erased.
EVERYTHING = "erase everything"
# That nobody had the file `a` erased: files are given up a few at a time, and are not there for who had it done from the first moment on.
# OFFSET: looked up for each file of a page, which must not be gathered and sorted for that.
STAYS = (
    "NOT EXISTS (SELECT FROM context.changes AS e WHERE e.user_id = a.user_id"
    f" AND e.asked = '{EVERYTHING}' AND e.done_at IS NULL AND e.asked_at >= a.created_at OFFSET 0)"
    " AND NOT EXISTS (SELECT FROM context.threads AS e WHERE e.thread_id = a.thread_id AND e.erased_at IS NOT NULL OFFSET 0)"
)


def still_open(user: str = "$1", context: str = "$2", *, held: bool = False) -> str:
    """That a context is not closed, as part of a statement that writes or reads in it: `user` and `context` are its parameters.

    Who writes has it `held`: what the statement waits for may take longer than the context lasts, so nobody closes it meanwhile.
    """
    return (
        f"EXISTS (SELECT FROM context.contexts AS still WHERE still.user_id = {user} AND still.context_id = {context}"
        f" AND still.closed_at IS NULL{' FOR SHARE' if held else ''})"
    )


async def refuse_closed(transaction: Transaction, user_id: ids.UserId, context_id: ids.ContextId) -> None:
    """Raises `FailedPrecondition` for a context that is closed, or not there any more."""
    if not await transaction.value(f"SELECT {still_open()}", user_id, context_id):
        raise closed()


def writable(user: str, thread: str) -> str:
    """That a thread is the user's, or granted to them for writing, and neither deleted nor erased; `thread` is an alias of its table."""
    return f"{thread}.deleted_at IS NULL AND {thread}.erased_at IS NULL AND {writer(user, thread)}"


def reader(user: str, thread: str) -> str:
    """That a thread is the user's, or granted to them, whether or not it is deleted. Row-level security says so, too."""
    return (
        f"({thread}.user_id = {user} OR EXISTS (SELECT FROM context.grants AS g WHERE g.thread_id = {thread}.thread_id"
        f" AND g.grantee_id = {user} AND g.withdrawn_at IS NULL))"
    )


def writer(user: str, thread: str) -> str:
    """That a thread is the user's, or granted to them for writing, whether or not it is deleted."""
    return (
        f"({thread}.user_id = {user} OR EXISTS (SELECT FROM context.grants AS g WHERE g.thread_id = {thread}.thread_id"
        f" AND g.grantee_id = {user} AND g.access = 'write' AND g.withdrawn_at IS NULL))"
    )


def one(user_id: ids.UserId, context_id: ids.ContextId) -> Query:
    """A user's context."""
    query = f"SELECT {FRAME}, asked, closed_at FROM context.contexts WHERE user_id = $1 AND context_id = $2"
    return query, [user_id, context_id]


def page(
    user_id: ids.UserId, wanted: Filter, before: ids.ContextId | None, limit: int, tenant_id: ids.TenantId | None = None
) -> Query:  # fmt: skip
    """A user's contexts made before another one, newest first; fewer than `limit` when they are long. `found` says how many there were.

    A condition that is not asked for is not in the statement: so one plan serves each kind of page.
    """
    arguments: list[object] = [user_id, limit, _PAGE_BYTES]
    conditions = ["user_id = $1"]
    asked = ("context_id <", before), ("thread_id =", wanted.thread_id), ("run_id =", wanted.run_id), ("tenant_id =", tenant_id)
    for condition, value in asked:
        if value is not None:
            arguments.append(value)
            conditions.append(f"{condition} ${len(arguments)}")
    if wanted.open:
        conditions.append("closed_at IS NULL")
    size = "octet_length(agent_context) + octet_length(audit_metadata)"
    query = (
        f"SELECT {FRAME}, asked, closed_at, found FROM"
        f" (SELECT *, sum({size}) OVER (ORDER BY context_id DESC) AS bytes, count(*) OVER () AS found FROM"
        f"   (SELECT {FRAME}, asked, closed_at FROM context.contexts WHERE {' AND '.join(conditions)}"
        "     ORDER BY context_id DESC LIMIT $2) AS page) AS measured"
        " WHERE bytes <= $3 ORDER BY context_id DESC"
    )
    return query, arguments


async def trail(transaction: Transaction, user_id: ids.UserId, about: About, after: int, limit: int) -> list[Entry]:
    """Lines of a user's audit trail behind one of them, oldest first. Of so many as the limit no earlier one comes between them later."""
    query, arguments = lines(user_id, about, after, limit)
    found = await transaction.fetch(query, *arguments)
    if len(found) == limit:
        # ids are given before the commit: those that have one by now have committed it when this lock is free
        await transaction.execute(_SETTLED, user_id)
        found = await transaction.fetch(query, *arguments)
    return [entry(row) for row in found]


def lines(user_id: ids.UserId, about: About, after: int, limit: int) -> Query:
    """Lines of a user's audit trail behind one of them, oldest first, as they are just now."""
    arguments: list[object] = [user_id, after, limit]
    conditions = ["user_id = $1", "id > $2"]
    for condition, value in (("context_id =", about.context_id), ("thread_id =", about.thread_id)):
        if value is not None:
            arguments.append(value)
            conditions.append(f"{condition} ${len(arguments)}")
    return f"SELECT {_ENTRY} FROM context.audit WHERE {' AND '.join(conditions)} ORDER BY id LIMIT $3", arguments


def paged(rows: Sequence[Row]) -> tuple[list[Stored], bool]:
    """The contexts of a page, and whether it was cut short."""
    return [stored(row) for row in rows], bool(rows) and rows[0]["found"] > len(rows)


def stored(row: Row) -> Stored:
    """What a row of contexts says."""
    values = {name: row[name] for name in FRAME.split(", ")}
    frame = UserExecutionContext.restored(**values | {"scope": row["scope"] or None})
    return Stored(frame, row["asked"], row["closed_at"])


def entry(row: Row) -> Entry:
    """What a row of the audit trail says."""
    return Entry(
        row["id"], row["at"], row["context_id"] or "", row["thread_id"] or "", row["actor"], row["action"], row["correlation_id"],
        row["detail"].encode(),
    )  # fmt: skip
