"""SQL for contexts, threads and messages; every statement is bound to a user id."""

from __future__ import annotations

import json
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, fields
from datetime import datetime

from chassis.postgres import DatabaseManager, Row, Transaction
from netra import ids
from netra.context import UserExecutionContext

_FRAME = (
    "context_id, user_id, tenant_id, session_id, thread_id, run_id, request_id, connection_id, roles, tier, created_at, deadline,"
    " depth, parent_request_id, correlation_id, agent_context, audit_metadata"
)
_MESSAGE = "message_id, thread_id, position, role, content, run_id, created_at"
# a page of the longest messages must fit into one answer
_PAGE_BYTES = 2 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Stored:
    """A context, what was asked under its request id, and when it was closed."""

    context: UserExecutionContext
    asked: bytes
    closed_at: datetime | None


@dataclass(frozen=True, slots=True)
class Message:
    """One entry of a thread."""

    message_id: ids.MessageId
    thread_id: ids.ThreadId
    position: int
    role: str
    content: str
    run_id: ids.RunId
    created_at: datetime


@dataclass(frozen=True, slots=True)
class Thread:
    """A conversation."""

    thread_id: ids.ThreadId
    created_at: datetime
    updated_at: datetime
    messages: int


class Store:
    """Opens transactions of one user; row-level security shows that user's rows and no other."""

    def __init__(self, database: DatabaseManager) -> None:
        self._database = database

    def transaction(self, user_id: ids.UserId) -> AbstractAsyncContextManager[Transaction]:
        """A transaction in which this user's rows can be seen."""
        return self._database.transaction(user_id)


async def context_by_id(transaction: Transaction, user_id: ids.UserId, context_id: ids.ContextId) -> Stored | None:
    """The user's context with this id."""
    query = f"SELECT {_FRAME}, asked, closed_at FROM context.contexts WHERE user_id = $1 AND context_id = $2"
    return _stored(await transaction.row(query, user_id, context_id))


async def context_by_request(transaction: Transaction, user_id: ids.UserId, request_id: ids.RequestId) -> Stored | None:
    """The user's context that was made under this request id."""
    query = f"SELECT {_FRAME}, asked, closed_at FROM context.contexts WHERE user_id = $1 AND request_id = $2"
    return _stored(await transaction.row(query, user_id, request_id))


async def insert_context(transaction: Transaction, frame: UserExecutionContext, asked: bytes) -> None:
    """Store a context. Raises `Conflict` when the request id is taken."""
    await transaction.execute(
        f"INSERT INTO context.contexts ({_FRAME}, asked)"
        " VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17, $18)",
        frame.context_id, frame.user_id, frame.tenant_id, frame.session_id, frame.thread_id, frame.run_id, frame.request_id,
        frame.connection_id, list(frame.roles), frame.tier, frame.created_at, frame.deadline, frame.depth, frame.parent_request_id,
        frame.correlation_id, frame.canonical_agent_context, frame.canonical_audit_metadata, asked,
    )  # fmt: skip


async def close_context(transaction: Transaction, user_id: ids.UserId, context_id: ids.ContextId) -> datetime | None:
    """Close an open context; None when there is no open one."""
    query = "UPDATE context.contexts SET closed_at = now() WHERE user_id = $1 AND context_id = $2 AND closed_at IS NULL RETURNING closed_at"
    closed_at: datetime | None = await transaction.value(query, user_id, context_id)
    return closed_at


async def insert_audit(transaction: Transaction, frame: UserExecutionContext, actor: str, action: str, detail: dict[str, object]) -> None:
    """Add a line to the audit trail."""
    await transaction.execute(
        "INSERT INTO context.audit (user_id, context_id, actor, action, correlation_id, detail) VALUES ($1, $2, $3, $4, $5, $6)",
        frame.user_id, frame.context_id, actor, action, frame.correlation_id, json.dumps(detail),
    )  # fmt: skip


async def insert_thread(transaction: Transaction, user_id: ids.UserId, tenant_id: ids.TenantId, thread_id: ids.ThreadId) -> None:
    """Store a new thread."""
    query = "INSERT INTO context.threads (thread_id, user_id, tenant_id) VALUES ($1, $2, $3)"
    await transaction.execute(query, thread_id, user_id, tenant_id)


async def thread(transaction: Transaction, user_id: ids.UserId, thread_id: ids.ThreadId, *, lock: bool = False) -> Thread | None:
    """The user's thread; locked until the end of the transaction if asked."""
    query = "SELECT thread_id, created_at, updated_at, messages FROM context.threads WHERE user_id = $1 AND thread_id = $2"
    row = await transaction.row(f"{query} FOR UPDATE" if lock else query, user_id, thread_id)
    return None if row is None else _thread(row)


async def threads(transaction: Transaction, user_id: ids.UserId, before: ids.ThreadId | None, limit: int) -> list[Thread]:
    """The user's threads made before another one, newest first."""
    rows = await transaction.fetch(
        "SELECT thread_id, created_at, updated_at, messages FROM context.threads"
        " WHERE user_id = $1 AND ($2::uuid IS NULL OR thread_id < $2) ORDER BY thread_id DESC LIMIT $3",
        user_id, before, limit,
    )  # fmt: skip
    return [_thread(row) for row in rows]


async def message_by_request(transaction: Transaction, user_id: ids.UserId, request_id: ids.RequestId) -> Message | None:
    """The user's message that was added under this request id."""
    query = f"SELECT {_MESSAGE} FROM context.messages WHERE user_id = $1 AND request_id = $2"
    row = await transaction.row(query, user_id, request_id)
    return None if row is None else _message(row)


async def insert_message(transaction: Transaction, user_id: ids.UserId, request_id: ids.RequestId, message: Message) -> None:
    """Store a message of a locked thread and count it. Raises `Conflict` when the request id is taken."""
    await transaction.execute(
        "INSERT INTO context.messages (user_id, request_id, message_id, thread_id, position, role, content, run_id, created_at)"
        " VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9)",
        user_id, request_id, message.message_id, message.thread_id, message.position, message.role, message.content, message.run_id,
        message.created_at,
    )  # fmt: skip
    query = "UPDATE context.threads SET messages = $3, updated_at = $4 WHERE user_id = $1 AND thread_id = $2"
    await transaction.execute(query, user_id, message.thread_id, message.position, message.created_at)


async def messages(transaction: Transaction, user_id: ids.UserId, thread_id: ids.ThreadId, after: int, limit: int) -> list[Message]:
    """Messages behind a position, oldest first; fewer than `limit` when they are long."""
    rows = await transaction.fetch(
        f"SELECT {_MESSAGE} FROM"
        f" (SELECT {_MESSAGE}, sum(octet_length(content)) OVER (ORDER BY position) AS bytes FROM"
        f"   (SELECT {_MESSAGE} FROM context.messages WHERE user_id = $1 AND thread_id = $2 AND position > $3"
        "     ORDER BY position LIMIT $4) AS page) AS measured"
        " WHERE bytes <= $5 ORDER BY position",
        user_id, thread_id, after, limit, _PAGE_BYTES,
    )  # fmt: skip
    return [_message(row) for row in rows]


def _stored(row: Row | None) -> Stored | None:
    if row is None:
        return None
    frame = UserExecutionContext.restored(**{name: row[name] for name in _FRAME.split(", ")})
    return Stored(frame, row["asked"], row["closed_at"])


def _thread(row: Row) -> Thread:
    return Thread(ids.ThreadId(row["thread_id"]), row["created_at"], row["updated_at"], row["messages"])


def _message(row: Row) -> Message:
    typed = {"message_id": ids.MessageId, "thread_id": ids.ThreadId, "run_id": ids.RunId}
    values = {field.name: row[field.name] for field in fields(Message)}
    return Message(**(values | {name: kind(row[name]) for name, kind in typed.items()}))
