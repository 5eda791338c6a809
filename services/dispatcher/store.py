"""SQL for the runs of one user."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from datetime import datetime

from chassis import postgres
from netra import errors, ids
from services.dispatcher import runs, stages, store_waits

_COLUMNS = (
    "run_id, user_id, thread_id, request_id, digest, message_id, kind, agent, state, correlation_id, created_at, started_at,"
    " ended_at, outcome, agent_version, waits_for"
)
# what policies look at beside the user: a thread whose runs are shown, one whose runs may be cancelled
_THREAD, _OWNED_THREAD = "thread_id", "owned_thread_id"


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
        agent_version=row["agent_version"],
        waits_for=row["waits_for"],
    )


class Store(store_waits.UserWaits):
    """Runs as their user sees them; every statement is bound to a user id."""

    def __init__(self, database: postgres.DatabaseManager) -> None:
        self._database = database

    async def add(
        self, user_id: ids.UserId, run: runs.Order, *, session_id: str, tier: str, thread_id: str, request_id: str, digest: bytes,
        correlation_id: str, most_queued: int, on_busy: str, passed: Mapping[str, datetime], owner: str = "", lease_s: float = 0.0,
    ) -> runs.Added:  # fmt: skip
        """Add a run, or return the one with this request id. With an `owner` it runs at once, at epoch 1.

        `on_busy` says what becomes of the user's own runs under way on the thread: `interrupt` and `rollback` ask them to stop.
        Raises `Busy` when it is `reject` and the thread is not free, whoever uses it; `RateLimited` when too many wait.
        """

        async def work(transaction: postgres.Transaction) -> runs.Added:
            # one user's starts queue up here, and those of one thread, so the counts below are exact
            locks = "SELECT pg_advisory_xact_lock(hashtextextended($1, 0)), pg_advisory_xact_lock(hashtextextended($2, 0))"
            await transaction.execute(locks, f"start {user_id}", f"start in {thread_id}")
            if (known := await self._by_request(transaction, user_id, request_id)) is not None:
                return runs.Added(known)
            if on_busy == runs.REJECT:
                await _require_free(transaction, thread_id)
            await self._require_room(transaction, user_id, most_queued)
            stopped = await _stopped(transaction, user_id, thread_id, on_busy)
            row = await transaction.row(
                "INSERT INTO dispatcher.runs (run_id, user_id, thread_id, request_id, digest, message_id, kind, agent, request, inputs,"
                " deadline_s, context, context_token, correlation_id, traceparent, state, epoch, lease_owner, tier, session_id,"
                " stages, lease_until, started_at, agent_version)"
                " VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, $14, $15, $16, $17, $18, $20, $21, $22::jsonb,"
                " CASE WHEN $19::float8 > 0 THEN now() + make_interval(secs => $19) END, CASE WHEN $19::float8 > 0 THEN now() END, $23)"
                f" RETURNING {_COLUMNS}",
                run.run_id, user_id, thread_id, request_id, digest, run.message_id or None, run.kind, run.agent, run.request, run.inputs,
                run.deadline_s, run.context, run.context_token, correlation_id, run.traceparent,
                "running" if owner else "queued", 1 if owner else 0, owner or None, lease_s, tier, session_id,
                stages.written(passed), run.agent_version,
            )  # fmt: skip
            if row is None:
                raise errors.Internal("The run was not stored.")
            return runs.Added(_run(row), stopped)

        return await self._database.retried(user_id, work, within={_THREAD: thread_id})

    async def _require_room(self, transaction: postgres.Transaction, user_id: str, most_queued: int) -> None:
        query = "SELECT count(*) FROM dispatcher.runs WHERE user_id = $1 AND state = 'queued' AND cancelled_at IS NULL"
        if await transaction.value(query, user_id) >= most_queued:
            message = f"You have {most_queued} runs waiting; let some of them end first."
            raise errors.RateLimited(message, retry_after_ms=1000)

    async def _by_request(self, transaction: postgres.Transaction, user_id: str, request_id: str) -> runs.Run | None:
        query = f"SELECT {_COLUMNS} FROM dispatcher.runs WHERE user_id = $1 AND request_id = $2"
        row = await transaction.row(query, user_id, request_id)
        return None if row is None else _run(row)

    async def known(self, user_id: ids.UserId, request_id: str, *, thread_id: str, most_queued: int, on_busy: str) -> runs.Run | None:
        """The run that a request started, if any. Raises `Busy` or `RateLimited` when there is none and a new one may not come.

        Busy is a thread here by runs of the user alone: whether there are others is not told before it is known who may use the thread.
        """
        async with self._database.transaction(user_id) as transaction:
            if (run := await self._by_request(transaction, user_id, request_id)) is None:
                if on_busy == runs.REJECT and thread_id:
                    await _require_free(transaction, thread_id, user_id)
                await self._require_room(transaction, user_id, most_queued)
            return run

    async def require_free(self, user_id: ids.UserId, request_id: str, thread_id: str) -> None:
        """Raise `Busy` while anybody's run goes on in a thread that the user may use, unless this request has started one."""
        async with self._database.transaction(user_id, within={_THREAD: thread_id}) as transaction:
            if await self._by_request(transaction, user_id, request_id) is None:
                await _require_free(transaction, thread_id)

    async def by_request(self, user_id: ids.UserId, request_id: str) -> runs.Run | None:
        """The run that a request started, if any."""
        async with self._database.transaction(user_id) as transaction:
            return await self._by_request(transaction, user_id, request_id)

    async def get(self, user_id: ids.UserId, run_id: ids.RunId, granted: str = "") -> runs.Run:
        """One run, with its stages: the user's, or of a thread that was `granted` to them anybody's. Raises `NotFound`."""
        whose, which = store_waits.whose_rows(user_id, granted)
        query = f"SELECT {_COLUMNS}, stages FROM dispatcher.runs WHERE {whose} = $1 AND run_id = $2"
        async with self._database.transaction(user_id, within=_within(granted)) as transaction:
            row = await transaction.row(query, which, run_id)
        if row is None:
            raise errors.NotFound("There is no such run.", field="run_id")
        return dataclasses.replace(_run(row), stages=stages.read(row["stages"]))

    async def page(
        self, user_id: ids.UserId, *, before: str, size: int, thread_id: str, state: str, granted: str = ""
    ) -> list[runs.Run]:  # fmt: skip
        """Up to `size` runs, newest first, older than the run `before` when given; of a `granted` thread all, whoever owns them."""
        whose, which = store_waits.whose_rows(user_id, granted)
        asked = {f"{whose} =": which, "run_id <": before, "thread_id =": thread_id, "state =": state}
        # what was not asked for is not in the statement: a plan for any values would read all rows before a page
        given = {condition: value for condition, value in asked.items() if value}
        wanted = " AND ".join(f"{condition} ${number}" for number, condition in enumerate(given, 1))
        query = f"SELECT {_COLUMNS} FROM dispatcher.runs WHERE {wanted} ORDER BY run_id DESC LIMIT ${len(given) + 1}"
        async with self._database.transaction(user_id, within=_within(granted)) as transaction:
            return [_run(row) for row in await transaction.fetch(query, *given.values(), size)]

    async def cancel(self, user_id: ids.UserId, run_id: ids.RunId, granted: str = "") -> runs.Run:
        """Ask a run to stop, unless it has ended: the user's, or of a thread of theirs that was `granted` anybody's. Raises `NotFound`."""
        whose, which = store_waits.whose_rows(user_id, granted)
        query = (
            "UPDATE dispatcher.runs SET cancelled_at = coalesce(cancelled_at, now())"
            f" WHERE {whose} = $1 AND run_id = $2 AND state IN ('queued', 'running', 'suspended')"
        )
        async with self._database.transaction(user_id, within=_within(granted, owned=True)) as transaction:
            await transaction.execute(query, which, run_id)
        return await self.get(user_id, run_id, granted)


def _within(thread_id: str, *, owned: bool = False) -> dict[str, str]:
    """What row-level security lets a transaction see beyond the user's own rows, and change in a thread of theirs."""
    if not thread_id:
        return {}
    return {_THREAD: thread_id, _OWNED_THREAD: thread_id} if owned else {_THREAD: thread_id}


async def _require_free(transaction: postgres.Transaction, thread_id: str, user_id: str = "") -> None:
    mine = " AND user_id = $2" if user_id else ""
    query = (
        "SELECT EXISTS (SELECT FROM dispatcher.runs WHERE thread_id = $1 AND kind = 'agent'"
        f" AND state IN ('queued', 'running', 'suspended'){mine})"
    )
    if await transaction.value(query, thread_id, *([user_id] if user_id else [])):
        raise errors.Busy(thread_id=thread_id)


async def _stopped(transaction: postgres.Transaction, user_id: str, thread_id: str, on_busy: str) -> tuple[ids.RunId, ...]:
    """Ask the user's runs under way on a thread to stop for a new one; which they are."""
    if on_busy not in (runs.INTERRUPT, runs.ROLLBACK):
        return ()
    also = ", rolled_back_at = now()" if on_busy == runs.ROLLBACK else ""
    query = (
        f"UPDATE dispatcher.runs AS r SET cancelled_at = coalesce(cancelled_at, now()){also} FROM (SELECT run_id FROM dispatcher.runs"
        "   WHERE user_id = $1 AND thread_id = $2 AND kind = 'agent' AND state IN ('queued', 'running', 'suspended')"
        "   ORDER BY run_id FOR NO KEY UPDATE) AS earlier WHERE r.run_id = earlier.run_id RETURNING r.run_id"
    )
    return tuple(ids.RunId(row["run_id"]) for row in await transaction.fetch(query, user_id, thread_id))
