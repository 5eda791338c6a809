"""SQL for contexts and their audit trail; every statement is bound to a user id."""

from __future__ import annotations

import json
from datetime import datetime

from chassis.postgres import DatabaseManager, Row, Transaction
from netra import errors, ids
from netra.context import UserExecutionContext
from services.context.contexts import Line, Stored

_FRAME = (
    "context_id, user_id, tenant_id, session_id, thread_id, run_id, request_id, connection_id, roles, tier, scope, created_at,"
    " deadline, depth, parent_request_id, correlation_id, agent_context, audit_metadata"
)


class ContextStore:
    """Each method is one transaction of one user; row-level security shows that user's rows and no other."""

    def __init__(self, database: DatabaseManager) -> None:
        self._database = database

    async def by_id(self, user_id: ids.UserId, context_id: ids.ContextId) -> Stored | None:
        """The user's context with this id."""
        query = f"SELECT {_FRAME}, asked, closed_at FROM context.contexts WHERE user_id = $1 AND context_id = $2"
        async with self._database.transaction(user_id) as transaction:
            return _stored(await transaction.row(query, user_id, context_id))

    async def by_request(self, user_id: ids.UserId, request_id: ids.RequestId) -> Stored | None:
        """The user's context that was made under this request id."""
        query = f"SELECT {_FRAME}, asked, closed_at FROM context.contexts WHERE user_id = $1 AND request_id = $2"
        async with self._database.transaction(user_id) as transaction:
            return _stored(await transaction.row(query, user_id, request_id))

    async def open(self, frame: UserExecutionContext, asked: bytes, line: Line, *, new_thread: bool) -> None:
        """Store a context, and its thread when that is new.

        Raises `NotFound` when the thread is neither new nor the user's, `Conflict` when the request id is taken.
        """
        async with self._database.transaction(frame.user_id) as transaction:
            if new_thread:
                await _insert_thread(transaction, frame)
            elif not await _has_thread(transaction, frame):
                raise errors.NotFound("There is no such thread.", field="thread_id")
            await _insert_context(transaction, frame, asked)
            await _insert_audit(transaction, frame, line)

    async def derive(self, frame: UserExecutionContext, asked: bytes, line: Line) -> None:
        """Store a child. Raises `Conflict` when the request id is taken."""
        async with self._database.transaction(frame.user_id) as transaction:
            await _insert_context(transaction, frame, asked)
            await _insert_audit(transaction, frame, line)

    async def close(self, frame: UserExecutionContext, line: Line) -> datetime | None:
        """Close an open context; None when there is no open one."""
        query = (
            "UPDATE context.contexts SET closed_at = now() WHERE user_id = $1 AND context_id = $2 AND closed_at IS NULL RETURNING closed_at"
        )
        async with self._database.transaction(frame.user_id) as transaction:
            closed_at: datetime | None = await transaction.value(query, frame.user_id, frame.context_id)
            if closed_at is not None:
                await _insert_audit(transaction, frame, line)
        return closed_at


async def _insert_context(transaction: Transaction, frame: UserExecutionContext, asked: bytes) -> None:
    await transaction.execute(
        f"INSERT INTO context.contexts ({_FRAME}, asked, owner_id)"
        " VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17, $18, $19, $2)",
        frame.context_id, frame.user_id, frame.tenant_id, frame.session_id, frame.thread_id, frame.run_id, frame.request_id,
        frame.connection_id, list(frame.roles), frame.tier, sorted(frame.scope or ()), frame.created_at, frame.deadline, frame.depth,
        frame.parent_request_id, frame.correlation_id, frame.canonical_agent_context, frame.canonical_audit_metadata, asked,
    )  # fmt: skip


async def _insert_audit(transaction: Transaction, frame: UserExecutionContext, line: Line) -> None:
    await transaction.execute(
        "INSERT INTO context.audit (user_id, context_id, actor, action, correlation_id, detail) VALUES ($1, $2, $3, $4, $5, $6)",
        frame.user_id, frame.context_id, line.actor, line.action, frame.correlation_id, json.dumps(line.detail),
    )  # fmt: skip


async def _insert_thread(transaction: Transaction, frame: UserExecutionContext) -> None:
    query = "INSERT INTO context.threads (thread_id, user_id, tenant_id) VALUES ($1, $2, $3)"
    await transaction.execute(query, frame.thread_id, frame.user_id, frame.tenant_id)


async def _has_thread(transaction: Transaction, frame: UserExecutionContext) -> bool:
    query = "SELECT EXISTS (SELECT FROM context.threads WHERE user_id = $1 AND thread_id = $2)"
    return bool(await transaction.value(query, frame.user_id, frame.thread_id))


def _stored(row: Row | None) -> Stored | None:
    if row is None:
        return None
    values = {name: row[name] for name in _FRAME.split(", ")}
    frame = UserExecutionContext.restored(**values | {"scope": row["scope"] or None})
    return Stored(frame, row["asked"], row["closed_at"])
