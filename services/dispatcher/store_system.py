"""SQL that crosses users: claims, leases and ends of runs. Database time only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime

from chassis import postgres
from netra import ids
from services.dispatcher import runs, stages

_CLAIM = """
WITH first AS (
    -- the first run of each free thread of users who may execute more; no more of them than one look can use
    SELECT r.run_id, r.user_id, r.created_at, most.runs AS most_runs, (
        SELECT count(*) FROM dispatcher.runs AS busy WHERE busy.user_id = r.user_id AND busy.kind = 'agent' AND busy.state = 'running'
        ) AS busy_runs
    FROM dispatcher.runs AS r JOIN unnest($5::text[], $6::int[]) AS most (tier, runs) USING (tier)
    WHERE state = 'queued' AND cancelled_at IS NULL AND (kind = 'tool' OR agent = ANY($3)) AND most.runs > (
        SELECT count(*) FROM dispatcher.runs AS busy WHERE busy.user_id = r.user_id AND busy.kind = 'agent' AND busy.state = 'running')
      AND NOT EXISTS (
        SELECT FROM dispatcher.runs AS earlier
        WHERE earlier.thread_id = r.thread_id AND earlier.kind = 'agent' AND earlier.state IN ('queued', 'running', 'suspended')
          AND (earlier.state <> 'queued' OR (earlier.created_at, earlier.run_id) < (r.created_at, r.run_id)))
    ORDER BY r.created_at, r.run_id LIMIT $4 + 200),
waiting AS (
    SELECT run_id, busy_runs + row_number() OVER (PARTITION BY user_id ORDER BY created_at, run_id) <= most_runs AS may FROM first),
claimable AS (
    SELECT run_id FROM dispatcher.runs AS r
    WHERE run_id = ANY(ARRAY(
        SELECT run_id FROM waiting WHERE may
        UNION ALL SELECT run_id FROM dispatcher.runs WHERE state = 'queued' AND cancelled_at IS NOT NULL
        UNION ALL SELECT run_id FROM dispatcher.runs WHERE state IN ('running', 'finishing') AND lease_until < now()))
      -- once more, for a row that somebody changed meanwhile
      AND (state = 'queued' OR state IN ('running', 'finishing') AND lease_until < now()) AND (kind = 'tool' OR agent = ANY($3))
    ORDER BY created_at, run_id LIMIT $4 FOR UPDATE SKIP LOCKED)
UPDATE dispatcher.runs AS r
SET state = CASE state WHEN 'queued' THEN 'running' ELSE state END, epoch = epoch + 1, lease_owner = $1,
    lease_until = now() + make_interval(secs => $2), started_at = coalesce(started_at, now()),
    stages = jsonb_build_object('routing_to_agent', clock_timestamp()) || stages
FROM claimable WHERE r.run_id = claimable.run_id
RETURNING r.run_id, r.kind, r.agent, r.request, r.inputs, r.deadline_s, r.message_id, r.context, r.context_token, r.traceparent,
    r.epoch, CASE WHEN r.cancelled_at IS NULL THEN '' ELSE r.cancelled_by END AS cancelled,
    r.token_renewed_at < now() - interval '1 hour' AS expired, r.roles, r.tier, r.narrowed_at, r.state = 'finishing' AS finishing
"""
# Whoever writes to many runs takes them in one order: two that met crosswise would cost leases.
# The lease of a tool that was called directly begins longer than this.
_RENEW = """
UPDATE dispatcher.runs AS r SET lease_until = greatest(lease_until, now() + make_interval(secs => $2))
FROM (SELECT run_id FROM dispatcher.runs
      WHERE lease_owner = $1 AND run_id = ANY($3::uuid[]) AND state IN ('running', 'suspended', 'finishing')
      ORDER BY run_id FOR NO KEY UPDATE) AS mine
WHERE r.run_id = mine.run_id
RETURNING r.run_id, r.epoch, CASE WHEN r.cancelled_at IS NULL THEN '' ELSE r.cancelled_by END AS cancelled,
    r.token_renewed_at < now() - interval '20 minutes' AS token_old, r.roles, r.tier, r.narrowed_at
"""
# a session never lives again; of a user, what was started later is not meant
_REVOKE = """
UPDATE dispatcher.runs AS r SET cancelled_at = now(), cancelled_by = 'security'
FROM (SELECT run_id FROM dispatcher.runs
      WHERE cancelled_at IS NULL AND state IN ('queued', 'running', 'suspended')
        AND (session_id = NULLIF($1, '')::uuid OR user_id = NULLIF($2, '')::uuid AND created_at <= $3)
      ORDER BY run_id FOR NO KEY UPDATE) AS meant
WHERE r.run_id = meant.run_id
"""
# words may come in another order than they were said
_NARROW = """
UPDATE dispatcher.runs AS r SET roles = $2, tier = $3, narrowed_at = $4
FROM (SELECT run_id FROM dispatcher.runs
      WHERE user_id = $1 AND created_at <= $5 AND (narrowed_at IS NULL OR narrowed_at < $4)
        AND state IN ('queued', 'running', 'suspended')
      ORDER BY run_id FOR NO KEY UPDATE) AS meant
WHERE r.run_id = meant.run_id
"""
# those that wait have no owner who renews their token; two processes that renew the same one do no harm
_OLD_TOKENS = """
SELECT run_id, epoch, context_token FROM dispatcher.runs
WHERE state = 'queued' AND token_renewed_at < now() - interval '20 minutes' ORDER BY token_renewed_at LIMIT $1
"""
# a context ends with its last token, and nobody can close it with that any more
_OVER = """
UPDATE dispatcher.runs AS r SET context_open = false
FROM (SELECT run_id FROM dispatcher.runs WHERE context_open AND token_renewed_at < now() - interval '1 hour'
      ORDER BY run_id FOR NO KEY UPDATE) AS over
WHERE r.run_id = over.run_id
"""
# the first one counts; two gateways that tell of the same runs must not wait for each other in a circle
_NOTIFIED = """
WITH told AS (SELECT run_id, min(at) AS at FROM unnest($1::uuid[], $2::timestamptz[]) AS given (run_id, at) GROUP BY run_id),
first AS (
    SELECT run_id FROM dispatcher.runs WHERE run_id IN (SELECT run_id FROM told) AND NOT stages ? 'websocket_notification_sent'
    ORDER BY run_id FOR UPDATE)
UPDATE dispatcher.runs AS r SET stages = jsonb_build_object('websocket_notification_sent', told.at) || r.stages
FROM told JOIN first USING (run_id) WHERE r.run_id = told.run_id
"""


class SystemStore:
    """The rows of all users, through the system role."""

    def __init__(self, database: postgres.DatabaseManager) -> None:
        self._database = database

    async def claim(
        self, owner: str, lease_s: float, agents: Sequence[str], most: int, concurrent: Mapping[str, int]
    ) -> list[runs.Claim]:  # fmt: skip
        """Own up to `most` runs that wait or whose owner is silent, oldest first; `concurrent` of a user's at a time, by tier."""
        async with self._database.transaction() as transaction:
            # who counts what executes must be the only one who adds to it
            await transaction.execute("SELECT pg_advisory_xact_lock(hashtext('dispatcher.claim'))")
            rows = await transaction.fetch(
                _CLAIM, owner, lease_s, list(agents), most, list(concurrent), list(concurrent.values())
            )  # fmt: skip
        return [_claim(row) for row in rows]

    async def renew(self, owner: str, lease_s: float, run_ids: Sequence[str]) -> dict[str, runs.Held]:
        """Keep owning runs. Those still owned, each with what its row says by now."""
        # a database that hangs must be noticed before the lease has run out
        async with self._database.transaction(timeout_s=lease_s / 3) as transaction:
            rows = await transaction.fetch(_RENEW, owner, lease_s, list(run_ids))
        return {str(row["run_id"]): runs.Held(row["epoch"], row["cancelled"], row["token_old"], _rights(row)) for row in rows}

    async def old_tokens(self, most: int) -> list[tuple[ids.RunId, int, str]]:
        """Run, epoch and context token of runs that wait and whose token needs renewal, oldest first."""
        async with self._database.transaction() as transaction:
            rows = await transaction.fetch(_OLD_TOKENS, most)
        return [(ids.RunId(str(row["run_id"])), row["epoch"], row["context_token"]) for row in rows]

    async def token_renewed(self, run_id: ids.RunId, epoch: int, token: str) -> None:
        """Keep the fresh context token of a run."""
        query = "UPDATE dispatcher.runs SET context_token = $3, token_renewed_at = now() WHERE run_id = $1 AND epoch = $2"
        async with self._database.transaction() as transaction:
            await transaction.execute(query, run_id, epoch, token)

    async def finishing(self, run_id: ids.RunId, epoch: int, passed: Mapping[str, datetime]) -> bool:
        """The run's thread is free from now on; it has passed these stages. False when another owns the run."""
        query = (
            "UPDATE dispatcher.runs SET state = 'finishing', stages = $3::jsonb || stages"
            " WHERE run_id = $1 AND epoch = $2 AND state IN ('running', 'finishing')"
        )
        async with self._database.transaction() as transaction:
            return await transaction.execute(query, run_id, epoch, stages.written(passed)) == "UPDATE 1"

    async def ended(
        self, run_id: ids.RunId, epoch: int, state: runs.RunState, outcome: bytes, passed: Mapping[str, datetime], *, context_open: bool
    ) -> None:
        """The run's final state; it has passed these stages. A context that is `context_open` is still to be closed."""
        query = (
            "UPDATE dispatcher.runs SET state = $3, outcome = $4, ended_at = now(), lease_owner = NULL, lease_until = NULL,"
            " stages = $5::jsonb || stages, context_open = $6"
            " WHERE run_id = $1 AND epoch = $2 AND (state = 'finishing' OR state = 'running' AND kind = 'tool')"
        )
        async with self._database.transaction() as transaction:
            await transaction.execute(query, run_id, epoch, state, outcome, stages.written(passed), context_open)

    async def open_contexts(self, most: int) -> list[tuple[ids.RunId, str]]:
        """Runs that have ended and whose context is still to be closed, with its token while that lasts."""
        query = "SELECT run_id, context_token FROM dispatcher.runs WHERE context_open ORDER BY run_id LIMIT $1"
        async with self._database.transaction() as transaction:
            await transaction.execute(_OVER)
            return [(ids.RunId(str(row["run_id"])), row["context_token"]) for row in await transaction.fetch(query, most)]

    async def context_closed(self, run_id: ids.RunId) -> None:
        """The context of a run that has ended is closed, or has ended as well."""
        async with self._database.transaction() as transaction:
            await transaction.execute("UPDATE dispatcher.runs SET context_open = false WHERE run_id = $1 AND context_open", run_id)

    async def notified(self, told: Sequence[tuple[ids.RunId, datetime]]) -> None:
        """The ends of runs were sent to their users at these times. The first time counts; unknown runs are passed over."""
        async with self._database.transaction() as transaction:
            await transaction.execute(_NOTIFIED, [run_id for run_id, _ in told], [at for _, at in told])

    async def revoke(self, session_id: str, user_id: str, before: datetime) -> None:
        """Ask all runs of a session to stop, or those that a user started before."""
        async with self._database.transaction() as transaction:
            await transaction.execute(_REVOKE, session_id, user_id, before)

    async def narrow(self, user_id: str, rights: runs.Rights) -> None:
        """Take note of what a user has by now, for all runs that they started before and that have not ended."""
        async with self._database.transaction() as transaction:
            await transaction.execute(_NARROW, user_id, list(rights.roles), rights.tier, rights.since, rights.since + runs.LATE)

    async def release(self, owner: str) -> None:
        """Let others take over at once what this owner still has."""
        async with self._database.transaction() as transaction:
            await transaction.execute("UPDATE dispatcher.runs SET lease_until = now() WHERE lease_owner = $1", owner)


def _claim(row: postgres.Row) -> runs.Claim:
    order = runs.Order(
        run_id=ids.RunId(str(row["run_id"])),
        kind=row["kind"],
        agent=row["agent"],
        request=row["request"],
        inputs=row["inputs"],
        deadline_s=row["deadline_s"],
        message_id=str(row["message_id"] or ""),
        context=row["context"],
        context_token=row["context_token"],
        traceparent=row["traceparent"],
    )
    return runs.Claim(order, row["epoch"], row["cancelled"], row["expired"], _rights(row), row["finishing"])


def _rights(row: postgres.Row) -> runs.Rights | None:
    return runs.Rights(tuple(row["roles"]), row["tier"], row["narrowed_at"]) if row["narrowed_at"] is not None else None
