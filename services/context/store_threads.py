"""SQL for threads and their messages; every statement is bound to a user id."""

from __future__ import annotations

import json
from dataclasses import fields
from datetime import UTC, datetime, timedelta

from chassis.postgres import DatabaseManager, Row, Transaction
from netra import errors, ids
from netra.context import UserExecutionContext
from services.context import changes, drafts, store_changes, store_rows
from services.context.contexts import closed
from services.context.threads import DELETED, OWN, SHARED, Last, Message, Reader, Thread

_MESSAGE = "message_id, thread_id, position, role, content, run_id, created_at, user_id"
# One order for all who write, and nobody withdraws, deletes or erases meanwhile; then the context, as it is after that wait: nobody
# closes it meanwhile. The key of the thread stays, so contexts are opened in it without a wait.
_HELD = f"{store_changes.THREAD_WITHIN} FOR NO KEY UPDATE OF t FOR SHARE OF c"
_COLUMNS = "t.user_id AS owner_id, t.created_at, t.updated_at, t.messages, t.deleted_at"
_OWN = f"SELECT t.thread_id, {_COLUMNS}, 'own' AS access FROM context.threads AS t WHERE t.user_id = $1 AND t.erased_at IS NULL"
# $1 is the user. One statement each for the first page and the later ones, and for each size of a page: a plan that has to do for all
# of them reads all threads there are.
_LISTS = {
    OWN: f"{_OWN} AND t.deleted_at IS NULL{{later}} ORDER BY t.thread_id DESC LIMIT {{limit}}",
    DELETED: f"{_OWN} AND t.deleted_at IS NOT NULL{{later}} ORDER BY t.thread_id DESC LIMIT {{limit}}",
    # the grants in their order, and of each its thread: OFFSET keeps the planner from beginning with the threads
    SHARED: (
        f"SELECT t.thread_id, {_COLUMNS}, t.access FROM (SELECT t.thread_id, t.access FROM context.grants AS t"
        " WHERE t.grantee_id = $1 AND t.withdrawn_at IS NULL{later} ORDER BY t.thread_id DESC OFFSET 0) AS g CROSS JOIN LATERAL"
        " (SELECT t.thread_id, t.user_id, t.created_at, t.updated_at, t.messages, t.deleted_at, g.access FROM context.threads AS t"
        "   WHERE t.thread_id = g.thread_id AND t.deleted_at IS NULL AND t.erased_at IS NULL OFFSET 0) AS t"
        " ORDER BY g.thread_id DESC LIMIT {limit}"
    ),
}
# of the thread $2; looked up once for a page: there are few such runs
_SHOWN = "(run_id, user_id) NOT IN (SELECT h.run_id, h.user_id FROM context.hidden_runs AS h WHERE h.thread_id = $2)"
# of the context $2, as long as that is open; a run may be rolled back in the moment in which it ends, with its answer
_HIDEABLE = (
    "FROM context.contexts AS c WHERE c.user_id = $1 AND c.context_id = $2 AND (c.closed_at IS NULL OR EXISTS ("
    "SELECT FROM context.audit AS a WHERE a.user_id = $1 AND a.context_id = $2 AND a.action = 'close' AND a.detail ? 'message_id'))"
)
_HIDE = (
    f"INSERT INTO context.hidden_runs (user_id, run_id, thread_id) SELECT c.user_id, c.run_id, c.thread_id {_HIDEABLE}"
    " ON CONFLICT DO NOTHING RETURNING run_id"
)
_CLOSE = "SELECT outcome, message, closed FROM context.close_with_message($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)"
# a page of the longest messages must fit into one answer
_PAGE_BYTES = 2 * 1024 * 1024


class ThreadStore:
    """Each method is one transaction of one user, or one statement that sets them; row-level security shows what is there for that user,
    and no other row.
    """

    def __init__(self, database: DatabaseManager) -> None:
        self._database = database

    async def append(self, frame: UserExecutionContext, draft: drafts.Draft) -> Message:
        """The user's message under this request id: the one there is, or this one, now the last of the context's thread.

        Raises `FailedPrecondition` when the context is closed and there is none, `NotFound`, `PermissionDenied`, and `Conflict` when the
        request id is taken at the same moment.
        """
        # who may only read cannot take the lock; a run of the owner goes on in a thread they have deleted
        async with self._database.transaction(frame.user_id) as transaction:
            row = await transaction.row(_HELD, frame.user_id, frame.thread_id, frame.context_id)
            if row is None:
                return await _said_before(transaction, frame, draft.request_id)
            if (known := await _message_by_request(transaction, frame.user_id, draft.request_id)) is not None:
                return known
            message = Message(
                ids.MessageId.new(), frame.thread_id, row["messages"] + 1, draft.role, draft.content, frame.run_id, datetime.now(UTC),
                frame.user_id,
            )  # fmt: skip
            await _insert_message(transaction, ids.UserId(row["owner_id"]), draft.request_id, message)
        return message

    async def close(self, frame: UserExecutionContext, draft: drafts.Draft, actor: str) -> Last:
        """Close the context, its message the last of its thread; the one there is under the request id, when that is the same.

        Raises `AlreadyExists` when it is another one, `FailedPrecondition` when the context is closed without it, and as `append`.
        """
        (row,) = await self._database.alone(
            _CLOSE, frame.user_id, frame.context_id, frame.thread_id, frame.run_id, ids.MessageId.new(), draft.request_id, draft.role,
            draft.content, actor, json.dumps({"run_id": frame.run_id}),
        )  # fmt: skip
        if row["outcome"] is None:
            async with self._database.transaction(frame.user_id) as transaction:
                raise await _why_not(transaction, frame)
        if row["outcome"] != "closed":
            raise errors.AlreadyExists(field="request_id")
        return Last(ids.MessageId(row["message"]), row["closed"])

    async def hide(self, frame: UserExecutionContext) -> int:
        """Hide the messages of the context's run, those to come as well; how many are hidden by it.

        Raises `FailedPrecondition` when the context is closed, but for one that was closed with a message.
        """
        async with self._database.transaction(frame.user_id) as transaction:
            if await transaction.value(_HIDE, frame.user_id, frame.context_id) is None:
                if not await transaction.value(f"SELECT EXISTS (SELECT {_HIDEABLE})", frame.user_id, frame.context_id):
                    raise closed()
                return 0
            query = "SELECT count(*) FROM context.messages WHERE user_id = $1 AND thread_id = $2 AND run_id = $3"
            hidden: int = await transaction.value(query, frame.user_id, frame.thread_id, frame.run_id)
        return hidden

    async def messages(self, reader: Reader, thread_id: ids.ThreadId, after: int, limit: int) -> tuple[Thread, list[Message]]:
        """A thread, and its messages behind a position, oldest first; fewer than `limit` when they are long.

        Raises `NotFound`, and `FailedPrecondition` when the context is closed.
        """
        async with self._database.transaction(reader.user_id) as transaction:
            thread = await _readable(transaction, reader, thread_id)
            rows = await transaction.fetch(
                f"SELECT {_MESSAGE} FROM"
                f" (SELECT {_MESSAGE}, sum(octet_length(content)) OVER (ORDER BY position) AS bytes FROM"
                f"   (SELECT {_MESSAGE} FROM context.messages WHERE owner_id = $1 AND thread_id = $2 AND position > $3 AND {_SHOWN}"
                "     ORDER BY position LIMIT $4) AS page) AS measured"
                " WHERE bytes <= $5 ORDER BY position",
                thread.owner_id, thread_id, after, limit, _PAGE_BYTES,
            )  # fmt: skip
        return thread, [_as_message(row) for row in rows]

    async def threads(self, user_id: ids.UserId, selection: str, before: ids.ThreadId | None, limit: int) -> list[Thread]:
        """The user's threads, those granted to them or those they deleted, made before another one, newest first."""
        later, place = ("", ()) if before is None else (" AND t.thread_id < $2", (before,))
        async with self._database.transaction(user_id) as transaction:
            rows = await transaction.fetch(_LISTS[selection].format(later=later, limit=limit), user_id, *place)
        return [_as_thread(row) for row in rows]

    async def thread(self, user_id: ids.UserId, thread_id: ids.ThreadId) -> Thread | None:
        """A thread that is there for the user; one they deleted, too."""
        async with self._database.transaction(user_id) as transaction:
            row = await store_changes.thread(transaction, user_id, thread_id)
        return None if row is None else _as_thread(row)

    async def delete(self, change: changes.Change) -> Thread:
        """Hide a thread, once. Raises `NotFound`, `PermissionDenied`."""
        query = (
            "UPDATE context.threads SET deleted_at = now()"
            " WHERE user_id = $1 AND thread_id = $2 AND deleted_at IS NULL AND erased_at IS NULL RETURNING deleted_at"
        )
        async with self._database.transaction(change.user_id) as transaction:
            known = await store_changes.begin(transaction, change)
            if known is None:
                deleted_at = await transaction.value(query, change.user_id, change.thread_id)
                if deleted_at is not None:
                    await store_changes.note(transaction, change, {})
            return _as_thread(await store_changes.owned(transaction, change))

    async def restore(self, change: changes.Change, keep: timedelta) -> Thread:
        """Show a thread again that was deleted no longer ago than that. Raises `NotFound`, `PermissionDenied`."""
        query = (
            "UPDATE context.threads SET deleted_at = NULL"
            " WHERE user_id = $1 AND thread_id = $2 AND deleted_at > now() - $3::interval AND erased_at IS NULL RETURNING thread_id"
        )
        async with self._database.transaction(change.user_id) as transaction:
            if await store_changes.begin(transaction, change) is not None:
                return _as_thread(await store_changes.owned(transaction, change))
            if await transaction.value(query, change.user_id, change.thread_id, keep) is not None:
                await store_changes.note(transaction, change, {})
            thread = _as_thread(await store_changes.owned(transaction, change))
            if thread.deleted_at is not None:
                # its time has passed, and it will be erased in a moment
                raise changes.no_thread()
        return thread


async def _readable(transaction: Transaction, reader: Reader, thread_id: ids.ThreadId) -> Thread:
    if reader.context_id is None:
        row = await transaction.row(f"{store_changes.THREAD} AND t.deleted_at IS NULL", reader.user_id, thread_id)
        if row is None:
            raise changes.no_thread()
        return _as_thread(row)
    row = await transaction.row(store_changes.THREAD_WITHIN, reader.user_id, thread_id, reader.context_id)
    if row is None:
        await store_rows.refuse_closed(transaction, reader.user_id, reader.context_id)
        raise changes.no_thread()
    return _as_thread(row)


async def _said_before(transaction: Transaction, frame: UserExecutionContext, request_id: ids.RequestId) -> Message:
    """The message of a context that is closed by now. Raises why there is none."""
    refused = await _why_not(transaction, frame)
    if isinstance(refused, errors.FailedPrecondition) and (known := await _message_by_request(transaction, frame.user_id, request_id)):
        return known
    raise refused


async def _why_not(transaction: Transaction, frame: UserExecutionContext) -> errors.NetraError:
    if not await transaction.value(f"SELECT {store_rows.still_open()}", frame.user_id, frame.context_id):
        return closed()
    row = await store_changes.thread(transaction, frame.user_id, frame.thread_id)
    return changes.no_thread() if row is None else changes.only_read()


async def _message_by_request(transaction: Transaction, user_id: ids.UserId, request_id: ids.RequestId) -> Message | None:
    query = f"SELECT {_MESSAGE} FROM context.messages WHERE user_id = $1 AND request_id = $2"
    row = await transaction.row(query, user_id, request_id)
    return None if row is None else _as_message(row)


async def _insert_message(transaction: Transaction, owner_id: ids.UserId, request_id: ids.RequestId, message: Message) -> None:
    """Store a message of a locked thread and count it. Raises `NotFound` when the thread is not the user's to write to any more."""
    await transaction.execute(
        "INSERT INTO context.messages (user_id, request_id, message_id, thread_id, position, role, content, run_id, created_at, owner_id)"
        " VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)",
        message.user_id, request_id, message.message_id, message.thread_id, message.position, message.role, message.content,
        message.run_id, message.created_at, owner_id,
    )  # fmt: skip
    query = "UPDATE context.threads SET messages = $3, updated_at = $4 WHERE user_id = $1 AND thread_id = $2"
    if await transaction.execute(query, owner_id, message.thread_id, message.position, message.created_at) != "UPDATE 1":
        # one that is not counted would take the place of all that come later
        raise changes.no_thread()


def _as_thread(row: Row) -> Thread:
    return Thread(
        ids.ThreadId(row["thread_id"]), row["created_at"], row["updated_at"], row["messages"], ids.UserId(row["owner_id"]),
        row["access"], row["deleted_at"],
    )  # fmt: skip


def _as_message(row: Row) -> Message:
    typed = {"message_id": ids.MessageId, "thread_id": ids.ThreadId, "run_id": ids.RunId, "user_id": ids.UserId}
    values = {field.name: row[field.name] for field in fields(Message)}
    return Message(**(values | {name: kind(row[name]) for name, kind in typed.items()}))
