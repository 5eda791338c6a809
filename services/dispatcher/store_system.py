"""SQL that crosses users: claims, leases and ends of runs. Database time only."""

from __future__ import annotations

import math
from collections.abc import Container, Mapping, Sequence
from datetime import datetime
from typing import NamedTuple

from chassis import postgres
from netra import errors, ids
from services.dispatcher import grouped, runs, stages

_WAITING = (runs.RunState.QUEUED, runs.RunState.SUSPENDED)
# longer than anything waits
_LONG_S = 3.0e9
# before all users
_NOBODY = "00000000-0000-0000-0000-000000000000"
# as the index says it
_READY = "r.cancelled_at IS NULL AND (r.state = 'queued' OR r.state = 'suspended' AND r.woken_at IS NOT NULL)"
# so many more users are looked at than runs can be taken: some may not begin anything just now
_MORE_USERS, _WIDER, _LOOKS = 20, 5, 4
# agents and versions of a dispatcher, as text; a run older than its column has none
_KEY = "r.agent || '@' || r.agent_version"
# Whose time it is, is woken. Then the users who have something that may begin or go on, from one of them on and around: each is found
# by one look into the index, however many runs the one before has.
_USERS = f"""
WITH RECURSIVE due AS (
    UPDATE dispatcher.runs AS r SET woken_at = now()
    FROM (SELECT run_id FROM dispatcher.runs WHERE state = 'suspended' AND woken_at IS NULL AND wakes_at <= now()
          ORDER BY wakes_at LIMIT 1000 FOR UPDATE SKIP LOCKED) AS over
    WHERE r.run_id = over.run_id RETURNING r.user_id),
later (user_id, turn) AS (
    (SELECT r.user_id, 1 FROM dispatcher.runs AS r WHERE {_READY} AND r.user_id > $1 ORDER BY r.user_id LIMIT 1)
    UNION ALL
    SELECT (SELECT r.user_id FROM dispatcher.runs AS r WHERE {_READY} AND r.user_id > later.user_id ORDER BY r.user_id LIMIT 1), turn + 1
    FROM later WHERE later.user_id IS NOT NULL AND turn < $2),
earlier (user_id, turn) AS (
    (SELECT r.user_id, (SELECT count(user_id)::int FROM later) + 1 FROM dispatcher.runs AS r
     WHERE {_READY} AND r.user_id <= $1 AND (SELECT count(user_id) FROM later) < $2 ORDER BY r.user_id LIMIT 1)
    UNION ALL
    SELECT (SELECT r.user_id FROM dispatcher.runs AS r
            WHERE {_READY} AND r.user_id > earlier.user_id AND r.user_id <= $1 ORDER BY r.user_id LIMIT 1), turn + 1
    FROM earlier WHERE earlier.user_id IS NOT NULL AND turn < $2)
SELECT user_id, false AS due FROM (SELECT * FROM later UNION ALL SELECT * FROM earlier) AS found WHERE user_id IS NOT NULL
UNION ALL SELECT DISTINCT user_id, true FROM due
"""
# Runs are ranked among those of their user: the first of each come before the second of any, and what a user has running counts.
# Those that end without being begun, and those whose owner is silent, need nobody's leave.
_CLAIM = f"""
WITH meant AS (SELECT user_id, turn FROM unnest($7::uuid[]) WITH ORDINALITY AS meant (user_id, turn)),
begins AS (
    SELECT first.run_id, first.most_runs, meant.turn,
        busy.runs + row_number() OVER (PARTITION BY meant.user_id ORDER BY first.created_at, first.run_id) AS rank
    FROM meant
    CROSS JOIN LATERAL (
        SELECT count(*) AS runs FROM dispatcher.runs AS r WHERE r.user_id = meant.user_id AND r.kind = 'agent' AND r.state = 'running'
        ) AS busy
    CROSS JOIN LATERAL (
        SELECT r.run_id, r.created_at, ($6::int[])[array_position($5::text[], r.tier)] AS most_runs
        FROM dispatcher.runs AS r
        WHERE r.user_id = meant.user_id AND {_READY} AND {_KEY} = ANY($3)
          AND busy.runs < ($6::int[])[array_position($5::text[], r.tier)]
          -- the first of its thread, which is free
          AND (r.state = 'suspended' OR NOT EXISTS (
            SELECT FROM dispatcher.runs AS earlier
            WHERE earlier.thread_id = r.thread_id AND earlier.kind = 'agent' AND earlier.state IN ('queued', 'running', 'suspended')
              AND (earlier.state <> 'queued' OR (earlier.created_at, earlier.run_id) < (r.created_at, r.run_id))))
        ORDER BY r.created_at, r.run_id LIMIT $4) AS first),
ends AS (
    SELECT run_id, row_number() OVER (PARTITION BY user_id ORDER BY run_id) AS rank FROM (
        (SELECT r.run_id, r.user_id FROM dispatcher.runs AS r
         WHERE r.state IN ('queued', 'suspended') AND r.cancelled_at IS NOT NULL AND {_KEY} = ANY($3) LIMIT $4 + 1000)
        UNION
        (SELECT r.run_id, r.user_id FROM dispatcher.runs AS r
         WHERE r.state = 'queued' AND r.created_at < now() - make_interval(secs => $8) AND {_KEY} = ANY($3)
         ORDER BY r.created_at LIMIT $4 + 1000)
        UNION
        SELECT r.run_id, r.user_id FROM dispatcher.runs AS r
        WHERE r.state IN ('running', 'finishing') AND r.lease_until < now() AND (r.kind = 'tool' OR {_KEY} = ANY($3))) AS over),
wanted AS (
    SELECT run_id, min(rank) AS rank, min(turn) AS turn
    FROM (SELECT run_id, rank, turn FROM begins WHERE rank <= most_runs UNION ALL SELECT run_id, rank, 0 FROM ends) AS one
    GROUP BY run_id),
ordered AS (
    SELECT array_agg(run_id ORDER BY rank, turn, run_id) AS run_ids
    FROM (SELECT run_id, rank, turn FROM wanted ORDER BY rank, turn, run_id LIMIT $4 + 200) AS those),
claimable AS (
    SELECT r.run_id, r.state AS was, r.state = 'queued' AND r.created_at < now() - make_interval(secs => $8) AS overdue
    FROM dispatcher.runs AS r
    WHERE r.run_id = ANY((SELECT run_ids FROM ordered)::uuid[])
      -- once more, for a row that somebody changed meanwhile
      AND (r.state = 'queued' OR r.state = 'suspended' AND (r.woken_at IS NOT NULL OR r.cancelled_at IS NOT NULL)
           OR r.state IN ('running', 'finishing') AND r.lease_until < now())
    ORDER BY array_position((SELECT run_ids FROM ordered), r.run_id) LIMIT $4 FOR UPDATE SKIP LOCKED)
UPDATE dispatcher.runs AS r
SET state = CASE WHEN r.state IN ('queued', 'suspended') THEN 'running' ELSE r.state END, epoch = r.epoch + 1, lease_owner = $1,
    lease_until = now() + make_interval(secs => $2), started_at = coalesce(r.started_at, now()), running_since = now(),
    -- an owner that let go of it left no name
    takeovers = r.takeovers + CASE WHEN r.state IN ('running', 'finishing') AND r.lease_owner IS NOT NULL THEN 1 ELSE 0 END,
    ran_s = r.ran_s + CASE WHEN r.state IN ('running', 'finishing')
        THEN greatest(extract(epoch FROM r.lease_until - coalesce(r.running_since, r.started_at))::float8, 0) ELSE 0 END,
    woken_at = NULL, waits_for = '', wakes_at = NULL, stages = jsonb_build_object('routing_to_agent', clock_timestamp()) || r.stages
FROM claimable WHERE r.run_id = claimable.run_id
RETURNING r.run_id, r.kind, r.agent, r.request, r.inputs, r.deadline_s, r.message_id, r.context, r.context_token, r.traceparent,
    r.epoch, CASE WHEN r.cancelled_at IS NULL THEN '' ELSE r.cancelled_by END AS cancelled,
    r.token_renewed_at < now() - interval '1 hour' AS expired, r.roles, r.tier, r.narrowed_at, r.state = 'finishing' AS finishing,
    r.agent_version, r.takeovers, r.ran_s, r.rolled_back_at IS NOT NULL AS rolled_back, r.user_id, claimable.was, claimable.overdue
"""
# found by the index that users are found by, whatever the planner thinks of how many there are
_STILL_READY = f"SELECT r.user_id FROM dispatcher.runs AS r WHERE {_READY} ORDER BY r.user_id LIMIT 1"
# agents that runs under way are of and no dispatcher has, each found by one look into the index
_MISSING = """
WITH RECURSIVE pairs (agent, version, started_at) AS (
    (SELECT agent, agent_version, created_at FROM dispatcher.runs
     WHERE kind = 'agent' AND state IN ('queued', 'running', 'suspended', 'finishing') ORDER BY agent, agent_version LIMIT 1)
    UNION ALL
    SELECT next.agent, next.agent_version, next.created_at FROM pairs CROSS JOIN LATERAL (
        SELECT r.agent, r.agent_version, r.created_at FROM dispatcher.runs AS r
        WHERE r.kind = 'agent' AND r.state IN ('queued', 'running', 'suspended', 'finishing')
          AND (r.agent, r.agent_version) > (pairs.agent, pairs.version)
        ORDER BY r.agent, r.agent_version LIMIT 1) AS next)
SELECT pairs.agent || '@' || pairs.version AS key,
    extract(epoch FROM now() - coalesce(
        (SELECT max(seen_at) FROM dispatcher.agents_seen AS seen WHERE seen.agent = pairs.agent AND pairs.version IN ('', seen.version)),
        pairs.started_at))::float8 AS missing_s
FROM pairs
"""
_SEEN = """
INSERT INTO dispatcher.agents_seen (agent, version) SELECT * FROM unnest($1::text[], $2::text[]) ORDER BY 1, 2
ON CONFLICT (agent, version) DO UPDATE SET seen_at = now()
"""
# What the run had not looked at counts, also what came in this moment: its row is held before that is read, and whoever brings
# something holds it as well.
_SUSPEND = """
UPDATE dispatcher.runs AS r
SET state = 'suspended', lease_owner = NULL, lease_until = NULL, waits_for = $3, wakes_at = now() + make_interval(secs => $4),
    ran_s = ran_s + coalesce(extract(epoch FROM now() - running_since)::float8, 0), running_since = NULL,
    woken_at = CASE
        WHEN $5::int IS NULL AND $6::uuid[] = '{}' THEN woken_at
        WHEN EXISTS (SELECT FROM dispatcher.messages AS m WHERE m.run_id = r.run_id AND m.number > $5::int)
            OR EXISTS (SELECT FROM dispatcher.approvals AS a WHERE a.approval_id = ANY($6::uuid[]) AND a.outcome IS NOT NULL) THEN now() END
WHERE run_id = $1 AND epoch = $2 AND state = 'running'
"""
# nobody's vote counts any more
_EXPIRED = """
UPDATE dispatcher.approvals AS a SET outcome = 'expired', resolved_at = now() FROM over WHERE a.run_id = over.run_id AND a.outcome IS NULL
"""
_END = f"""
WITH over AS (
    UPDATE dispatcher.runs SET state = $3, outcome = $4, ended_at = now(), lease_owner = NULL, lease_until = NULL,
        stages = $5::jsonb || stages, context_open = $6
    WHERE run_id = $1 AND epoch = $2 AND (state = 'finishing' OR state = 'running' AND kind = 'tool')
    RETURNING run_id)
{_EXPIRED}
"""
# the same of many; a row that somebody holds is passed over, so that the others need not wait for it
_ENDS = f"""
WITH given AS (
    SELECT * FROM unnest($1::uuid[], $2::bigint[], $3::text[], $4::bytea[], $5::text[], $6::boolean[])
        AS given (run_id, epoch, state, outcome, stages, context_open)),
mine AS (
    SELECT run_id FROM dispatcher.runs WHERE run_id = ANY($1) AND (state = 'finishing' OR state = 'running' AND kind = 'tool')
    ORDER BY run_id FOR NO KEY UPDATE SKIP LOCKED),
over AS (
    UPDATE dispatcher.runs AS r SET state = given.state, outcome = given.outcome, ended_at = now(), lease_owner = NULL,
        lease_until = NULL, stages = given.stages::jsonb || r.stages, context_open = given.context_open
    FROM given JOIN mine USING (run_id)
    WHERE r.run_id = given.run_id AND r.epoch = given.epoch AND (r.state = 'finishing' OR r.state = 'running' AND r.kind = 'tool')
    RETURNING r.run_id),
expired AS ({_EXPIRED})
SELECT run_id FROM over
"""
_MOST_ENDS = 200
# Whoever writes to many runs takes them in one order: two that met crosswise would cost leases.
# The lease of a tool that was called directly begins longer than this.
_RENEW = """
UPDATE dispatcher.runs AS r SET lease_until = greatest(lease_until, now() + make_interval(secs => $2)),
    takeovers = CASE WHEN r.run_id = ANY($4::uuid[]) THEN 0 ELSE r.takeovers END
FROM (SELECT run_id FROM dispatcher.runs
      WHERE lease_owner = $1 AND run_id = ANY($3::uuid[]) AND state IN ('running', 'suspended', 'finishing')
      ORDER BY run_id FOR NO KEY UPDATE) AS mine
WHERE r.run_id = mine.run_id
RETURNING r.run_id, r.epoch, CASE WHEN r.cancelled_at IS NULL THEN '' ELSE r.cancelled_by END AS cancelled,
    r.token_renewed_at < now() - interval '20 minutes' AS token_old, r.roles, r.tier, r.narrowed_at,
    r.woken_at IS NOT NULL AS woken, r.rolled_back_at IS NOT NULL AS rolled_back
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
WHERE state IN ('queued', 'suspended') AND token_renewed_at < now() - interval '20 minutes'
  -- later than that nobody renews it
  AND token_renewed_at > now() - interval '1 hour'
ORDER BY token_renewed_at, run_id LIMIT $1 OFFSET $2
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


class _End(NamedTuple):
    """What is stored at the end of a run."""

    run_id: ids.RunId
    epoch: int
    state: runs.RunState
    outcome: bytes
    stages: str
    context_open: bool


class SystemStore:
    """The rows of all users, through the system role. What is one statement is one round trip: each of these may be done twice."""

    def __init__(self, database: postgres.DatabaseManager) -> None:
        self._database = database
        self._ends: grouped.Grouped[_End] = grouped.Grouped(self._end, _MOST_ENDS)

    async def claim(
        self, owner: str, lease_s: float, agents: Sequence[tuple[str, str]], most: int, concurrent: Mapping[str, int], *,
        after_user: str = "", missing_s: float = math.inf, queued_s: float = _LONG_S,
    ) -> runs.Claims:  # fmt: skip
        """Own up to `most` runs that wait or whose owner is silent; `concurrent` of a user's at a time, by tier.

        Users have their turns in a circle, from the one behind `after_user` on; of those at hand who has less running goes first.
        Only runs of these `agents`, by name and version, and those whose agent nobody has had for `missing_s`, as orphaned.
        What waited in the queue for longer than `queued_s` is overdue.
        """
        after, many = after_user or _NOBODY, most + _MORE_USERS
        mine = {f"{name}@{version}" for name, version in agents} | {f"{name}@" for name, _ in agents}
        async with self._database.transaction() as transaction:
            missing = await _missing(transaction, missing_s) if missing_s < math.inf else {}
            keys = [*mine, *missing]
            for look in range(_LOOKS):
                found = await transaction.fetch(_USERS, after, many)
                users = [row["user_id"] for row in found if not row["due"]]
                due = [row["user_id"] for row in found if row["due"]]
                if not look:
                    # who counts what executes must be the only one who adds to it
                    await transaction.execute("SELECT pg_advisory_xact_lock(hashtext('dispatcher.claim'))")
                rows = await transaction.fetch(
                    _CLAIM, owner, lease_s, keys, most, list(concurrent), list(concurrent.values()),
                    [*users, *dict.fromkeys(user for user in due if user not in users)], queued_s,
                )  # fmt: skip
                if rows or len(users) < many:
                    break
                # nobody of these may begin anything just now: those behind them are looked at, many at once
                after, many = users[-1], many * _WIDER
            # all that is ready is still there when nothing was taken
            waits = bool(users) and (not rows or bool(await transaction.fetch(_STILL_READY)))
        more = len(rows) >= most or len(users) >= many
        return runs.Claims((_claim(row, mine, missing) for row in rows), _turn(rows, users) or after, more=more, waits=waits)

    async def queued(self, most: int) -> int:
        """How many runs wait for their start, of whichever user; not more than `most` are counted."""
        some = "SELECT FROM dispatcher.runs WHERE state = 'queued' AND cancelled_at IS NULL LIMIT $1"
        (row,) = await self._database.alone(f"SELECT count(*) AS waiting FROM ({some}) AS those", most)
        return int(row["waiting"])

    async def seen(self, agents: Sequence[tuple[str, str]]) -> None:
        """There is a dispatcher that has these agents, by name and version."""
        await self._database.alone(_SEEN, [name for name, _ in agents], [version for _, version in agents])

    async def context_token(self, run_id: ids.RunId) -> str:
        """The token of a run's context, as it was renewed last. Raises `NotFound`."""
        found = await self._database.alone("SELECT context_token FROM dispatcher.runs WHERE run_id = $1", run_id)
        if not found:
            raise errors.NotFound("There is no such run.", field="run_id")
        return str(found[0]["context_token"])

    async def renew(self, owner: str, lease_s: float, run_ids: Sequence[str], moved: Sequence[str] = ()) -> dict[str, runs.Held]:
        """Keep owning runs. Those still owned, each with what its row says by now. Of those that `moved` takeovers are counted anew."""
        # a database that hangs must be noticed before the lease has run out
        rows = await self._database.alone(_RENEW, owner, lease_s, list(run_ids), list(moved), timeout_s=lease_s / 3)
        return {
            str(row["run_id"]): runs.Held(row["epoch"], row["cancelled"], row["token_old"], _rights(row), row["woken"], row["rolled_back"])
            for row in rows
        }

    async def old_tokens(self, most: int, passed_over: int = 0) -> list[tuple[ids.RunId, int, str]]:
        """Run, epoch and context token of runs that wait and whose token is to be renewed and can be, oldest first, behind so many."""
        rows = await self._database.alone(_OLD_TOKENS, most, passed_over)
        return [(ids.RunId(str(row["run_id"])), row["epoch"], row["context_token"]) for row in rows]

    async def token_renewed(self, run_id: ids.RunId, epoch: int, token: str) -> None:
        """Keep the fresh context token of a run."""
        query = "UPDATE dispatcher.runs SET context_token = $3, token_renewed_at = now() WHERE run_id = $1 AND epoch = $2"
        await self._database.alone(query, run_id, epoch, token)

    async def finishing(self, run_id: ids.RunId, epoch: int, passed: Mapping[str, datetime]) -> bool | None:
        """The run's thread is free from now on; it has passed these stages. Whether its messages are to be hidden; that changes no more.

        None when another owns the run.
        """
        query = (
            "UPDATE dispatcher.runs SET state = 'finishing', stages = $3::jsonb || stages"
            " WHERE run_id = $1 AND epoch = $2 AND state IN ('running', 'finishing') RETURNING rolled_back_at IS NOT NULL AS rolled_back"
        )
        found = await self._database.alone(query, run_id, epoch, stages.written(passed))
        return bool(found[0]["rolled_back"]) if found else None

    async def ended(
        self, run_id: ids.RunId, epoch: int, state: runs.RunState, outcome: bytes, passed: Mapping[str, datetime], *, context_open: bool
    ) -> None:
        """The run's final state; it has passed these stages. A context that is `context_open` is still to be closed.

        What it asked people for and is not decided yet has expired with it. Ends of the same moment are stored together.
        """
        end = _End(run_id, epoch, state, outcome, stages.written(passed), context_open)
        if not await self._ends.put(end):
            # somebody held the row; or the run is not ours any more, and then nothing is found
            await self._database.alone(_END, *end)

    async def _end(self, ends: Sequence[_End]) -> list[bool]:
        over = {row["run_id"] for row in await self._database.alone(_ENDS, *map(list, zip(*ends, strict=True)))}
        return [end.run_id in over for end in ends]

    async def suspended(
        self, run_id: ids.RunId, epoch: int, waits_for: str, wait_s: float, *, mail_after: int | None = None, asked: Sequence[str] = ()
    ) -> bool:
        """The run waits, and nobody owns it until it is woken or `wait_s` are over. False when another owns it by now.

        It is woken at once when there is a message numbered higher than `mail_after`, or an end of one of the approvals `asked` for.
        With neither of the two, when anything came since it was claimed.
        """
        async with self._database.transaction() as transaction:
            await transaction.execute("SELECT FROM dispatcher.runs WHERE run_id = $1 FOR NO KEY UPDATE", run_id)
            done = await transaction.execute(_SUSPEND, run_id, epoch, waits_for, wait_s, mail_after, list(asked))
        return done == "UPDATE 1"

    async def open_contexts(self, most: int) -> list[tuple[ids.RunId, str]]:
        """Runs that have ended and whose context is still to be closed, with its token while that lasts."""
        query = "SELECT run_id, context_token FROM dispatcher.runs WHERE context_open ORDER BY run_id LIMIT $1"
        async with self._database.transaction() as transaction:
            await transaction.execute(_OVER)
            return [(ids.RunId(str(row["run_id"])), row["context_token"]) for row in await transaction.fetch(query, most)]

    async def context_closed(self, run_id: ids.RunId) -> None:
        """The context of a run that has ended is closed, or has ended as well."""
        await self._database.alone("UPDATE dispatcher.runs SET context_open = false WHERE run_id = $1 AND context_open", run_id)

    async def notified(self, told: Sequence[tuple[ids.RunId, datetime]]) -> None:
        """The ends of runs were sent to their users at these times. The first time counts; unknown runs are passed over."""
        await self._database.alone(_NOTIFIED, [run_id for run_id, _ in told], [at for _, at in told])

    async def revoke(self, session_id: str, user_id: str, before: datetime) -> None:
        """Ask all runs of a session to stop, or those that a user started before."""
        await self._database.alone(_REVOKE, session_id, user_id, before)

    async def narrow(self, user_id: str, rights: runs.Rights) -> None:
        """Take note of what a user has by now, for all runs that they started before and that have not ended."""
        await self._database.alone(_NARROW, user_id, list(rights.roles), rights.tier, rights.since, rights.since + runs.LATE)

    async def release(self, owner: str) -> None:
        """Let others carry on at once what this owner still has. It let go of it: for nobody that is a takeover."""
        query = "UPDATE dispatcher.runs SET lease_until = now(), lease_owner = NULL WHERE lease_owner = $1"
        await self._database.alone(query, owner)

    async def disown(self, owner: str, user_id: ids.UserId, request_id: str, kept: Sequence[str]) -> None:
        """Let others have at once what a request has begun at this owner, unless that is one of the runs it has `kept`."""
        query = (
            "UPDATE dispatcher.runs SET lease_until = now(), lease_owner = NULL WHERE user_id = $1 AND request_id = $2"
            " AND lease_owner = $3 AND state = 'running' AND kind = 'agent' AND run_id <> ALL($4::uuid[])"
        )
        await self._database.alone(query, user_id, request_id, owner, list(kept))

    async def close(self) -> None:
        """Store the ends that are not stored yet."""
        await self._ends.close()


async def _missing(transaction: postgres.Transaction, missing_s: float) -> dict[str, float]:
    """For how long nobody has had the agents of runs under way, where that is too long."""
    rows = await transaction.fetch(_MISSING)
    return {row["key"]: row["missing_s"] for row in rows if row["missing_s"] > missing_s}


def _turn(rows: Sequence[postgres.Row], users: Sequence[str]) -> str:
    """The last of these users who has had a turn in this look; of none of them, the last who was looked at."""
    places = {user_id: place for place, user_id in enumerate(users)}
    begun = [row["user_id"] for row in rows if row["was"] in _WAITING and not row["cancelled"]]
    had = [places[user_id] for user_id in begun if user_id in places]
    return users[max(had, default=-1)] if users else ""


def _claim(row: postgres.Row, mine: Container[str], missing: Mapping[str, float]) -> runs.Claim:
    order = runs.Order(
        run_id=ids.RunId(row["run_id"]),
        kind=row["kind"],
        agent=row["agent"],
        request=row["request"],
        inputs=row["inputs"],
        deadline_s=row["deadline_s"],
        message_id=str(row["message_id"] or ""),
        context=row["context"],
        context_token=row["context_token"],
        traceparent=row["traceparent"],
        agent_version=row["agent_version"],
    )
    key = f"{order.agent}@{order.agent_version}"
    return runs.Claim(
        order, row["epoch"], row["cancelled"], row["expired"], _rights(row), row["finishing"], takeovers=row["takeovers"],
        ran_s=row["ran_s"], orphaned=order.kind == "agent" and key not in mine, overdue=row["overdue"], rolled_back=row["rolled_back"],
        missing_s=missing.get(key, 0.0),
    )  # fmt: skip


def _rights(row: postgres.Row) -> runs.Rights | None:
    return runs.Rights(tuple(row["roles"]), row["tier"], row["narrowed_at"]) if row["narrowed_at"] is not None else None
