"""SQL that changes of threads and data have in common; every statement is bound to a user id."""

from __future__ import annotations

import json
from collections.abc import Mapping

from chassis.postgres import Row, Transaction
from netra import errors, ids
from services.context import changes
from services.context.changes import Change

# $1 is the user, $2 the thread: what they may do with it, if it is there for them. A deleted one is still the owner's.
_SELECT = (
    "SELECT t.thread_id, t.user_id AS owner_id, t.created_at, t.updated_at, t.messages, t.deleted_at,"
    " CASE WHEN t.user_id = $1 THEN 'own' ELSE g.access END AS access"
    " FROM context.threads AS t"
    " LEFT JOIN context.grants AS g ON g.thread_id = t.thread_id AND g.grantee_id = $1 AND g.withdrawn_at IS NULL"
)
_THERE = " WHERE t.thread_id = $2 AND t.erased_at IS NULL AND (t.user_id = $1 OR (g.access IS NOT NULL AND t.deleted_at IS NULL))"
THREAD = f"{_SELECT}{_THERE}"
# the same within the context $3, `c`, for as long as that is open
THREAD_WITHIN = f"{_SELECT} JOIN context.contexts AS c ON c.user_id = $1 AND c.context_id = $3{_THERE} AND c.closed_at IS NULL"


async def thread(transaction: Transaction, user_id: ids.UserId, thread_id: ids.ThreadId | None) -> Row | None:
    """A thread that is there for the user, and what they may do with it."""
    return await transaction.row(THREAD, user_id, thread_id)


async def owned(transaction: Transaction, change: Change) -> Row:
    """The thread of a change that only its owner may make. Raises `NotFound`, `PermissionDenied`."""
    row = await thread(transaction, change.user_id, change.thread_id)
    if row is None:
        raise changes.no_thread()
    if row["access"] != "own":
        raise changes.not_yours()
    return row


async def begin(transaction: Transaction, change: Change) -> Row | None:
    """None when the change is new, else what is known of it. Raises `AlreadyExists` when something else was asked before."""
    tag = await transaction.execute(
        # of the same request twice at once, one waits here until the other has ended
        "INSERT INTO context.changes (user_id, request_id, asked) VALUES ($1, $2, $3) ON CONFLICT DO NOTHING",
        change.user_id, change.request_id, change.asked,
    )  # fmt: skip
    if tag == "INSERT 0 1":
        return None
    query = "SELECT asked, removed::text AS removed FROM context.changes WHERE user_id = $1 AND request_id = $2"
    known = await transaction.row(query, change.user_id, change.request_id)
    if known is None or known["asked"] != change.asked:
        raise errors.AlreadyExists(field="request_id")
    return known


async def note(transaction: Transaction, change: Change, more: Mapping[str, object]) -> None:
    """Add a line to the audit trail of the user."""
    detail = json.dumps({"request_id": change.request_id, **change.detail, **more})
    await transaction.execute(
        "INSERT INTO context.audit (user_id, thread_id, actor, action, correlation_id, detail) VALUES ($1, $2, $3, $4, $5, $6)",
        change.user_id, change.thread_id, change.actor, change.action, change.correlation_id, detail,
    )  # fmt: skip
