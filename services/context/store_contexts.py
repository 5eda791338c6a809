"""SQL for contexts and their audit trail; every statement is bound to a user id."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime

from chassis.postgres import Conflict, DatabaseManager, Locked, Transaction, Unfit, Victim
from netra import errors, ids
from netra.context import UserExecutionContext
from services.context import changes, store_openings, store_rows
from services.context.contexts import About, Entry, Filter, Line, Stored
from services.context.drafts import First
from services.context.gathering import Gathering
from services.context.store_openings import Opening, Outcome

# how many contexts are opened at once, and how long they wait for locks that others hold; who has to wait longer does so alone
_TOGETHER, _PATIENCE = 64, "100ms"
# one of them is unfit, or in the way of another transaction: it is known by each being tried alone
_ONE_OF_THEM = (Locked, Victim, Conflict, Unfit, errors.PermissionDenied)

# $1 to $20 are the context, $21 to $23 the line; `place` says whose thread it is, or is empty
_STORE = (
    f" made AS (INSERT INTO context.contexts ({store_rows.FRAME}, asked, token_until, owner_id)"
    "  SELECT $1::uuid, $2::uuid, $3::uuid, $4::uuid, $5::uuid, $6::uuid, $7::text, $8::uuid, $9::text[], $10::text, $11::text[],"
    "   $12::timestamptz, $13::timestamptz, $14::int, $15::text, $16::text, $17::bytea, $18::bytea, $19::bytea, $20::timestamptz,"
    "   place.owner_id FROM place RETURNING user_id, context_id, thread_id, correlation_id)"
    " INSERT INTO context.audit (user_id, context_id, thread_id, actor, action, correlation_id, detail)"
    "  SELECT user_id, context_id, thread_id, $21::text, $22::text, correlation_id, $23::jsonb FROM made"
)
# what goes on in a thread that its owner deleted may end there; nobody closes the parent meanwhile
_BELOW = (
    "WITH place AS (SELECT p.owner_id FROM context.contexts AS p JOIN context.threads AS t USING (thread_id)"
    " WHERE p.user_id = $2::uuid AND p.context_id = $24::uuid AND p.closed_at IS NULL"
    f" AND (t.user_id = $2::uuid AND t.erased_at IS NULL OR {store_rows.writable('$2::uuid', 't')})"
    f" FOR KEY SHARE OF t FOR SHARE OF p),{_STORE}"
)
_RENEW = "UPDATE context.contexts SET token_until = greatest(token_until, $3) WHERE user_id = $1 AND context_id = $2 AND closed_at IS NULL"
# back to where it began, by which the sweep knows it
_REST = (
    "UPDATE context.contexts SET token_until = created_at WHERE user_id = $1 AND context_id = $2 AND closed_at IS NULL AND token_until = $3"
    " AND token_until > now()"
)
_CLOSE = "SELECT context.close_context($1, $2, $3, $4, $5) AS closed_at"


class ContextStore:
    """Each method is one transaction of one user, or one statement that sets whom it is for; row-level security shows that user's rows
    and no other.
    """

    def __init__(self, database: DatabaseManager) -> None:
        self._database = database
        self._openings: Gathering[Opening, Outcome | None] = Gathering(self._opened, _TOGETHER)

    async def by_id(self, user_id: ids.UserId, context_id: ids.ContextId, within: ids.ContextId | None = None) -> Stored | None:
        """The user's context with this id; None, too, when it is asked for within another one that is closed."""
        query, arguments = store_rows.one(user_id, context_id)
        if within is not None:
            query, arguments = f"{query} AND {store_rows.still_open(context='$3')}", [*arguments, within]
        async with self._database.transaction(user_id) as transaction:
            row = await transaction.row(query, *arguments)
        return None if row is None else store_rows.stored(row)

    async def by_request(self, user_id: ids.UserId, request_id: ids.RequestId) -> Stored | None:
        """The user's context that was made under this request id."""
        query = f"SELECT {store_rows.FRAME}, asked, closed_at FROM context.contexts WHERE user_id = $1 AND request_id = $2"
        async with self._database.transaction(user_id) as transaction:
            row = await transaction.row(query, user_id, request_id)
        return None if row is None else store_rows.stored(row)

    async def page(self, user_id: ids.UserId, wanted: Filter, before: ids.ContextId | None, limit: int) -> tuple[list[Stored], bool]:
        """The user's contexts made before another one, newest first, fewer than `limit` when they are long; and whether they were."""
        query, arguments = store_rows.page(user_id, wanted, before, limit)
        async with self._database.transaction(user_id) as transaction:
            return store_rows.paged(await transaction.fetch(query, *arguments))

    async def trail(self, user_id: ids.UserId, about: About, after: int, limit: int) -> list[Entry]:
        """Lines of the user's audit trail behind one of them, oldest first."""
        async with self._database.transaction(user_id) as transaction:
            return await store_rows.trail(transaction, user_id, about, after, limit)

    async def open(
        self, frame: UserExecutionContext, asked: bytes, line: Line, until: datetime, *, new_thread: bool, first: First | None = None
    ) -> None:
        """Store a context whose token ends then, its thread when that is new, and a message that begins it.

        Raises `Conflict` when the request id of context or message is taken; `NotFound` when the thread is neither new nor one the user
        sees, `PermissionDenied` when it was granted to them for reading only.
        """

        opening = Opening(frame, asked, line, until, new_thread, first)
        outcome = await self._openings.ask(opening)
        if outcome is None:
            outcome = (await self._database.retried(frame.user_id, lambda alone: store_openings.store(alone, [opening])))[0]
        if outcome == "taken":
            raise Conflict("contexts_request")
        if outcome != "made":
            raise changes.only_read() if outcome == "read" else changes.no_thread()

    async def open_gathered(self) -> None:
        """Open what `open` is asked for, for ever: what comes while others are being stored is stored together, next."""
        await self._openings.run()

    async def _opened(self, openings: Sequence[Opening]) -> Sequence[Outcome | None]:
        """What became of each; None when it must be tried alone."""
        try:
            # it may be done twice: what was opened by a connection that died then is `taken`, and found by its request id
            (row,) = await self._database.alone(*store_openings.statement(openings, _PATIENCE))
        except _ONE_OF_THEM:
            return [None] * len(openings)
        outcomes: Sequence[Outcome] = row["outcomes"]
        return outcomes

    async def derive(self, frame: UserExecutionContext, parent_id: ids.ContextId, asked: bytes, line: Line, until: datetime) -> bool:
        """Store a child; False when its parent is closed, or its thread not there for writing any more. Raises `Conflict`."""
        return await self._database.retried(
            frame.user_id, lambda transaction: _store(transaction, _BELOW, frame, asked, line, until, parent_id)
        )  # fmt: skip

    async def renew(self, user_id: ids.UserId, context_id: ids.ContextId, until: datetime) -> bool:
        """Take note of when the last token of an open context ends; False when there is no open one."""
        async with self._database.transaction(user_id) as transaction:
            return await transaction.execute(_RENEW, user_id, context_id, until) == "UPDATE 1"

    async def rest(self, user_id: ids.UserId, context_id: ids.ContextId, until: datetime) -> None:
        """Take note that the token that ends then is used no more, if it is the last one."""
        async with self._database.transaction(user_id) as transaction:
            await transaction.execute(_REST, user_id, context_id, until)

    async def close(self, frame: UserExecutionContext, line: Line) -> datetime | None:
        """Close an open context; None when there is no open one."""
        (row,) = await self._database.alone(_CLOSE, frame.user_id, frame.context_id, line.actor, line.action, json.dumps(line.detail))
        closed_at: datetime | None = row["closed_at"]
        return closed_at


async def _store(
    transaction: Transaction, query: str, frame: UserExecutionContext, asked: bytes, line: Line, until: datetime, *more: object
) -> bool:
    """Store a context with its line, in one statement; whether there was a place for it."""
    done = await transaction.execute(
        query,
        frame.context_id, frame.user_id, frame.tenant_id, frame.session_id, frame.thread_id, frame.run_id, frame.request_id,
        frame.connection_id, list(frame.roles), frame.tier, sorted(frame.scope or ()), frame.created_at, frame.deadline, frame.depth,
        frame.parent_request_id, frame.correlation_id, frame.canonical_agent_context, frame.canonical_audit_metadata, asked, until,
        line.actor, line.action, json.dumps(line.detail), *more,
    )  # fmt: skip
    return done == "INSERT 0 1"
