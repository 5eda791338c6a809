"""SQL that crosses users: the batching writer and the comparison of cursors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta

from chassis import postgres
from netra import errors
from services.events import frames, ledger, log

# a replica that is stopped in the middle of a transaction holds up the users in it, and nobody for longer than this
OPTIONS = {"idle_in_transaction_session_timeout": "2s", "lock_timeout": "500ms"}
_RUNS = """
SELECT run_id, user_id, thread_id, request_id, correlation_id, trace_id, retention, created_at
FROM events.heads WHERE run_id = ANY($1::uuid[])
"""
_CURSORS = """
SELECT user_id, last, last_at, (SELECT id FROM events.generation) AS generation
FROM events.cursors WHERE user_id = ANY($1::uuid[]) ORDER BY user_id FOR UPDATE
"""
_NEW_CURSORS = """
INSERT INTO events.cursors (user_id, tenant_id) SELECT * FROM unnest($1::uuid[], $2::uuid[]) AS n (user_id, tenant_id) ORDER BY user_id
ON CONFLICT DO NOTHING
"""
_HEADS = """
SELECT run_id, created_at, epoch, next_seq, last_digest, last_first_seq, last_cursor, last_at, ended, terminal_type,
       clock_timestamp() AS now
FROM events.heads WHERE run_id = ANY($1::uuid[]) ORDER BY run_id FOR UPDATE
"""
_EARLIER = """
SELECT of_run, at_seq, at_cursor, at_time, digest
FROM events.earlier_events($1::uuid[], $2::uuid[], $3::bigint[], $4::bigint[], $5::text[], $6, $7)
"""
_EARLIER_STEPS = "SELECT of_run, at_key, digest FROM events.earlier_steps($1::uuid[])"
_WITHOUT_RUN = "SELECT of_user, of_event, at_cursor, at_time, digest FROM events.earlier_without_run($1::uuid[], $2::uuid[], $3)"
# arrays as text: the server reads them several times faster than the driver packs them, element by element
_WRITE = """
WITH written AS (
    INSERT INTO events.events
        (retention, recorded_at, user_id, cursor, run_id, seq, thread_id, event_id, type, tool_call_id, ends, frame)
    SELECT * FROM unnest($1::text::text[], $2::text::timestamptz[], $3::text::uuid[], $4::text::bigint[], $5::text::uuid[],
                         $6::text::bigint[], $7::text::uuid[], $8::text::uuid[], $9::text::text[], $10::text::text[],
                         $11::text::boolean[], $12::bytea[])
), journaled AS (
    INSERT INTO events.steps (run_id, user_id, key, result)
    SELECT * FROM unnest($13::text::uuid[], $14::text::uuid[], $15::text::text[], $16::bytea[])
), counted AS (
    UPDATE events.cursors c SET last = n.last, last_at = n.last_at
    FROM unnest($17::text::uuid[], $18::text::bigint[], $19::text::timestamptz[]) AS n (user_id, last, last_at)
    WHERE c.user_id = n.user_id
)
UPDATE events.heads h
SET next_seq = n.next_seq, last_digest = decode(n.last_digest, 'hex'), last_first_seq = n.last_first_seq,
    last_cursor = n.last_cursor, last_at = n.last_at, ended = n.ended, terminal_type = n.terminal_type
FROM unnest($20::text::uuid[], $21::text::bigint[], $22::text::text[], $23::text::bigint[], $24::text::bigint[],
            $25::text::timestamptz[], $26::text::boolean[], $27::text::text[])
    AS n (run_id, next_seq, last_digest, last_first_seq, last_cursor, last_at, ended, terminal_type)
WHERE h.run_id = n.run_id
"""
_MARK = """
INSERT INTO events.days (user_id, day, retention, first_cursor) SELECT * FROM unnest($1::uuid[], $2::date[], $3::text[], $4::bigint[])
ON CONFLICT DO NOTHING
"""
_KNOWN_RUNS = 20_000
_KNOWN_USERS = 100_000
_KNOWN_MARKS = 100_000
_UUID7_MS = 12
# clocks of those who make ids differ from ours by less
_CLOCKS_DIFFER = timedelta(days=1)
Mark = tuple[str, date, str]


class Writer:
    """Writes the appends of many users in one transaction."""

    def __init__(self, database: postgres.DatabaseManager) -> None:
        self._database = database
        self._generation: object = None
        self._runs: dict[str, _Run] = {}
        self._with_cursor: set[str] = set()
        self._marked: set[Mark] = set()

    async def commit(self, appends: Sequence[log.Append], *, pass_over: bool = False) -> ledger.Ledger:
        """Judge and write appends, in order, under locks taken in one fixed order: cursors, then heads.

        When told to `pass_over`, it waits for no row that is held: appends that need one are refused with `Unavailable`.
        """
        if not pass_over:
            await self._make_cursors(appends)
        async with self._database.transaction() as transaction:
            book = await self._locked(transaction, appends, " SKIP LOCKED" if pass_over else "")
            await _load_earlier(transaction, book, appends)
            for append in appends:
                book.add(append)
            marks = {mark: cursor for mark, cursor in book.marks.items() if mark not in self._marked}
            if book.changed or book.moved:
                await transaction.execute(_WRITE, *_columns(book))
            if marks:
                await transaction.execute(_MARK, *_transposed([(*mark, cursor) for mark, cursor in marks.items()], 4))
        # not before: what was rolled back marked nothing
        self._remember(marks)
        return book

    async def _locked(self, transaction: postgres.Transaction, appends: Sequence[log.Append], held: str) -> ledger.Ledger:
        runs = await self._known(transaction, sorted({append.request.run_id for append in appends if append.context is None}))
        owners = (run.user_id for run in runs.values())
        users = sorted({*owners, *(append.context.user_id for append in appends if append.context is not None)})
        found = await transaction.fetch(_CURSORS + held, users)
        if found and found[0]["generation"] != self._generation:
            # another backup: nothing need be in it of what was seen before
            self._generation, self._with_cursor, self._marked = found[0]["generation"], set(), set()
            self._runs.clear()
        cursors = {str(row["user_id"]): ledger.Cursor(row["last"], row["last_at"]) for row in found}
        rows = await transaction.fetch(_HEADS + held, list(runs)) if runs else []
        # the time is asked for under the locks
        now: datetime = rows[0]["now"] if rows else await transaction.value("SELECT clock_timestamp()")
        # a run that was erased and opened again is not the one that was known
        if again := [row["run_id"] for row in rows if runs[row["run_id"]].opened_at != row["created_at"]]:
            runs |= await self._look_up(transaction, again)
        heads = {row["run_id"]: _head(runs[row["run_id"]], row) for row in rows}
        passed_over = frozenset(run_id for run_id, run in runs.items() if run_id not in heads or run.user_id not in cursors)
        return ledger.Ledger(heads, cursors, now, held=passed_over if held else frozenset())

    async def _known(self, transaction: postgres.Transaction, runs: list[str]) -> dict[str, _Run]:
        # what was seen of a run once needs no second look
        if len(self._runs) > _KNOWN_RUNS:
            self._runs.clear()
        if unknown := [run for run in runs if run not in self._runs]:
            await self._look_up(transaction, unknown)
        return {run: self._runs[run] for run in runs if run in self._runs}

    async def _look_up(self, transaction: postgres.Transaction, runs: list[str]) -> dict[str, _Run]:
        found = {row["run_id"]: _run(row) for row in await transaction.fetch(_RUNS, runs)}
        self._runs |= found
        return found

    async def _make_cursors(self, appends: Sequence[log.Append]) -> None:
        # in a transaction of its own: a new row is locked by who makes it, and not in the order of the others
        contexts = {append.context.user_id: append.context for append in appends if append.context is not None}
        if unknown := [(user, context.tenant_id) for user, context in contexts.items() if user not in self._with_cursor]:
            async with self._database.transaction() as transaction:
                await transaction.execute(_NEW_CURSORS, *_transposed(unknown, 2))
            if len(self._with_cursor) > _KNOWN_USERS:
                self._with_cursor.clear()
            self._with_cursor |= contexts.keys()

    def _remember(self, marks: Iterable[Mark]) -> None:
        if len(self._marked) > _KNOWN_MARKS:
            self._marked.clear()
        self._marked.update(marks)


@dataclass(frozen=True, slots=True)
class _Run:
    """What never changes of the head of a run."""

    run_id: str
    user_id: str
    thread_id: str
    shared: bytes
    retention: str
    opened_at: datetime


def _run(row: postgres.Row) -> _Run:
    shared = frames.envelope(
        user_id=row["user_id"], thread_id=row["thread_id"], run_id=row["run_id"], request_id=row["request_id"],
        correlation_id=row["correlation_id"], trace_id=row["trace_id"],
    )  # fmt: skip
    return _Run(row["run_id"], row["user_id"], row["thread_id"], shared, row["retention"], row["created_at"])


def _head(run: _Run, row: postgres.Row) -> ledger.Head:
    return ledger.Head(
        run.run_id, run.user_id, run.thread_id, run.shared, run.retention, run.opened_at, row["epoch"], row["next_seq"],
        row["last_digest"] or b"", row["last_first_seq"], row["last_cursor"], row["last_at"], row["ended"], row["terminal_type"],
    )  # fmt: skip


async def _load_earlier(transaction: postgres.Transaction, book: ledger.Ledger, appends: Sequence[log.Append]) -> None:
    """What appends may have written before; nothing for those that simply go on."""
    again = [append.request for append in ledger.overlapping(appends, book.heads)]
    if wanted := [(book.heads[r.run_id], r.first_seq, r.first_seq + len(r.events) - 1) for r in again if r.events]:
        heads = [head for head, _, _ in wanted]
        spans = _transposed([(head.user_id, head.run_id, first, last) for head, first, last in wanted], 4)
        between = (list({head.retention for head in heads}), min(head.opened_at for head in heads), max(head.last_at for head in heads))
        found = await transaction.fetch(_EARLIER, *spans, *between)
        book.earlier = {(str(row["of_run"]), row["at_seq"]): _earlier(row) for row in found}
    if runs := [request.run_id for request in again if request.steps]:
        steps = await transaction.fetch(_EARLIER_STEPS, runs)
        book.earlier_steps = {(str(row["of_run"]), row["at_key"]): row["digest"] for row in steps}
    if ids := [
        (append.context.user_id, event.event_id) for append in appends if append.context is not None for event in append.request.events
    ]:
        # an event is not older than its id
        made_at = min(_made_at(event_id) for _, event_id in ids)
        found = await transaction.fetch(_WITHOUT_RUN, *_transposed(ids, 2), min(made_at, book.now) - _CLOCKS_DIFFER)
        book.without_run = {(str(row["of_user"]), str(row["of_event"])): _earlier(row) for row in found}


def _earlier(row: postgres.Row) -> ledger.Earlier:
    return ledger.Earlier(row["at_cursor"], row["at_time"], row["digest"])


def _made_at(uuid7: str) -> datetime:
    milliseconds = int(uuid7.replace("-", "")[:_UUID7_MS], 16)
    return datetime.fromtimestamp(min(milliseconds // 1000, 2**35), UTC)


def _columns(book: ledger.Ledger) -> list[object]:
    rows, steps, heads = book.events, book.steps, book.changed.values()
    events = [row.event for row in rows]
    return [
        _text(row.retention for row in rows), _times(row.at for row in rows), _plain(e.user_id for e in events),
        _plain(e.cursor for e in events), _plain(e.run_id or "NULL" for e in events), _plain(e.seq for e in events),
        _plain(e.thread_id for e in events), _plain(row.event_id for row in rows), _text(e.kind for e in events),
        _text(row.tool_call_id for row in rows), _plain(e.ends for e in events), [e.frame for e in events],
        _plain(s.run_id for s in steps), _plain(s.user_id for s in steps), _text(s.key for s in steps), [s.result for s in steps],
        _plain(book.moved), _plain(c.last for c in book.moved.values()), _times(c.last_at for c in book.moved.values()),
        _plain(h.run_id for h in heads), _plain(h.next_seq for h in heads), _plain(h.last_digest.hex() for h in heads),
        _plain(h.last_first_seq for h in heads), _plain(h.last_cursor for h in heads), _times(h.last_at for h in heads),
        _plain(h.ended for h in heads), _text(h.terminal_type for h in heads),
    ]  # fmt: skip


def _plain(values: Iterable[object]) -> str:
    """An array of what is never quoted: ids, numbers, truth."""
    return "{" + ",".join(map(str, values)) + "}"


def _times(values: Iterable[datetime]) -> str:
    # most are the same: the time is that of the transaction
    known: dict[datetime, str] = {}
    return _plain(known.get(at) or known.setdefault(at, at.isoformat()) for at in values)


def _text(values: Iterable[str]) -> str:
    return _plain('"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"' for value in values)


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
