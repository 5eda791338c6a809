"""SQL that crosses users: the batching writer and the comparison of cursors."""

from __future__ import annotations

import asyncio
import functools
import re
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from chassis import postgres, telemetry
from netra import errors
from services.events import heads, ledger, log, memory

_wrong = telemetry.meter.create_counter("netra.events.commit.wrong", description="Group commits of rows that others had changed meanwhile.")
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
_ADVANCED = """
{name} AS (
    UPDATE events.heads h
    SET next_seq = n.next_seq, last_digest = decode(n.last_digest, 'hex'), last_first_seq = n.last_first_seq,
        last_cursor = n.last_cursor, last_at = n.last_at, ended = n.ended, terminal_type = n.terminal_type{sets}
    FROM unnest($1::text::uuid[], $2::text::bigint[], $3::text::text[], $4::text::bigint[], $5::text::bigint[],
                $6::text::timestamptz[], $7::text::boolean[], $8::text::text[]{array})
        AS n (run_id, next_seq, last_digest, last_first_seq, last_cursor, last_at, ended, terminal_type{column})
    WHERE h.run_id = n.run_id AND {{only_if}}
)"""
# a run that somebody else has opened by now is a conflict, and nothing is written
_OPENED = """
{name} AS (
    INSERT INTO events.heads
        (run_id, user_id, thread_id, request_id, correlation_id, trace_id, retention, deadline, created_at, epoch, next_seq, last_digest,
         last_first_seq, last_cursor, last_at, ended, terminal_type{column})
    SELECT run_id, user_id, thread_id, request_id, correlation_id, trace_id, retention, to_timestamp(deadline), created_at, epoch, next_seq,
           decode(last_digest, 'hex'), last_first_seq, last_cursor, last_at, ended, terminal_type{column}
    FROM unnest($1::text::uuid[], $2::text::uuid[], $3::text::uuid[], $4::text::text[], $5::text::text[], $6::text::text[],
                $7::text::text[], $8::text::float8[], $9::text::timestamptz[], $10::text::bigint[], $11::text::bigint[],
                $12::text::text[], $13::text::bigint[], $14::text::bigint[], $15::text::timestamptz[], $16::text::boolean[],
                $17::text::text[]{array})
        AS n (run_id, user_id, thread_id, request_id, correlation_id, trace_id, retention, deadline, created_at, epoch, next_seq,
              last_digest, last_first_seq, last_cursor, last_at, ended, terminal_type{column})
    WHERE {{only_if}}
)"""
# What one statement has of each kind of row, each part with its own numbers. Arrays as text: the server reads them several times faster
# than the driver packs them, element by element.
_PARTS = {
    # every row as it was seen, or nothing is written: the locks are taken in the one order, and heads are not looked for before the
    # cursors are held and found the same; the time is asked for under the locks
    "same": """
cursor_rows AS MATERIALIZED (
    SELECT last, last_at FROM events.cursors WHERE user_id = ANY($3::text::uuid[]) ORDER BY user_id FOR UPDATE
), same_cursors AS MATERIALIZED (
    SELECT array_agg(last) = $4::text::bigint[] AND array_agg(last_at) = $5::text::timestamptz[] AS yes FROM cursor_rows
), head_rows AS MATERIALIZED (
    SELECT epoch, next_seq, last_cursor, last_at, coalesce(last_digest, '') AS last_digest, ended FROM events.heads
    WHERE run_id = ANY($6::text::uuid[]) AND (SELECT yes FROM same_cursors) ORDER BY run_id FOR UPDATE
), same AS MATERIALIZED (
    SELECT (SELECT yes FROM same_cursors) AND coalesce(array_agg(epoch), '{{}}') = $7::text::bigint[]
       AND coalesce(array_agg(next_seq), '{{}}') = $8::text::bigint[] AND coalesce(array_agg(last_cursor), '{{}}') = $9::text::bigint[]
       AND coalesce(array_agg(last_at), '{{}}') = $10::text::timestamptz[] AND coalesce(array_agg(last_digest), '{{}}') = $11::bytea[]
       AND NOT coalesce(bool_or(ended), false) AND $1::uuid = (SELECT id FROM events.generation)
       AND clock_timestamp() - $2::timestamptz BETWEEN interval '-1 second' AND interval '1 second'
       AND (clock_timestamp() AT TIME ZONE 'UTC')::date = ($2 AT TIME ZONE 'UTC')::date AS yes
    FROM head_rows
)""",
    "written": """
written AS (
    INSERT INTO events.events
        (retention, recorded_at, user_id, cursor, run_id, seq, thread_id, event_id, type, tool_call_id, ends, frame)
    SELECT * FROM unnest($1::text::text[], $2::text::timestamptz[], $3::text::uuid[], $4::text::bigint[], $5::text::uuid[],
                         $6::text::bigint[], $7::text::uuid[], $8::text::uuid[], $9::text::text[], $10::text::text[],
                         $11::text::boolean[], $12::bytea[]) WHERE {only_if}
)""",
    "journaled": """
journaled AS (
    INSERT INTO events.steps (run_id, user_id, key, result)
    SELECT * FROM unnest($1::text::uuid[], $2::text::uuid[], $3::text::text[], $4::bytea[]) WHERE {only_if}
)""",
    "counted": """
counted AS (
    UPDATE events.cursors c SET last = n.last, last_at = n.last_at
    FROM unnest($1::text::uuid[], $2::text::bigint[], $3::text::timestamptz[]) AS n (user_id, last, last_at)
    WHERE c.user_id = n.user_id AND {only_if}
)""",
    "advanced": _ADVANCED.format(name="advanced", sets="", array="", column=""),
    "opened": _OPENED.format(name="opened", array="", column=""),
    # the same of runs that are put away: few are, so the others do not carry the column
    "put_away": _ADVANCED.format(
        name="put_away", sets=", waits_until = n.waits_until", array=", $9::text::timestamptz[]", column=", waits_until"
    ),
    "opened_away": _OPENED.format(name="opened_away", array=", $18::text::timestamptz[]", column=", waits_until"),
    "marked": """
marked AS (
    INSERT INTO events.days (user_id, day, retention, first_cursor)
    SELECT * FROM unnest($1::text::uuid[], $2::text::date[], $3::text::text[], $4::text::bigint[]) WHERE {only_if} ON CONFLICT DO NOTHING
)""",
}
_Parts = dict[str, Sequence[object]]
_UUID7_MS = 12
# clocks of those who make ids differ from ours by less
_CLOCKS_DIFFER = timedelta(days=1)


Open = Callable[[heads.NewHead, int], Awaitable[object]]


async def _cannot_open(_head: heads.NewHead, _epoch: int) -> None:
    raise errors.FailedPrecondition("Runs are opened elsewhere.")


class Writer:
    """Writes the appends of many users in one transaction. What it saw of their rows it leaves to the `memory`.

    `opens` opens a run for its owner at this epoch, as by itself: where that cannot be done together with its first append.
    """

    def __init__(self, database: postgres.DatabaseManager, known: memory.Memory | None = None, opens: Open = _cannot_open) -> None:
        self._database = database
        self._memory = known or memory.Memory()
        self._opens = opens

    async def commit(self, appends: Sequence[log.Append], *, pass_over: bool = False) -> ledger.Ledger:
        """Judge and write appends, in order, under locks taken in one fixed order: cursors, then heads.

        When told to `pass_over`, it waits for no row that is held: appends that need one are refused with `Unavailable`.
        """
        opening = [append for append in appends if append.opens is not None]
        if pass_over:
            return await self._looked_up(appends, " SKIP LOCKED", await self._opened(opening))
        # once the user is known here, the next run is opened together with its first append
        cold = self._memory.cold(opening)
        unopened = await self._opened(cold)
        if not unopened and (guess := self._memory.guess(appends)) is not None and await self._as_guessed(*guess):
            return guess[0]
        done = {append.request.run_id for append in cold}
        unopened |= await self._opened([append for append in opening if append.request.run_id not in done])
        await self._make_cursors(appends)
        return await self._looked_up(appends, "", unopened)

    async def _opened(self, appends: Sequence[log.Append]) -> dict[str, errors.NetraError]:
        """Open the runs of these; what stands against it, by run."""
        found = await asyncio.gather(
            *(self._opens(append.opens, append.request.epoch) for append in appends if append.opens is not None), return_exceptions=True
        )
        unopened: dict[str, errors.NetraError] = {}
        for append, answer in zip(appends, found, strict=True):
            if isinstance(answer, errors.NetraError):
                unopened[append.request.run_id] = answer
            elif isinstance(answer, BaseException):
                raise answer
        return unopened

    async def _as_guessed(self, book: ledger.Ledger, seen: memory.Seen) -> bool:
        """Write what rests on rows that were seen, if they are the same still: in one statement, which is a transaction."""
        query, values = _statement({"same": _as_seen(book, seen), **_rows(book, self._memory.unmarked(book))})
        asked = time.monotonic()
        try:
            # done twice it finds that the rows are not the same any more
            (row,) = await self._database.alone(query, *values)
        except postgres.Conflict:
            # steps that are there already: who looks them up says whose they are
            return False
        if not row["yes"]:
            _wrong.add(1)
            self._memory.wrong()
            return False
        self._memory.right(row["now"], asked)
        self._memory.written(book)
        return True

    async def _looked_up(self, appends: Sequence[log.Append], held: str, unopened: Mapping[str, errors.NetraError]) -> ledger.Ledger:
        async with self._database.transaction() as transaction:
            book = await self._locked(transaction, appends, held)
            book.unopened = unopened
            await _load_earlier(transaction, book, appends)
            for append in appends:
                book.add(append)
            if rows := _rows(book, self._memory.unmarked(book)):
                query, values = _statement(rows)
                await transaction.execute(query, *values)
        # not before: what was rolled back wrote nothing
        self._memory.written(book)
        return book

    async def _locked(self, transaction: postgres.Transaction, appends: Sequence[log.Append], held: str) -> ledger.Ledger:
        runs = await self._known(transaction, sorted({append.request.run_id for append in appends if append.context is None}))
        owners = (run.user_id for run in runs.values())
        users = sorted({*owners, *(append.context.user_id for append in appends if append.context is not None)})
        found = await transaction.fetch(_CURSORS + held, users)
        cursors = {str(row["user_id"]): ledger.Cursor(row["last"], row["last_at"]) for row in found}
        asked = time.monotonic()
        rows = await transaction.fetch(_HEADS + held, list(runs)) if runs else []
        # the time is asked for under the locks
        now: datetime = rows[0]["now"] if rows else await transaction.value("SELECT clock_timestamp()")
        if found:
            self._memory.of(found[0]["generation"], now, asked)
        # a run that was erased and opened again is not the one that was known
        if again := [row["run_id"] for row in rows if runs[row["run_id"]].opened_at != row["created_at"]]:
            runs |= await self._look_up(transaction, again)
        heads = {row["run_id"]: runs[row["run_id"]].head(row) for row in rows}
        passed_over = frozenset(run_id for run_id, run in runs.items() if run_id not in heads or run.user_id not in cursors)
        return ledger.Ledger(heads, cursors, now, held=passed_over if held else frozenset())

    async def _known(self, transaction: postgres.Transaction, runs: list[str]) -> dict[str, memory.Run]:
        # what was seen of a run once needs no second look
        known = self._memory.known(runs)
        if unknown := [run for run in runs if run not in known]:
            known |= await self._look_up(transaction, unknown)
        return {run: known[run] for run in runs if run in known}

    async def _look_up(self, transaction: postgres.Transaction, runs: list[str]) -> dict[str, memory.Run]:
        found = {row["run_id"]: memory.Run.of(row) for row in await transaction.fetch(_RUNS, runs)}
        self._memory.looked_up(found)
        return found

    async def _make_cursors(self, appends: Sequence[log.Append]) -> None:
        # in a transaction of its own: a new row is locked by who makes it, and not in the order of the others
        contexts = {append.context.user_id: append.context for append in appends if append.context is not None}
        if unknown := [(user, context.tenant_id) for user, context in contexts.items() if not self._memory.has_cursor(user)]:
            async with self._database.transaction() as transaction:
                await transaction.execute(_NEW_CURSORS, *_transposed(unknown, 2))
            self._memory.have_cursor(contexts)


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


def _rows(book: ledger.Ledger, marks: Mapping[ledger.Mark, int]) -> _Parts:
    """The columns of what is to be written, by kind; of what there is nothing of, nothing."""
    rows, steps, moved = book.events, book.steps, book.moved
    going = [head for run_id, head in book.changed.items() if run_id not in book.new]
    new = [(head, book.changed[run_id]) for run_id, head in book.new.items()]
    events = [row.event for row in rows]
    parts: _Parts = {}
    if rows:
        parts["written"] = (
            _text(row.retention for row in rows), _times(row.at for row in rows), _plain(e.user_id for e in events),
            _plain(e.cursor for e in events), _plain(e.run_id or "NULL" for e in events), _plain(e.seq for e in events),
            _plain(e.thread_id for e in events), _plain(row.event_id for row in rows), _text(e.kind for e in events),
            _text(row.tool_call_id for row in rows), _plain(e.ends for e in events), [e.frame for e in events],
        )  # fmt: skip
    if steps:
        parts["journaled"] = (
            _plain(s.run_id for s in steps), _plain(s.user_id for s in steps), _text(s.key for s in steps), [s.result for s in steps]
        )  # fmt: skip
    if moved:
        parts["counted"] = (_plain(moved), _plain(c.last for c in moved.values()), _times(c.last_at for c in moved.values()))
    if advanced := [head for head in going if head.run_id not in book.waits]:
        parts["advanced"] = _advanced(advanced)
    if opened := [(made, head) for made, head in new if made.run_id not in book.waits]:
        parts["opened"] = _opened(opened)
    if away := [head for head in going if head.run_id in book.waits]:
        parts["put_away"] = (*_advanced(away), _times(book.waits[head.run_id] for head in away))
    if both := [(made, head) for made, head in new if made.run_id in book.waits]:
        parts["opened_away"] = (*_opened(both), _times(book.waits[made.run_id] for made, _ in both))
    if marks:
        users, days, classes = _transposed(list(marks), 3)
        parts["marked"] = (_plain(users), _plain(days), _text(map(str, classes)), _plain(marks.values()))
    return parts


def _advanced(of: Sequence[ledger.Head]) -> Sequence[object]:
    return (_plain(head.run_id for head in of), *_standing(of))


def _opened(new: Sequence[tuple[heads.NewHead, ledger.Head]]) -> Sequence[object]:
    made = [head for head, _ in new]
    return (
        _plain(m.run_id for m in made), _plain(m.user_id for m in made), _plain(m.thread_id for m in made),
        _text(m.request_id for m in made), _text(m.correlation_id for m in made), _text(m.trace_id for m in made),
        _text(m.retention for m in made), _plain("NULL" if m.deadline is None else m.deadline for m in made),
        _times(h.opened_at for _, h in new), _plain(h.epoch for _, h in new), *_standing([h for _, h in new]),
    )  # fmt: skip


def _standing(of: Sequence[ledger.Head]) -> Sequence[object]:
    """Where records of runs stand, by column."""
    return (
        _plain(h.next_seq for h in of), _plain(h.last_digest.hex() for h in of), _plain(h.last_first_seq for h in of),
        _plain(h.last_cursor for h in of), _times(h.last_at for h in of), _plain(h.ended for h in of), _text(h.terminal_type for h in of),
    )  # fmt: skip


def _as_seen(book: ledger.Ledger, seen: memory.Seen) -> Sequence[object]:
    users, lasts, last_ats = zip(*seen.cursors, strict=True)
    runs, epochs, next_seqs, last_cursors, moved_ats, digests = _transposed(seen.heads, 6)
    return (
        seen.generation, book.now, _plain(users), _plain(lasts), _times(last_ats), _plain(runs), _plain(epochs), _plain(next_seqs),
        _plain(last_cursors), _times(moved_ats), digests,
    )  # fmt: skip


def _statement(parts: _Parts) -> tuple[str, list[object]]:
    """One statement that does all of it, and its values."""
    return _text_of(tuple((part, len(values)) for part, values in parts.items())), [value for values in parts.values() for value in values]


@functools.cache
def _text_of(parts: tuple[tuple[str, int], ...]) -> str:
    # few come together in few ways: each is prepared once per connection
    guessed = parts[0][0] == "same"
    only_if, texts, before = "(SELECT yes FROM same)" if guessed else "true", [], 0
    for part, many in parts:
        numbered = re.sub(r"\$(\d+)", lambda found, before=before: f"${int(found[1]) + before}", _PARTS[part])  # type: ignore[misc]
        texts.append(numbered.format(only_if=only_if))
        before += many
    return f"WITH {','.join(texts)} SELECT {'yes, clock_timestamp() AS now FROM same' if guessed else 'true'}"


def _plain(values: Iterable[object]) -> str:
    """An array of what is never quoted: ids, numbers, truth."""
    return "{" + ",".join(map(str, values)) + "}"


def _times(values: Iterable[datetime]) -> str:
    # most are the same: the time is that of the transaction
    known: dict[datetime, str] = {}
    return _plain(known.get(at) or known.setdefault(at, at.isoformat()) for at in values)


def _text(values: Iterable[str]) -> str:
    return _plain('"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"' for value in values)


def _transposed(rows: Sequence[Sequence[Any]], width: int) -> list[Sequence[Any]]:
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
