"""SQL for the runs of one user."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from chassis import postgres
from netra import errors, ids
from services.dispatcher import grouped, runs, stages, store_waits

_COLUMNS = (
    "run_id, user_id, thread_id, request_id, digest, message_id, kind, agent, state, correlation_id, created_at, started_at,"
    " ended_at, outcome, agent_version, waits_for"
)
# what stands against a start, as `dispatcher.may_start` says it
_IS_KNOWN, _IS_BUSY, _IS_FULL = "known", "busy", "full"
_MAY_START = "SELECT dispatcher.may_start($1, $2, NULLIF($3, '')::uuid, $4, $5) AS refused"
_START = (
    "SELECT refused, stopped, made_at, began_at FROM dispatcher.start_run($1, $2, $3, $4, $5, NULLIF($6, '')::uuid, $7, $8, $9, $10, $11,"
    " $12, $13, $14, $15, $16, $17, NULLIF($18, ''), $19, $20, $21, $22, $23)"
)
_IN_USE = (
    "SELECT EXISTS (SELECT FROM dispatcher.runs WHERE thread_id = $1 AND kind = 'agent' AND state IN ('queued', 'running', 'suspended'))"
)
# a call executes at once: nothing of the user's waits for it, nor it for anything
_BEGIN_OF = {
    "run": "uuid", "whose": "uuid", "thread": "uuid", "request": "text", "content": "bytea", "tool": "text", "given": "bytea",
    "lasts_s": "float8", "frame": "bytea", "token": "text", "correlation": "text", "parent": "text", "of_tier": "text",
    "of_session": "uuid", "owner": "text", "lease_s": "float8", "passed": "text", "most_queued": "int",
}  # fmt: skip
_BEGIN = (
    f"SELECT dispatcher.begin_call({', '.join(f'{name}::jsonb' if name == 'passed' else name for name in _BEGIN_OF)}) AS made"
    f" FROM unnest({', '.join(f'${number}::{kind}[]' for number, kind in enumerate(_BEGIN_OF.values(), 1))}) WITH ORDINALITY"
    f" AS given ({', '.join(_BEGIN_OF)}, place) ORDER BY place"
)
_MOST_BEGUN = 64
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
        self._begins: grouped.Grouped[tuple[Any, ...]] = grouped.Grouped(self._begin, _MOST_BEGUN)

    async def add(
        self, user_id: ids.UserId, run: runs.Order, *, session_id: str, tier: str, thread_id: str, request_id: str, digest: bytes,
        correlation_id: str, most_queued: int, on_busy: str, passed: Mapping[str, datetime], owner: str = "", lease_s: float = 0.0,
        concurrent: int = 0,
    ) -> runs.Added:  # fmt: skip
        """Add a run, or return the one with this request id. With an `owner` it runs at once, at epoch 1.

        A run of an agent waits all the same while any of the user's does, while its thread is not free, or while the user has as many
        as `concurrent` that execute or are suspended. `on_busy` says what becomes of the user's own runs under way on the thread:
        `interrupt` and `rollback` ask them to stop. Raises `Busy` when it is `reject` and the thread is not free, whoever uses it;
        `RateLimited` when too many wait.
        """
        began = time.monotonic()
        # done twice it is found to be there; should this process have begun it the first time, its lease runs out
        (row,) = await self._database.alone(
            _START, run.run_id, user_id, thread_id, request_id, digest, run.message_id, run.agent, run.request, run.inputs, run.deadline_s,
            run.context, run.context_token, correlation_id, run.traceparent, tier, session_id, run.agent_version, owner, lease_s,
            stages.written(passed), most_queued, on_busy, concurrent,
        )  # fmt: skip
        if row["refused"]:
            return runs.Added(await self._known(user_id, request_id, row["refused"], thread_id, most_queued))
        at_once = row["began_at"] is not None
        made = runs.Run(
            run_id=run.run_id, user_id=user_id, thread_id=ids.ThreadId(thread_id), request_id=request_id, message_id=run.message_id,
            digest=digest, kind=run.kind, agent=run.agent, state=runs.RunState.RUNNING if at_once else runs.RunState.QUEUED,
            correlation_id=correlation_id, created_at=row["made_at"], started_at=row["began_at"], agent_version=run.agent_version,
        )  # fmt: skip
        return runs.Added(made, tuple(ids.RunId(run_id) for run_id in row["stopped"] or ()), began if at_once else 0.0)

    async def _known(self, user_id: ids.UserId, request_id: str, refused: str, thread_id: str, most_queued: int) -> runs.Run:
        """The run that stood against a start; or what did is raised."""
        if refused == _IS_BUSY:
            raise errors.Busy(thread_id=thread_id)
        if refused == _IS_FULL:
            raise errors.RateLimited(f"You have {most_queued} runs waiting; let some of them end first.", retry_after_ms=1000)
        if (run := await self.by_request(user_id, request_id)) is None:
            raise errors.Unavailable("The run could not be accepted just now. Try again.")
        return run

    async def begin(
        self, user_id: ids.UserId, call: runs.Order, *, session_id: str, tier: str, thread_id: str, request_id: str, digest: bytes,
        correlation_id: str, most_queued: int, passed: Mapping[str, datetime], owner: str, lease_s: float,
    ) -> runs.Run | None:  # fmt: skip
        """Add a call, which executes at once at epoch 1, or return the run with this request id. Raises `RateLimited` if too many wait.

        Those of the same moment are added together, each as its own user.
        """
        made = await self._begins.put((
            call.run_id, user_id, thread_id, request_id, digest, call.agent, call.inputs, call.deadline_s, call.context,
            call.context_token, correlation_id, call.traceparent, tier, session_id, owner, lease_s, stages.written(passed), most_queued,
        ))  # fmt: skip
        if made:
            return None
        (row,) = await self._database.alone(_MAY_START, user_id, request_id, "", runs.ENQUEUE, most_queued)
        # when nothing stands against it by now, it was known a moment ago
        return await self._known(user_id, request_id, row["refused"] or _IS_KNOWN, "", most_queued)

    async def _begin(self, calls: Sequence[tuple[Any, ...]]) -> list[bool]:
        # done twice, they are found to be there; their requests come again, and their leases run out
        return [row["made"] for row in await self._database.alone(_BEGIN, *map(list, zip(*calls, strict=True)))]

    async def close(self) -> None:
        """Add what waits."""
        await self._begins.close()

    async def _by_request(self, transaction: postgres.Transaction, user_id: str, request_id: str) -> runs.Run | None:
        query = f"SELECT {_COLUMNS} FROM dispatcher.runs WHERE user_id = $1 AND request_id = $2"
        row = await transaction.row(query, user_id, request_id)
        return None if row is None else _run(row)

    async def known(self, user_id: ids.UserId, request_id: str, *, thread_id: str, most_queued: int, on_busy: str) -> runs.Run | None:
        """The run that a request started, if any. Raises `Busy` or `RateLimited` when there is none and a new one may not come.

        Busy is a thread here by runs of the user alone: whether there are others is not told before it is known who may use the thread.
        """
        # of a thread the user alone is set, so that their runs are all that is seen
        (row,) = await self._database.alone(_MAY_START, user_id, request_id, thread_id, on_busy, most_queued)
        return await self._known(user_id, request_id, row["refused"], thread_id, most_queued) if row["refused"] else None

    async def require_free(self, user_id: ids.UserId, request_id: str, thread_id: str) -> None:
        """Raise `Busy` while anybody's run goes on in a thread that the user may use, unless this request has started one."""
        async with self._database.transaction(user_id, within={_THREAD: thread_id}) as transaction:
            if await self._by_request(transaction, user_id, request_id) is None and await transaction.value(_IN_USE, thread_id):
                raise errors.Busy(thread_id=thread_id)

    async def by_request(self, user_id: ids.UserId, request_id: str) -> runs.Run | None:
        """The run that a request started, if any."""
        async with self._database.transaction(user_id) as transaction:
            return await self._by_request(transaction, user_id, request_id)

    async def get(self, user_id: ids.UserId, run_id: ids.RunId, granted: str = "") -> runs.Run:
        """One run, with its stages: the user's, or of a thread that was `granted` to them anybody's. Raises `NotFound`."""
        whose, which = store_waits.whose_rows(user_id, granted)
        query = f"SELECT {_COLUMNS}, stages FROM dispatcher.runs WHERE {whose} = $1 AND run_id = $2 AND erased_at IS NULL"
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
        query = f"SELECT {_COLUMNS} FROM dispatcher.runs WHERE {wanted} AND erased_at IS NULL ORDER BY run_id DESC LIMIT ${len(given) + 1}"
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
