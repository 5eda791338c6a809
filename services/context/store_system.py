"""SQL that crosses users: ends of contexts, audited reads, the signing key. Beside `store_left_over_system` alone of the system role."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import timedelta

from chassis import telemetry
from chassis.postgres import DatabaseManager, Transaction
from netra import ids
from services.context import store_rows
from services.context.contexts import About, Entry, Filter, Line, Stored
from services.context.expiry import Withdrawal
from services.context.keys import WrappedKey

# rows are locked in one order: two that close the same ones must not wait for each other
_CLOSED = (
    " closed AS (UPDATE context.contexts AS c SET closed_at = now() FROM meant"
    "  WHERE c.context_id = meant.context_id AND c.closed_at IS NULL RETURNING c.user_id, c.context_id, c.thread_id, c.run_id,"
    "   c.correlation_id)"
    " INSERT INTO context.audit (user_id, context_id, thread_id, actor, action, correlation_id, detail)"
    "  SELECT user_id, context_id, thread_id, 'context', $1::text, correlation_id, jsonb_build_object('run_id', run_id) FROM closed"
)
_OF_SESSIONS = (
    "WITH meant AS (SELECT context_id FROM context.contexts WHERE closed_at IS NULL AND session_id = ANY($2::uuid[])"
    f" ORDER BY context_id FOR NO KEY UPDATE),{_CLOSED}"
)
# an access token may outlive by seconds the word that its user is withdrawn: what it opened then is of a session made before
_OF_USERS = (
    "WITH withdrawn AS (SELECT * FROM unnest($2::uuid[], $3::timestamptz[], $4::uuid[]) AS w (user_id, at, before_session)),"
    " meant AS (SELECT o.context_id FROM context.contexts AS o JOIN withdrawn AS w ON w.user_id = o.user_id"
    "  WHERE o.closed_at IS NULL AND (o.created_at <= w.at OR o.session_id < w.before_session)"
    f"  ORDER BY o.context_id FOR NO KEY UPDATE OF o),{_CLOSED}"
)
_OVERDUE = (
    # those that rest may be opened again for an hour
    "WITH meant AS (SELECT context_id FROM context.contexts WHERE closed_at IS NULL AND token_until < now() - $2::interval"
    " AND (token_until > created_at OR created_at < now() - $2::interval - interval '1 hour')"
    f" ORDER BY token_until LIMIT $3 FOR NO KEY UPDATE SKIP LOCKED),{_CLOSED}"
)
_OLD = (
    "DELETE FROM context.contexts WHERE context_id IN (SELECT context_id FROM context.contexts WHERE closed_at < now() - $1::interval"
    " ORDER BY closed_at LIMIT $2 FOR UPDATE SKIP LOCKED)"
)
# Ids follow the clock, but for seconds: the oldest lines are the first, and no index has to say so.
_OLD_TRAIL = (
    "DELETE FROM context.audit WHERE id IN (SELECT id FROM (SELECT id, at FROM context.audit ORDER BY id LIMIT $2) AS oldest"
    " WHERE at < now() - $1::interval)"
)
_OF_TENANT = (
    "SELECT EXISTS (SELECT FROM context.threads WHERE user_id = $1 AND tenant_id = $2)"
    " OR EXISTS (SELECT FROM context.contexts WHERE user_id = $1 AND tenant_id = $2)"
)


class SystemStore:
    """Statements of the role netra_context_system."""

    def __init__(self, database: DatabaseManager) -> None:
        self._database = database

    async def current_key(self) -> WrappedKey | None:
        """The key that signs now, if one was made."""
        async with self._database.transaction() as transaction:
            row = await transaction.row("SELECT kid, sealed FROM context.signing_keys WHERE state = 'current'")
        return None if row is None else WrappedKey(row["kid"], row["sealed"])

    async def offer_key(self, key: WrappedKey) -> None:
        """Make this the current key, unless there is one: of replicas that start together one wins."""
        async with self._database.transaction() as transaction:
            await transaction.execute(
                "INSERT INTO context.signing_keys (kid, state, sealed) VALUES ($1, 'current', $2)"
                " ON CONFLICT (state) WHERE state = 'current' DO NOTHING",
                key.kid, key.sealed,
            )  # fmt: skip

    async def withdraw(self, sessions: Sequence[str], users: Sequence[Withdrawal]) -> int:
        """Close what is open of these sessions and users, with a line each in the audit trail; returns how many there were."""
        async with self._database.transaction() as transaction:
            done = [await transaction.execute(_OF_SESSIONS, "revoke", list(sessions))] if sessions else []
            if users:
                columns = [user.user_id for user in users], [user.at for user in users], [user.before_session for user in users]
                done.append(await transaction.execute(_OF_USERS, "revoke", *columns))
        return sum(map(_many, done))

    async def expire(self, grace: timedelta, most: int) -> int:
        """Close open contexts whose last token ended that long ago, with a line each in the audit trail; returns how many."""
        async with self._database.transaction() as transaction:
            return _many(await transaction.execute(_OVERDUE, "expire", grace, most))

    async def remove_old(self, keep: timedelta, most: int) -> int:
        """Remove contexts that were closed that long ago; returns how many. Their audit trail stays."""
        async with self._database.transaction() as transaction:
            return _many(await transaction.execute(_OLD, keep, most))

    async def remove_trail(self, keep: timedelta, most: int) -> int:
        """Remove the oldest lines of the audit trail that are as old as that; returns how many."""
        async with self._database.transaction() as transaction:
            return _many(await transaction.execute(_OLD_TRAIL, keep, most))

    async def by_id(self, user_id: ids.UserId, tenant_id: ids.TenantId, context_id: ids.ContextId, line: Line) -> Stored | None:
        """A context of a user of the tenant. That it was read is in its audit trail then."""
        query, arguments = store_rows.one(user_id, context_id)
        async with self._database.transaction() as transaction:
            row = await transaction.row(f"{query} AND tenant_id = $3", *arguments, tenant_id)
            if row is None:
                return None
            await _told(transaction, user_id, context_id, line)
        return store_rows.stored(row)

    async def page(
        self, user_id: ids.UserId, tenant_id: ids.TenantId, wanted: Filter, before: ids.ContextId | None, limit: int, line: Line
    ) -> tuple[list[Stored], bool]:
        """A page of the contexts of a user of the tenant, empty for another. That it was read is in the user's audit trail then."""
        query, arguments = store_rows.page(user_id, wanted, before, limit, tenant_id)
        async with self._database.transaction() as transaction:
            if not await transaction.value(_OF_TENANT, user_id, tenant_id):
                return [], False
            found = store_rows.paged(await transaction.fetch(query, *arguments))
            await _told(transaction, user_id, None, line)
        return found

    async def trail(
        self, user_id: ids.UserId, tenant_id: ids.TenantId, about: About, after: int, limit: int, line: Line
    ) -> list[Entry]:  # fmt: skip
        """A page of the audit trail of a user of the tenant, empty for another. That it was read is the last line of it then."""
        async with self._database.transaction() as transaction:
            if not await transaction.value(_OF_TENANT, user_id, tenant_id):
                return []
            found = await store_rows.trail(transaction, user_id, about, after, limit)
            await _told(transaction, user_id, about.context_id, line)
        return found


async def _told(transaction: Transaction, user_id: ids.UserId, context_id: ids.ContextId | None, line: Line) -> None:
    await transaction.execute(
        "INSERT INTO context.audit (user_id, context_id, actor, action, correlation_id, detail) VALUES ($1, $2, $3, $4, $5, $6)",
        user_id, context_id, line.actor, line.action, telemetry.correlation_id(), json.dumps(line.detail),
    )  # fmt: skip


def _many(tag: str) -> int:
    return int(tag.rpartition(" ")[2])
