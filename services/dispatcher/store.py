"""SQL for the runs of one user."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from datetime import datetime

from chassis import postgres
from netra import errors, ids
from services.dispatcher import runs, stages

_COLUMNS = (
    "run_id, user_id, thread_id, request_id, digest, message_id, kind, agent, state, correlation_id, created_at, started_at,"
    " ended_at, outcome"
)


def _run(row: postgres.Row) -> runs.Run:
    return runs.Run(
        run_id=ids.RunId(str(row["run_id"])),
        user_id=ids.UserId(str(row["user_id"])),
        thread_id=ids.ThreadId(str(row["thread_id"])),
        request_id=row["request_id"],
        message_id=str(row["message_id"] or ""),
        digest=row["digest"],
        kind=row["kind"],
        agent=row["agent"],
        state=runs.RunState(row["state"]),
        correlation_id=row["correlation_id"],
        created_at=row["created_at"],
        started_at=row["started_at"],
        ended_at=row["ended_at"],
        outcome=row["outcome"] or b"",
    )


class Store:
    """Runs as their user sees them; every statement is bound to a user id."""

    def __init__(self, database: postgres.DatabaseManager) -> None:
        self._database = database

    async def add(
        self, user_id: ids.UserId, run: runs.Order, *, session_id: str, tier: str, thread_id: str, request_id: str, digest: bytes,
        correlation_id: str, most_queued: int, only_if_free: bool, passed: Mapping[str, datetime], owner: str = "", lease_s: float = 0.0,
    ) -> runs.Run:  # fmt: skip
        """Add a run, or return the one with this request id. With an `owner` it runs at once, at epoch 1.

        Raises `Busy` when the thread must be free and is not, `RateLimited` when too many wait.
        """
        async with self._database.transaction(user_id) as transaction:
            # one user's starts queue up here, so the counts below are exact
            await transaction.execute("SELECT pg_advisory_xact_lock(hashtextextended($1, 0))", f"start {user_id}")
            if (known := await self._by_request(transaction, user_id, request_id)) is not None:
                return known
            await self._admit(transaction, user_id, thread_id, most_queued, only_if_free)
            row = await transaction.row(
                "INSERT INTO dispatcher.runs (run_id, user_id, thread_id, request_id, digest, message_id, kind, agent, request, inputs,"
                " deadline_s, context, context_token, correlation_id, traceparent, state, epoch, lease_owner, tier, session_id,"
                " stages, lease_until, started_at)"
                " VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17, $18, $20, $21, $22::jsonb,"
                " CASE WHEN $19::float8 > 0 THEN now() + make_interval(secs => $19) END, CASE WHEN $19::float8 > 0 THEN now() END)"
                f" RETURNING {_COLUMNS}",
                run.run_id, user_id, thread_id, request_id, digest, run.message_id or None, run.kind, run.agent, run.request, run.inputs,
                run.deadline_s, run.context, run.context_token, correlation_id, run.traceparent,
                "running" if owner else "queued", 1 if owner else 0, owner or None, lease_s, tier, session_id,
                stages.written(passed),
            )  # fmt: skip
        if row is None:
            raise errors.Internal("The run was not stored.")
        return _run(row)

    async def _admit(self, transaction: postgres.Transaction, user_id: str, thread_id: str, most_queued: int, only_if_free: bool) -> None:
        if only_if_free:
            query = (
                "SELECT EXISTS (SELECT FROM dispatcher.runs WHERE user_id = $1 AND thread_id = $2 AND kind = 'agent'"
                " AND state IN ('queued', 'running', 'suspended'))"
            )
            if await transaction.value(query, user_id, thread_id):
                raise errors.Busy(thread_id=thread_id)
        query = "SELECT count(*) FROM dispatcher.runs WHERE user_id = $1 AND state = 'queued'"
        if await transaction.value(query, user_id) >= most_queued:
            message = f"You have {most_queued} runs waiting; let some of them end first."
            raise errors.RateLimited(message, retry_after_ms=1000)

    async def _by_request(self, transaction: postgres.Transaction, user_id: str, request_id: str) -> runs.Run | None:
        query = f"SELECT {_COLUMNS} FROM dispatcher.runs WHERE user_id = $1 AND request_id = $2"
        row = await transaction.row(query, user_id, request_id)
        return None if row is None else _run(row)

    async def known(self, user_id: ids.UserId, request_id: str, *, thread_id: str, most_queued: int, only_if_free: bool) -> runs.Run | None:
        """The run that a request started, if any. Raises `Busy` or `RateLimited` when there is none and a new one may not come."""
        async with self._database.transaction(user_id) as transaction:
            if (run := await self._by_request(transaction, user_id, request_id)) is None:
                await self._admit(transaction, user_id, thread_id, most_queued, only_if_free and bool(thread_id))
            return run

    async def by_request(self, user_id: ids.UserId, request_id: str) -> runs.Run | None:
        """The run that a request started, if any."""
        async with self._database.transaction(user_id) as transaction:
            return await self._by_request(transaction, user_id, request_id)

    async def get(self, user_id: ids.UserId, run_id: ids.RunId) -> runs.Run:
        """One run, with its stages. Raises `NotFound`."""
        query = f"SELECT {_COLUMNS}, stages FROM dispatcher.runs WHERE user_id = $1 AND run_id = $2"
        async with self._database.transaction(user_id) as transaction:
            row = await transaction.row(query, user_id, run_id)
        if row is None:
            raise errors.NotFound("There is no such run.", field="run_id")
        return dataclasses.replace(_run(row), stages=stages.read(row["stages"]))

    async def page(self, user_id: ids.UserId, *, before: str, size: int, thread_id: str, state: str) -> list[runs.Run]:
        """Up to `size` runs, newest first, older than the run `before` when given."""
        query = (
            f"SELECT {_COLUMNS} FROM dispatcher.runs WHERE user_id = $1 AND ($2 = '' OR run_id < NULLIF($2, '')::uuid)"
            " AND ($3 = '' OR thread_id = NULLIF($3, '')::uuid) AND ($4 = '' OR state = $4) ORDER BY run_id DESC LIMIT $5"
        )
        async with self._database.transaction(user_id) as transaction:
            return [_run(row) for row in await transaction.fetch(query, user_id, before, thread_id, state, size)]

    async def cancel(self, user_id: ids.UserId, run_id: ids.RunId) -> runs.Run:
        """Ask a run to stop, unless it has ended. Raises `NotFound`."""
        query = (
            "UPDATE dispatcher.runs SET cancelled_at = coalesce(cancelled_at, now()) WHERE user_id = $1 AND run_id = $2"
            " AND state IN ('queued', 'running', 'suspended')"
        )
        async with self._database.transaction(user_id) as transaction:
            await transaction.execute(query, user_id, run_id)
        return await self.get(user_id, run_id)
