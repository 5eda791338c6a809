"""SQL that removes what nobody has any more: files that were given up, threads and users that were erased. Of the system role."""

from __future__ import annotations

from datetime import timedelta

from chassis.postgres import DatabaseManager, Transaction
from netra import ids
from services.context import store_rows

# an upload that lives is touched far more often
_ABANDONED = timedelta(hours=1)
_CHUNKS_AT_ONCE = 32
# a message has up to 256 KiB, a context 80
_ROWS_AT_ONCE = 500
_THREADS_AT_ONCE = 100
# a request id is remembered for a day, and a margin; row-level security shows no younger ones
_REMEMBERED = timedelta(days=2)
_EVERYTHING = store_rows.EVERYTHING
_BEFORE_ALL = "00000000-0000-0000-0000-000000000000"
_DUE = (
    "WITH due AS (SELECT t.thread_id FROM context.threads AS t WHERE t.deleted_at < now() - $1::interval AND t.erased_at IS NULL"
    "   AND NOT EXISTS (SELECT FROM context.contexts AS c"
    "    WHERE c.thread_id = t.thread_id AND c.closed_at IS NULL AND c.token_until > now())"
    "  ORDER BY t.deleted_at LIMIT $2 FOR UPDATE SKIP LOCKED),"
    " gone AS (UPDATE context.threads AS t SET erased_at = now() FROM due WHERE t.thread_id = due.thread_id"
    "  RETURNING t.thread_id, t.user_id)"
    " INSERT INTO context.audit (user_id, thread_id, actor, action, correlation_id, detail)"
    "  SELECT user_id, thread_id, 'context', 'erase', '', '{}' FROM gone"
)
_OF_THREAD = (
    "DELETE FROM context.messages WHERE thread_id = $1 AND position IN"
    " (SELECT position FROM context.messages WHERE thread_id = $1 ORDER BY position LIMIT $2)",
    "DELETE FROM context.contexts WHERE context_id IN (SELECT context_id FROM context.contexts WHERE thread_id = $1 LIMIT $2)",
    "UPDATE context.artifacts SET state = 'discarded' WHERE artifact_id IN (SELECT artifact_id FROM context.artifacts"
    " WHERE thread_id = $1 AND state <> 'discarded' ORDER BY artifact_id DESC LIMIT $2)",
)
_DISCARDED = (
    "UPDATE context.artifacts SET state = 'discarded' WHERE artifact_id IN (SELECT artifact_id FROM context.artifacts"
    " WHERE user_id = $1 AND created_at <= $2 AND state = 'complete'{more} ORDER BY artifact_id DESC LIMIT $3)"
)
# What was written since then is of a new beginning: they were let in again since then, as each grant to them went with everything else.
_TO_BLANK = (
    "SELECT m.message_id FROM context.messages AS m WHERE m.user_id = {user} AND m.user_id <> m.owner_id AND m.erased_at IS NULL"
    " AND (m.created_at <= {asked_at} OR NOT EXISTS (SELECT FROM context.grants AS g"
    "   WHERE g.thread_id = m.thread_id AND g.grantee_id = {user} AND g.created_at > {asked_at}))"
)
_OF_USER = (
    # what others still see of it goes first; of messages the place stays, as positions are contiguous
    "UPDATE context.messages SET content = '', request_id = 'erased:' || message_id, erased_at = now()"
    f" WHERE message_id IN ({_TO_BLANK.format(user='$1', asked_at='$2')} LIMIT $3)",
    _DISCARDED.format(more=" AND user_id <> owner_id"),
    # what was opened since is of a new beginning, and what still goes on has begun since
    "DELETE FROM context.contexts WHERE context_id IN (SELECT context_id FROM context.contexts WHERE user_id = $1 AND created_at <= $2"
    "  AND (closed_at IS NOT NULL OR token_until < now()) LIMIT $3)",
    "DELETE FROM context.audit WHERE id IN (SELECT id FROM context.audit WHERE user_id = $1 AND at < $2 ORDER BY id LIMIT $3)",
    _DISCARDED.format(more=""),
)
_PENDING = (
    f"SELECT asked_at FROM context.changes WHERE user_id = $1 AND request_id = $2 AND asked = '{_EVERYTHING}' AND done_at IS NULL"
    " FOR UPDATE"
)


class LeftOverStore:
    """Statements of the role netra_context_system, which sees of all this only what was given up."""

    def __init__(self, database: DatabaseManager) -> None:
        self._database = database

    async def give_up_abandoned(self) -> None:
        """Give up the uploads that nothing came for: their process died."""
        query = "UPDATE context.artifacts SET state = 'discarded' WHERE state = 'uploading' AND touched_at < now() - $1::interval"
        async with self._database.transaction() as transaction:
            await transaction.execute(query, _ABANDONED)

    async def remove_some(self) -> bool:
        """Remove a few chunks of files that were given up, and what is left of such as have none; whether there was one."""
        async with self._database.transaction() as transaction:
            # replicas that sweep together take different files
            query = "SELECT artifact_id FROM context.artifacts WHERE state = 'discarded' LIMIT $1 FOR UPDATE SKIP LOCKED"
            found = [row["artifact_id"] for row in await transaction.fetch(query, _CHUNKS_AT_ONCE)]
            if not found:
                return False
            await transaction.execute(
                "DELETE FROM context.artifact_chunks WHERE (artifact_id, position) IN"
                " (SELECT artifact_id, position FROM context.artifact_chunks WHERE artifact_id = ANY($1::uuid[]) LIMIT $2)",
                found, _CHUNKS_AT_ONCE,
            )  # fmt: skip
            await transaction.execute(
                "DELETE FROM context.artifacts AS a WHERE a.artifact_id = ANY($1::uuid[]) AND a.state = 'discarded'"
                " AND NOT EXISTS (SELECT FROM context.artifact_chunks AS c WHERE c.artifact_id = a.artifact_id)", found,
            )  # fmt: skip
        return True

    async def erase_deleted(self, keep: timedelta) -> int:
        """Erase some threads that were deleted that long ago and that no run goes on with; returns how many."""
        async with self._database.transaction() as transaction:
            return _many(await transaction.execute(_DUE, keep, _THREADS_AT_ONCE))

    async def erased_threads(self, after: ids.ThreadId | None, user_id: ids.UserId | None = None) -> list[ids.ThreadId]:
        """Some threads that were erased, of all users or of one, in the order of their ids."""
        of_user = "" if user_id is None else " AND user_id = $3"
        query = f"SELECT thread_id FROM context.threads WHERE erased_at IS NOT NULL AND thread_id > $2{of_user} ORDER BY thread_id LIMIT $1"
        arguments = (_THREADS_AT_ONCE, after or _BEFORE_ALL) if user_id is None else (_THREADS_AT_ONCE, after or _BEFORE_ALL, user_id)
        async with self._database.transaction() as transaction:
            return [ids.ThreadId(row["thread_id"]) for row in await transaction.fetch(query, *arguments)]

    async def thread(self, thread_id: ids.ThreadId) -> bool:
        """Remove some of what is left of a thread that was erased; whether there may be more. It stays until its files are gone."""
        locked = "SELECT thread_id FROM context.threads WHERE thread_id = $1 AND erased_at IS NOT NULL FOR UPDATE"

        async def work(transaction: Transaction) -> bool:
            if await transaction.value(locked, thread_id) is None:
                return False
            for query in _OF_THREAD:
                if not (await transaction.execute(query, thread_id, _ROWS_AT_ONCE)).endswith(" 0"):
                    return True
            await transaction.execute("DELETE FROM context.grants WHERE thread_id = $1", thread_id)
            await transaction.execute(
                "DELETE FROM context.threads AS t WHERE t.thread_id = $1 AND t.erased_at IS NOT NULL"
                " AND NOT EXISTS (SELECT FROM context.artifacts AS a WHERE a.thread_id = t.thread_id)", thread_id,
            )  # fmt: skip
            return False

        return await self._database.retried(None, work)

    async def erased_users(self) -> list[tuple[ids.UserId, ids.RequestId]]:
        """Who had everything erased that is not removed yet, and under which request."""
        query = f"SELECT user_id, request_id FROM context.changes WHERE asked = '{_EVERYTHING}' AND done_at IS NULL"
        async with self._database.transaction() as transaction:
            return [(ids.UserId(row["user_id"]), ids.RequestId(row["request_id"])) for row in await transaction.fetch(query)]

    async def of_user(self, user_id: ids.UserId, request_id: ids.RequestId) -> bool:
        """Blank some messages and give up some files, and remove some contexts and lines of the audit trail, of a user who had everything
        erased; whether there may be more.
        """

        async def work(transaction: Transaction) -> bool:
            asked_at = await transaction.value(_PENDING, user_id, request_id)
            if asked_at is None:
                return False
            for query in _OF_USER:
                if not (await transaction.execute(query, user_id, asked_at, _ROWS_AT_ONCE)).endswith(" 0"):
                    return True
            return False

        return await self._database.retried(None, work)

    async def done(self, user_id: ids.UserId, request_id: ids.RequestId) -> None:
        """Take note that nothing is left, unless something is."""
        query = (
            "UPDATE context.changes AS c SET done_at = now() WHERE c.user_id = $1 AND c.request_id = $2 AND c.done_at IS NULL"
            " AND NOT EXISTS (SELECT FROM context.threads AS t WHERE t.user_id = $1 AND t.erased_at IS NOT NULL)"
            " AND NOT EXISTS (SELECT FROM context.artifacts AS a WHERE a.user_id = $1 AND a.created_at <= c.asked_at)"
            f" AND NOT EXISTS ({_TO_BLANK.format(user='$1', asked_at='c.asked_at')})"
        )
        async with self._database.transaction() as transaction:
            if await transaction.execute(query, user_id, request_id) == "UPDATE 1":
                await transaction.execute("DELETE FROM context.usage WHERE user_id = $1 AND files = 0", user_id)

    async def forget_changes(self) -> None:
        """Forget what was asked so long ago that nobody asks for it again."""
        query = f"DELETE FROM context.changes WHERE asked_at < now() - $1::interval AND (asked <> '{_EVERYTHING}' OR done_at IS NOT NULL)"
        async with self._database.transaction() as transaction:
            await transaction.execute(query, _REMEMBERED)


def _many(tag: str) -> int:
    return int(tag.rpartition(" ")[2])
