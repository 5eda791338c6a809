"""SQL that crosses users: the batching writer and the comparison of cursors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime

from chassis import postgres
from netra import errors
from services.events import frames, log

_OWNERS = "SELECT run_id, user_id FROM events.heads WHERE run_id = ANY($1::uuid[])"
_CURSORS = "SELECT user_id, last FROM events.cursors WHERE user_id = ANY($1::uuid[]) ORDER BY user_id FOR UPDATE"
_HEADS = """
SELECT run_id, user_id, thread_id, request_id, correlation_id, trace_id, retention, epoch, next_seq, last_digest, last_first_seq,
       last_cursor, last_at, ended, terminal_type, clock_timestamp() AS now
FROM events.heads WHERE run_id = ANY($1::uuid[]) ORDER BY run_id FOR UPDATE
"""
_EARLIER = """
SELECT e.run_id, e.seq, e.event_id, e.type, e.cursor FROM events.events e
JOIN unnest($1::uuid[], $2::uuid[], $3::bigint[], $4::bigint[]) AS w (user_id, run_id, first, last)
  ON e.user_id = w.user_id AND e.run_id = w.run_id AND e.seq BETWEEN w.first AND w.last
"""
_EARLIER_STEPS = "SELECT run_id, key FROM events.steps WHERE run_id = ANY($1::uuid[])"
_WRITE = """
WITH written AS (
    INSERT INTO events.events
        (retention, recorded_at, user_id, cursor, run_id, seq, thread_id, event_id, type, tool_call_id, ends, frame)
    SELECT * FROM unnest($1::text[], $2::timestamptz[], $3::uuid[], $4::bigint[], $5::uuid[], $6::bigint[], $7::uuid[], $8::uuid[],
                         $9::text[], $10::text[], $11::boolean[], $12::bytea[])
), journaled AS (
    INSERT INTO events.steps (run_id, user_id, key, result)
    SELECT * FROM unnest($13::uuid[], $14::uuid[], $15::text[], $16::bytea[])
), counted AS (
    UPDATE events.cursors c SET last = n.last FROM unnest($17::uuid[], $18::bigint[]) AS n (user_id, last) WHERE c.user_id = n.user_id
)
UPDATE events.heads h
SET next_seq = n.next_seq, last_digest = n.last_digest, last_first_seq = n.last_first_seq, last_cursor = n.last_cursor,
    last_at = n.last_at, ended = n.ended, terminal_type = n.terminal_type
FROM unnest($19::uuid[], $20::bigint[], $21::bytea[], $22::bigint[], $23::bigint[], $24::timestamptz[], $25::boolean[], $26::text[])
    AS n (run_id, next_seq, last_digest, last_first_seq, last_cursor, last_at, ended, terminal_type)
WHERE h.run_id = n.run_id
"""
_KNOWN_OWNERS = 100_000
_NO_TIME = datetime.min.replace(tzinfo=UTC)


class Writer:
    """Writes the appends of many users in one transaction."""

    def __init__(self, database: postgres.DatabaseManager) -> None:
        self._database = database
        self._owners: dict[str, str] = {}

    async def commit(self, appends: Sequence[log.Append]) -> log.Ledger:
        """Judge and write appends, in order, under locks taken in one fixed order: cursors, then heads."""
        async with self._database.transaction() as transaction:
            runs = sorted({append.request.run_id for append in appends})
            users = sorted(set((await self._owners_of(transaction, runs)).values()))
            cursors = {str(row["user_id"]): row["last"] for row in await transaction.fetch(_CURSORS, users)}
            rows = await transaction.fetch(_HEADS, runs)
            ledger = log.Ledger({str(row["run_id"]): _head(row) for row in rows}, cursors, rows[0]["now"] if rows else _NO_TIME)
            if overlapping := log.overlapping(appends, ledger.heads):
                await _load_earlier(transaction, ledger, overlapping)
            for append in appends:
                ledger.add(append)
            if ledger.changed:
                await transaction.execute(_WRITE, *_columns(ledger))
        return ledger

    async def _owners_of(self, transaction: postgres.Transaction, runs: list[str]) -> dict[str, str]:
        # the user of a run never changes, so what was seen once needs no second look
        if unknown := [run for run in runs if run not in self._owners]:
            if len(self._owners) > _KNOWN_OWNERS:
                self._owners.clear()
                unknown = runs
            self._owners |= {str(row["run_id"]): str(row["user_id"]) for row in await transaction.fetch(_OWNERS, unknown)}
        return {run: self._owners[run] for run in runs if run in self._owners}


def _head(row: postgres.Row) -> log.Head:
    run_id, user_id, thread_id = str(row["run_id"]), str(row["user_id"]), str(row["thread_id"])
    shared = frames.envelope(
        user_id=user_id, thread_id=thread_id, run_id=run_id, request_id=row["request_id"],
        correlation_id=row["correlation_id"], trace_id=row["trace_id"],
    )  # fmt: skip
    return log.Head(
        run_id, user_id, thread_id, shared, row["retention"], row["epoch"], row["next_seq"], row["last_digest"] or b"",
        row["last_first_seq"], row["last_cursor"], row["last_at"], row["ended"], row["terminal_type"],
    )  # fmt: skip


async def _load_earlier(transaction: postgres.Transaction, ledger: log.Ledger, overlapping: Sequence[log.Append]) -> None:
    requests = [append.request for append in overlapping]
    wanted = [(ledger.heads[r.run_id].user_id, r.run_id, r.first_seq, r.first_seq + len(r.events) - 1) for r in requests if r.events]
    rows = await transaction.fetch(_EARLIER, *_transposed(wanted, 4))
    ledger.earlier = {(str(row["run_id"]), row["seq"]): (str(row["event_id"]), row["type"], row["cursor"]) for row in rows}
    if runs := [request.run_id for request in requests if not request.events]:
        steps = await transaction.fetch(_EARLIER_STEPS, runs)
        ledger.earlier_steps = frozenset((str(row["run_id"]), row["key"]) for row in steps)


def _columns(ledger: log.Ledger) -> list[Sequence[object]]:
    events = [
        (row.retention, row.at, e.user_id, e.cursor, e.run_id, e.seq, e.thread_id, row.event_id, e.kind, row.tool_call_id, e.ends, e.frame)
        for row in ledger.events
        for e in (row.event,)
    ]
    steps = [(row.run_id, row.user_id, row.key, row.result) for row in ledger.steps]
    users = {head.user_id for head in ledger.changed.values()}
    cursors = [(user, ledger.cursors[user]) for user in users]
    heads = [
        (h.run_id, h.next_seq, h.last_digest, h.last_first_seq, h.last_cursor, h.last_at, h.ended, h.terminal_type)
        for h in ledger.changed.values()
    ]
    return [*_transposed(events, 12), *_transposed(steps, 4), *_transposed(cursors, 2), *_transposed(heads, 8)]


def _transposed(rows: Sequence[Sequence[object]], width: int) -> list[Sequence[object]]:
    return list(zip(*rows, strict=True)) if rows else [()] * width


class Cursors:
    """Compares many users with the record at once."""

    def __init__(self, database: postgres.DatabaseManager) -> None:
        self._database = database

    async def positions(self, users: Iterable[str]) -> Mapping[str, log.Position]:
        """How far each user's record reaches; users without one are left out."""
        query = "SELECT user_id, last, oldest FROM events.cursors WHERE user_id = ANY($1::uuid[])"
        async with self._database.transaction() as transaction:
            rows = await transaction.fetch(query, list(users))
        return {str(row["user_id"]): log.Position(row["last"], row["oldest"]) for row in rows}

    async def generation(self) -> str:
        """The generation of the record."""
        async with self._database.transaction() as transaction:
            found = await transaction.value("SELECT id FROM events.generation")
        if found is None:
            raise errors.Unavailable("The record has no generation yet.")
        return str(found)
