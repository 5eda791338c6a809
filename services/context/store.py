"""SQL for contexts, threads and messages; every statement is bound to a user id."""

from __future__ import annotations

import json
from dataclasses import fields
from datetime import UTC, datetime

from chassis.postgres import DatabaseManager, Row, Transaction
from netra import errors, ids
from netra.context import UserExecutionContext
from services.context.contexts import Line, Stored
from services.context.threads import Draft, Message, Thread

_FRAME = (
    "context_id, user_id, tenant_id, session_id, thread_id, run_id, request_id, connection_id, roles, tier, created_at, deadline,"
    " depth, parent_request_id, correlation_id, agent_context, audit_metadata"
)
_THREAD = "thread_id, created_at, updated_at, messages"
_MESSAGE = "message_id, thread_id, position, role, content, run_id, created_at"
# a page of the longest messages must fit into one answer
_PAGE_BYTES = 2 * 1024 * 1024


class Store:
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
            elif await _thread(transaction, frame.user_id, frame.thread_id) is None:
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

    async def append(self, frame: UserExecutionContext, draft: Draft) -> Message:
        """The user's message under this request id: the one there is, or this one, now the last of the context's thread.

        Raises `NotFound`, and `Conflict` when the request id is taken at the same moment.
        """
        async with self._database.transaction(frame.user_id) as transaction:
            # the lock gives concurrent messages one order without gaps
            thread = await _thread(transaction, frame.user_id, frame.thread_id, lock=True)
            if thread is None:
                raise errors.NotFound("There is no such thread.")
            if (known := await _message_by_request(transaction, frame.user_id, draft.request_id)) is not None:
                return known
            message = Message(
                ids.MessageId.new(), frame.thread_id, thread.messages + 1, draft.role, draft.content, frame.run_id, datetime.now(UTC)
            )
            await _insert_message(transaction, frame.user_id, draft.request_id, message)
        return message

    async def messages(self, user_id: ids.UserId, thread_id: ids.ThreadId, after: int, limit: int) -> tuple[Thread, list[Message]]:
        """A thread, and its messages behind a position, oldest first; fewer than `limit` when they are long. Raises `NotFound`."""
        async with self._database.transaction(user_id) as transaction:
            thread = await _thread(transaction, user_id, thread_id)
            if thread is None:
                raise errors.NotFound("There is no such thread.")
            rows = await transaction.fetch(
                f"SELECT {_MESSAGE} FROM"
                f" (SELECT {_MESSAGE}, sum(octet_length(content)) OVER (ORDER BY position) AS bytes FROM"
                f"   (SELECT {_MESSAGE} FROM context.messages WHERE user_id = $1 AND thread_id = $2 AND position > $3"
                "     ORDER BY position LIMIT $4) AS page) AS measured"
                " WHERE bytes <= $5 ORDER BY position",
                user_id, thread_id, after, limit, _PAGE_BYTES,
            )  # fmt: skip
        return thread, [_as_message(row) for row in rows]

    async def threads(self, user_id: ids.UserId, before: ids.ThreadId | None, limit: int) -> list[Thread]:
        """The user's threads made before another one, newest first."""
        async with self._database.transaction(user_id) as transaction:
            rows = await transaction.fetch(
                f"SELECT {_THREAD} FROM context.threads"
                " WHERE user_id = $1 AND ($2::uuid IS NULL OR thread_id < $2) ORDER BY thread_id DESC LIMIT $3",
                user_id, before, limit,
            )  # fmt: skip
        return [_as_thread(row) for row in rows]


async def _insert_context(transaction: Transaction, frame: UserExecutionContext, asked: bytes) -> None:
    await transaction.execute(
        f"INSERT INTO context.contexts ({_FRAME}, asked)"
        " VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17, $18)",
        frame.context_id, frame.user_id, frame.tenant_id, frame.session_id, frame.thread_id, frame.run_id, frame.request_id,
        frame.connection_id, list(frame.roles), frame.tier, frame.created_at, frame.deadline, frame.depth, frame.parent_request_id,
        frame.correlation_id, frame.canonical_agent_context, frame.canonical_audit_metadata, asked,
    )  # fmt: skip


async def _insert_audit(transaction: Transaction, frame: UserExecutionContext, line: Line) -> None:
    await transaction.execute(
        "INSERT INTO context.audit (user_id, context_id, actor, action, correlation_id, detail) VALUES ($1, $2, $3, $4, $5, $6)",
        frame.user_id, frame.context_id, line.actor, line.action, frame.correlation_id, json.dumps(line.detail),
    )  # fmt: skip


async def _insert_thread(transaction: Transaction, frame: UserExecutionContext) -> None:
    query = "INSERT INTO context.threads (thread_id, user_id, tenant_id) VALUES ($1, $2, $3)"
    await transaction.execute(query, frame.thread_id, frame.user_id, frame.tenant_id)


async def _thread(transaction: Transaction, user_id: ids.UserId, thread_id: ids.ThreadId, *, lock: bool = False) -> Thread | None:
    query = f"SELECT {_THREAD} FROM context.threads WHERE user_id = $1 AND thread_id = $2"
    row = await transaction.row(f"{query} FOR UPDATE" if lock else query, user_id, thread_id)
    return None if row is None else _as_thread(row)


async def _message_by_request(transaction: Transaction, user_id: ids.UserId, request_id: ids.RequestId) -> Message | None:
    query = f"SELECT {_MESSAGE} FROM context.messages WHERE user_id = $1 AND request_id = $2"
    row = await transaction.row(query, user_id, request_id)
    return None if row is None else _as_message(row)


async def _insert_message(transaction: Transaction, user_id: ids.UserId, request_id: ids.RequestId, message: Message) -> None:
    """Store a message of a locked thread and count it."""
    await transaction.execute(
        "INSERT INTO context.messages (user_id, request_id, message_id, thread_id, position, role, content, run_id, created_at)"
        " VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9)",
        user_id, request_id, message.message_id, message.thread_id, message.position, message.role, message.content, message.run_id,
        message.created_at,
    )  # fmt: skip
    query = "UPDATE context.threads SET messages = $3, updated_at = $4 WHERE user_id = $1 AND thread_id = $2"
    await transaction.execute(query, user_id, message.thread_id, message.position, message.created_at)


def _stored(row: Row | None) -> Stored | None:
    if row is None:
        return None
    frame = UserExecutionContext.restored(**{name: row[name] for name in _FRAME.split(", ")})
    return Stored(frame, row["asked"], row["closed_at"])


def _as_thread(row: Row) -> Thread:
    return Thread(ids.ThreadId(row["thread_id"]), row["created_at"], row["updated_at"], row["messages"])


def _as_message(row: Row) -> Message:
    typed = {"message_id": ids.MessageId, "thread_id": ids.ThreadId, "run_id": ids.RunId}
    values = {field.name: row[field.name] for field in fields(Message)}
    return Message(**(values | {name: kind(row[name]) for name, kind in typed.items()}))
