"""SQL for grants; every statement is bound to a user id."""

from __future__ import annotations

from datetime import datetime

from chassis.postgres import DatabaseManager, Row, Transaction
from netra import errors, ids
from services.context import changes, store_changes
from services.context.sharing import Grant

_GRANT = "thread_id, grantee_id, access, created_at, withdrawn_at"
# Nobody erases the thread meanwhile. Who is writing a message to it has finished: what they may is looked at by each of their statements.
_HELD = "SELECT thread_id FROM context.threads WHERE user_id = $1 AND thread_id = $2 FOR NO KEY UPDATE"


class SharingStore:
    """Each method is one transaction of one user; row-level security shows what is there for that user, and no other row."""

    def __init__(self, database: DatabaseManager) -> None:
        self._database = database

    async def refuse_others(self, change: changes.Change) -> None:
        """Raises `NotFound` or `PermissionDenied` unless the thread is the user's own and not deleted."""
        async with self._database.transaction(change.user_id) as transaction:
            await _grantable(transaction, change)

    async def grant(self, change: changes.Change, tenant_id: ids.TenantId, grantee_id: ids.UserId, access: str) -> Grant:
        """Let another user read or write; granting again changes the access. Raises `NotFound`, `PermissionDenied`."""
        # granted anew after it was withdrawn it is a new grant
        query = (
            "INSERT INTO context.grants AS g (thread_id, owner_id, tenant_id, grantee_id, access) VALUES ($1, $2, $3, $4, $5)"
            " ON CONFLICT (thread_id, grantee_id) DO UPDATE SET access = excluded.access, withdrawn_at = NULL,"
            "   created_at = CASE WHEN g.withdrawn_at IS NULL THEN g.created_at ELSE excluded.created_at END"
        )
        async with self._database.transaction(change.user_id) as transaction:
            known = await store_changes.begin(transaction, change)
            await transaction.execute(_HELD, change.user_id, change.thread_id)
            await _grantable(transaction, change)
            if known is None:
                await transaction.execute(query, change.thread_id, change.user_id, tenant_id, grantee_id, access)
                await store_changes.note(transaction, change, {})
            return await _granted(transaction, change, grantee_id)

    async def withdraw(self, change: changes.Change, grantee_id: ids.UserId) -> Grant:
        """End a grant, once. Raises `NotFound`, `PermissionDenied`."""
        query = (
            "UPDATE context.grants SET withdrawn_at = clock_timestamp()"
            " WHERE owner_id = $1 AND thread_id = $2 AND grantee_id = $3 AND withdrawn_at IS NULL"
        )
        async with self._database.transaction(change.user_id) as transaction:
            known = await store_changes.begin(transaction, change)
            await transaction.execute(_HELD, change.user_id, change.thread_id)
            # of a deleted thread as well: it may be restored
            await store_changes.owned(transaction, change)
            if known is None and await transaction.execute(query, change.user_id, change.thread_id, grantee_id) == "UPDATE 1":
                await store_changes.note(transaction, change, {})
            return await _granted(transaction, change, grantee_id)

    async def grants(
        self, user_id: ids.UserId, thread_id: ids.ThreadId, after: tuple[datetime, str] | None, limit: int, *, withdrawn: bool
    ) -> list[Grant]:
        """Grants of a thread of the user made after another one, oldest first. Raises `NotFound`, `PermissionDenied`."""
        which = "" if withdrawn else " AND withdrawn_at IS NULL"
        later, place = ("", ()) if after is None else (" AND (created_at, grantee_id) > ($4, $5)", after)
        query = (
            f"SELECT {_GRANT} FROM context.grants WHERE owner_id = $1 AND thread_id = $2{which}{later}"
            " ORDER BY created_at, grantee_id LIMIT $3"
        )
        async with self._database.transaction(user_id) as transaction:
            row = await store_changes.thread(transaction, user_id, thread_id)
            if row is None or row["deleted_at"] is not None:
                raise changes.no_thread()
            if row["access"] != "own":
                raise changes.not_yours()
            return [_grant(row) for row in await transaction.fetch(query, user_id, thread_id, limit, *place)]

    async def access(self, user_id: ids.UserId, thread_id: ids.ThreadId) -> str | None:
        """What the user may do with a thread; with one they deleted, too: before it can be erased its runs are to end."""
        async with self._database.transaction(user_id) as transaction:
            row = await store_changes.thread(transaction, user_id, thread_id)
        return None if row is None else str(row["access"])


async def _grantable(transaction: Transaction, change: changes.Change) -> None:
    if (await store_changes.owned(transaction, change))["deleted_at"] is not None:
        raise changes.no_thread()


async def _granted(transaction: Transaction, change: changes.Change, grantee_id: ids.UserId) -> Grant:
    query = f"SELECT {_GRANT} FROM context.grants WHERE owner_id = $1 AND thread_id = $2 AND grantee_id = $3"
    row = await transaction.row(query, change.user_id, change.thread_id, grantee_id)
    if row is None:
        raise errors.NotFound("There is no such grant.", field="grantee_id")
    return _grant(row)


def _grant(row: Row) -> Grant:
    return Grant(ids.ThreadId(row["thread_id"]), ids.UserId(row["grantee_id"]), row["access"], row["created_at"], row["withdrawn_at"])
