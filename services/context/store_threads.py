"""SQL for threads and their messages; every statement is bound to a user id."""

from __future__ import annotations

from dataclasses import fields
from datetime import UTC, datetime

from chassis.postgres import DatabaseManager, Row, Transaction
from netra import errors, ids
from netra.context import UserExecutionContext
from services.context.threads import Draft, Message, Thread

_THREAD = "thread_id, created_at, updated_at, messages"
_MESSAGE = "message_id, thread_id, position, role, content, run_id, created_at"
# a page of the longest messages must fit into one answer
_PAGE_BYTES = 2 * 1024 * 1024


class ThreadStore:
    """Each method is one transaction of one user; row-level security shows that user's rows and no other."""

    def __init__(self, database: DatabaseManager) -> None:
        self._database = database

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
        "INSERT INTO context.messages (user_id, request_id, message_id, thread_id, position, role, content, run_id, created_at, owner_id)"
        " VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $1)",
        user_id, request_id, message.message_id, message.thread_id, message.position, message.role, message.content, message.run_id,
        message.created_at,
    )  # fmt: skip
    query = "UPDATE context.threads SET messages = $3, updated_at = $4 WHERE user_id = $1 AND thread_id = $2"
    await transaction.execute(query, user_id, message.thread_id, message.position, message.created_at)


def _as_thread(row: Row) -> Thread:
    return Thread(ids.ThreadId(row["thread_id"]), row["created_at"], row["updated_at"], row["messages"])


def _as_message(row: Row) -> Message:
    typed = {"message_id": ids.MessageId, "thread_id": ids.ThreadId, "run_id": ids.RunId}
    values = {field.name: row[field.name] for field in fields(Message)}
    return Message(**(values | {name: kind(row[name]) for name, kind in typed.items()}))
