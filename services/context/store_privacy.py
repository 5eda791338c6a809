"""SQL for what is kept of one user: all of it told, or taken away; every statement is bound to a user id."""

from __future__ import annotations

import json
from dataclasses import asdict

from chassis.postgres import DatabaseManager, Row, Transaction
from netra import errors, ids
from services.context import changes, store_changes, store_rows
from services.context.privacy import Line, Removed

# a message has up to 256 KiB, a context 80
_ROWS = 16
# of so many that go on the error tells
_TOLD = 5
_GOES_ON = f"SELECT run_id, thread_id FROM context.contexts WHERE {{whose}} AND closed_at IS NULL AND token_until > now() LIMIT {_TOLD}"
_FILES = "SELECT count(*) FROM context.artifacts AS a WHERE a.state = 'complete' AND "
# both ends of a grant may be erased at once: in one statement, and in one order
_GRANTS = (
    "WITH mine AS MATERIALIZED (SELECT thread_id, grantee_id FROM context.grants WHERE owner_id = $1"
    " UNION ALL SELECT thread_id, grantee_id FROM context.grants WHERE grantee_id = $1 AND withdrawn_at IS NULL"
    " ORDER BY thread_id, grantee_id)"
    " DELETE FROM context.grants AS g USING mine WHERE g.thread_id = mine.thread_id AND g.grantee_id = mine.grantee_id"
)
_MESSAGE = (
    "json_build_object('kind', 'message', 'thread_id', thread_id, 'message_id', message_id, 'position', position, 'user_id', user_id,"
    " 'role', role, 'content', content, 'run_id', run_id, 'request_id', request_id, 'created_at', created_at, 'erased_at', erased_at)"
)
_THREAD = (
    "json_build_object('kind', 'thread', 'thread_id', thread_id, 'tenant_id', tenant_id, 'messages', messages, 'created_at', created_at,"
    " 'updated_at', updated_at, 'deleted_at', deleted_at)"
)
_GRANT = (
    "json_build_object('kind', 'grant', 'thread_id', thread_id, 'owner_id', owner_id, 'grantee_id', grantee_id, 'access', access,"
    " 'created_at', created_at, 'withdrawn_at', withdrawn_at)"
)
_ARTIFACT = (
    "json_build_object('kind', 'artifact', 'artifact_id', artifact_id, 'name', name, 'media_type', media_type, 'size', size,"
    " 'sha256', encode(sha256, 'hex'), 'run_id', run_id, 'thread_id', thread_id, 'request_id', request_id, 'created_at', created_at)"
)
_CONTEXT = (
    "json_build_object('kind', 'context', 'context_id', context_id, 'tenant_id', tenant_id, 'session_id', session_id,"
    " 'thread_id', thread_id, 'run_id', run_id, 'request_id', request_id, 'connection_id', connection_id, 'roles', roles, 'tier', tier,"
    " 'scope', scope, 'created_at', created_at, 'deadline', deadline, 'depth', depth, 'parent_request_id', parent_request_id,"
    " 'correlation_id', correlation_id, 'agent_context', convert_from(agent_context, 'UTF8')::json,"
    " 'audit_metadata', convert_from(audit_metadata, 'UTF8')::json, 'closed_at', closed_at)"
)
_AUDIT = (
    "json_build_object('kind', 'audit', 'entry_id', id, 'at', at, 'context_id', context_id, 'thread_id', thread_id, 'actor', actor,"
    " 'action', action, 'correlation_id', correlation_id, 'detail', detail)"
)
# what a line is made of, out of which rows ($1 is the user), in the order of which columns
_LINES = {
    "message": (_MESSAGE, "context.messages WHERE user_id = $1 AND user_id <> owner_id", ("message_id",)),
    "artifact": (_ARTIFACT, f"context.artifacts AS a WHERE user_id = $1 AND state = 'complete' AND {store_rows.STAYS}", ("artifact_id",)),
    "grant_given": (_GRANT, "context.grants WHERE owner_id = $1", ("thread_id", "grantee_id")),
    "grant_received": (_GRANT, "context.grants WHERE grantee_id = $1 AND withdrawn_at IS NULL", ("thread_id",)),
    "context": (_CONTEXT, "context.contexts WHERE user_id = $1", ("context_id",)),
    "audit": (_AUDIT, "context.audit WHERE user_id = $1", ("id",)),
}


class PrivacyStore:
    """Each method is one transaction of one user; row-level security shows what is there for that user, and no other row."""

    def __init__(self, database: DatabaseManager) -> None:
        self._database = database

    async def erase_thread(self, change: changes.Change) -> Removed:
        """Take a thread of the user away, for good. Raises `NotFound`, `PermissionDenied`, `FailedPrecondition` while a run goes on."""

        async def work(transaction: Transaction) -> Removed:
            known = await store_changes.begin(transaction, change)
            if known is not None:
                return _told(known)
            # no context is opened and no message comes from here on
            query = "SELECT thread_id FROM context.threads WHERE user_id = $1 AND thread_id = $2 AND erased_at IS NULL FOR UPDATE"
            await transaction.execute(query, change.user_id, change.thread_id)
            await store_changes.owned(transaction, change)
            await refuse_going_on(transaction, change)
            of_thread = (change.user_id, change.thread_id)
            removed = Removed(
                threads=1,
                messages=await transaction.value(
                    "SELECT count(*) FROM context.messages WHERE owner_id = $1 AND thread_id = $2 AND erased_at IS NULL", *of_thread
                ),
                artifacts=await transaction.value(f"{_FILES}a.owner_id = $1 AND a.thread_id = $2", *of_thread),
            )
            await transaction.execute("DELETE FROM context.grants WHERE owner_id = $1 AND thread_id = $2", *of_thread)
            await transaction.execute(
                "UPDATE context.threads SET erased_at = now(), deleted_at = coalesce(deleted_at, now())"
                " WHERE user_id = $1 AND thread_id = $2", *of_thread,
            )  # fmt: skip
            await _done(transaction, change, removed)
            return removed

        return await self._database.retried(change.user_id, work)

    async def erase_everything(self, change: changes.Change) -> Removed:
        """Take everything of the user away, for good. Raises `FailedPrecondition` while a run goes on."""

        async def work(transaction: Transaction) -> Removed:
            known = await store_changes.begin(transaction, change)
            if known is not None:
                return _told(known)
            query = "SELECT thread_id FROM context.threads WHERE user_id = $1 AND erased_at IS NULL ORDER BY thread_id FOR UPDATE"
            await transaction.execute(query, change.user_id)
            await refuse_going_on(transaction, change)
            removed = await _everything(transaction, change.user_id)
            query = "DELETE FROM context.changes WHERE user_id = $1 AND request_id <> $2 AND asked <> $3"
            await transaction.execute(query, change.user_id, change.request_id, change.asked)
            await _done(transaction, change, removed)
            return removed

        return await self._database.retried(change.user_id, work)

    async def note(self, change: changes.Change) -> None:
        """Add a line to the audit trail of the user."""
        async with self._database.transaction(change.user_id) as transaction:
            await store_changes.note(transaction, change, {})

    async def threads(self, user_id: ids.UserId, after: tuple[object, ...]) -> list[Line]:
        """The next threads of the user, in the order of their ids."""
        rows = "context.threads WHERE user_id = $1 AND erased_at IS NULL"
        return await self._page(user_id, _THREAD, rows, ("thread_id",), after)

    async def messages(self, user_id: ids.UserId, thread_id: ids.ThreadId, after: int) -> list[Line]:
        """The next messages of a thread of the user."""
        query = (
            f"SELECT position, {_MESSAGE}::text AS line FROM context.messages WHERE owner_id = $1 AND thread_id = $2 AND position > $3"
            " ORDER BY position LIMIT $4"
        )
        async with self._database.transaction(user_id) as transaction:
            rows = await transaction.fetch(query, user_id, thread_id, after, _ROWS)
        return [Line((row["position"],), row["line"]) for row in rows]

    async def lines(self, user_id: ids.UserId, kind: str, after: tuple[object, ...]) -> list[Line]:
        """The next lines of one of `KINDS`; of messages those in threads of others."""
        line, rows, key = _LINES[kind]
        return await self._page(user_id, line, rows, key, after)

    async def _page(self, user_id: ids.UserId, line: str, rows: str, key: tuple[str, ...], after: tuple[object, ...]) -> list[Line]:
        columns = ", ".join(key)
        later = f" AND ({columns}) > ({', '.join(f'${place}' for place in range(3, 3 + len(after)))})" if after else ""
        query = f"SELECT {columns}, {line}::text AS line FROM {rows}{later} ORDER BY {columns} LIMIT $2"
        async with self._database.transaction(user_id) as transaction:
            found = await transaction.fetch(query, user_id, _ROWS, *after)
        return [Line(tuple(row[name] for name in key), row["line"]) for row in found]


async def refuse_going_on(transaction: Transaction, change: changes.Change) -> None:
    """Raises `FailedPrecondition` while a run goes on in what is to be erased; it names some of them, and their threads."""
    if change.thread_id is None:
        found = [row for whose in ("user_id = $1", "owner_id = $1") for row in await _going_on(transaction, whose, change.user_id)]
    else:
        found = await _going_on(transaction, "owner_id = $1 AND thread_id = $2", change.user_id, change.thread_id)
    if found:
        runs, threads = (", ".join(dict.fromkeys(str(row[name]) for row in found[:_TOLD])) for name in ("run_id", "thread_id"))
        message = f"These runs have not ended: {runs}. Cancel them, with a grant token when they are of others, or wait for them."
        raise errors.FailedPrecondition(message, runs=runs, threads=threads)


async def _going_on(transaction: Transaction, whose: str, *arguments: object) -> list[Row]:
    return await transaction.fetch(_GOES_ON.format(whose=whose), *arguments)


async def _everything(transaction: Transaction, user_id: ids.UserId) -> Removed:
    """What is whose doing, or lies in a thread of theirs: it is hidden here, and removed afterwards.

    Files, and messages in threads of others, may be too many for one transaction: those go a few at a time, until then they are seen by
    those others.
    """
    count = "SELECT count(*) FROM context.{rows}"
    in_own = await transaction.value(
        "SELECT count(*) FROM context.messages AS m JOIN context.threads AS t USING (thread_id)"
        " WHERE t.user_id = $1 AND t.erased_at IS NULL AND m.erased_at IS NULL", user_id,
    )  # fmt: skip
    contexts = await transaction.value(count.format(rows="contexts WHERE user_id = $1"), user_id)
    elsewhere = await transaction.value(
        count.format(rows="messages WHERE user_id = $1 AND user_id <> owner_id AND erased_at IS NULL"), user_id
    )
    # what still comes would be complete after it was asked; what others put into threads of the user goes with these
    await transaction.execute("UPDATE context.artifacts SET state = 'discarded' WHERE user_id = $1 AND state = 'uploading'", user_id)
    in_threads = (
        "a.thread_id IN (SELECT t.thread_id FROM context.threads AS t WHERE t.user_id = $1 AND t.erased_at IS NULL) AND a.user_id <> $1"
    )
    artifacts = await transaction.value(f"{_FILES}{in_threads}", user_id)
    artifacts += await transaction.value("SELECT coalesce(max(complete), 0) FROM context.usage WHERE user_id = $1", user_id)
    await transaction.execute(_GRANTS, user_id)
    threads = await transaction.execute(
        "UPDATE context.threads SET erased_at = now(), deleted_at = coalesce(deleted_at, now()) WHERE user_id = $1 AND erased_at IS NULL",
        user_id,
    )  # fmt: skip
    return Removed(_many(threads), in_own + elsewhere, artifacts, contexts)


async def _done(transaction: Transaction, change: changes.Change, removed: Removed) -> None:
    counts = asdict(removed)
    query = "UPDATE context.changes SET removed = $3 WHERE user_id = $1 AND request_id = $2"
    await transaction.execute(query, change.user_id, change.request_id, json.dumps(counts))
    await store_changes.note(transaction, change, counts)


def _told(known: Row) -> Removed:
    return Removed(**json.loads(known["removed"]))


def _many(tag: str) -> int:
    return int(tag.rpartition(" ")[2])
