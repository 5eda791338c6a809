"""SQL that takes away: of one user under row-level security, and of whole days across users."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date, datetime, timedelta

from chassis import postgres
from netra import errors
from services.events import days, erasure, frames

_ERASURE = "SELECT user_id, request_id, upto, events, runs, done_at IS NOT NULL AS done, thread_id FROM events.erasures"
_ONE_ERASURE = f"{_ERASURE} WHERE user_id = $1 AND request_id = $2"
# whoever has said nothing for a day, nor a day after the deadline, says nothing any more, whatever became of the run; one that waits does
# not have to, and needs its steps when it goes on
_OVER = "(ended OR greatest(last_at, deadline, waits_until) < now() - interval '1 day')"
_LIVE = f"SELECT run_id FROM events.heads WHERE user_id = $1 AND NOT {_OVER} ORDER BY created_at LIMIT 5"
_LIVE_OF_THREAD = f"SELECT run_id FROM events.heads WHERE user_id = $1 AND thread_id = $2 AND NOT {_OVER} ORDER BY created_at LIMIT 5"
_STEPS_OF_USER = f"""
DELETE FROM events.steps WHERE user_id = $1 AND run_id IN (SELECT run_id FROM events.heads WHERE user_id = $1 AND {_OVER})
"""
# it stays known that the run has ended, and how: who takes it over must not run it again
_ERASE_HEADS = f"""
UPDATE events.heads
SET erased = true, ended = true, terminal_type = CASE WHEN ended THEN terminal_type ELSE 'agent_failed' END, thread_id = $2,
    request_id = '', correlation_id = '', trace_id = '', deadline = NULL, waits_until = NULL, next_seq = 1, last_digest = NULL,
    last_first_seq = 0, last_cursor = 0
WHERE user_id = $1 AND NOT erased AND {_OVER}
"""
_STEPS_OF_THREAD = f"""
DELETE FROM events.steps
WHERE user_id = $1 AND run_id IN (SELECT run_id FROM events.heads WHERE user_id = $1 AND thread_id = $2 AND {_OVER})
"""
# without its steps no run can go on
_END_HEADS = f"""
UPDATE events.heads SET ended = true, terminal_type = 'agent_failed' WHERE user_id = $1 AND thread_id = $2 AND NOT ended AND {_OVER}
"""
_NOTE = """
INSERT INTO events.erasures (user_id, request_id, asked_by, asked_at, upto, runs, thread_id)
VALUES ($1, $2, $3, clock_timestamp(), $4, $5, NULLIF($6, '')::uuid)
"""
_RUNS_OF_THREAD = "SELECT run_id FROM events.heads WHERE user_id = $1 AND thread_id = $2 AND NOT erased"
# found by day like all of a user, for a run can lose its head before its events; what was emptied before stays as it is, so that it is
# counted once
_BLANK = """
UPDATE events.events
SET frame = substring(frame FROM 1 FOR position($8::bytea IN substring(frame FROM 1 FOR 2048)) - 1) || $9::bytea
WHERE user_id = $1 AND retention = $2 AND recorded_at >= $3 AND recorded_at < $4 AND cursor IN (
    SELECT cursor FROM events.events
    WHERE user_id = $1 AND retention = $2 AND recorded_at >= $3 AND recorded_at < $4 AND cursor <= $5 AND thread_id = $6 AND cursor > $7
      AND substring(frame FROM octet_length(frame) - octet_length($9::bytea) + 1) <> $9::bytea
    ORDER BY cursor LIMIT $10)
RETURNING cursor
"""
# one at a time takes away from a user: what two have deleted is gone for both only once it is committed
_PATIENT = "SELECT set_config('lock_timeout', '5s', true)"
_ALONE = "SELECT request_id FROM events.erasures WHERE user_id = $1 ORDER BY request_id FOR UPDATE"
_ERASE = """
DELETE FROM events.events WHERE user_id = $1 AND retention = $2 AND recorded_at >= $3 AND recorded_at < $4 AND cursor IN (
    SELECT cursor FROM events.events WHERE user_id = $1 AND retention = $2 AND recorded_at >= $3 AND recorded_at < $4 AND cursor <= $5
    ORDER BY cursor LIMIT $6)
"""
_LEFT = """
SELECT EXISTS (
    SELECT FROM events.events WHERE user_id = $1 AND retention = $2 AND recorded_at >= $3 AND recorded_at < $4 AND cursor <= $5)
"""
# a day that had not ended when the erasure began stays marked: what comes after is found by it
_FORGET = """
DELETE FROM events.days WHERE user_id = $1 AND retention = $2 AND day = $3
  AND day < (SELECT (asked_at AT TIME ZONE 'UTC')::date FROM events.erasures WHERE user_id = $1 AND request_id = $4)
"""
_COUNT = "UPDATE events.erasures SET events = events + $3 WHERE user_id = $1 AND request_id = $2"
_DONE = "UPDATE events.erasures SET done_at = coalesce(done_at, clock_timestamp()) WHERE user_id = $1 AND request_id = $2"
_UNFINISHED = f"{_ERASURE} WHERE done_at IS NULL AND asked_at < $1 ORDER BY asked_at LIMIT 100"

_KNOWN_PERIOD = "SELECT days, wanted, since FROM events.classes WHERE retention = $1 FOR UPDATE"
_PERIOD = """
INSERT INTO events.classes (retention, days, wanted, since) VALUES ($1, $2, $3, $4)
ON CONFLICT (retention) DO UPDATE SET days = excluded.days, wanted = excluded.wanted, since = excluded.since
"""
_IN_USE = "SELECT EXISTS (SELECT 1 FROM events.days WHERE retention = $1 AND day >= $2)"
_MARKED_BEFORE = """
SELECT DISTINCT day FROM events.days WHERE retention = $1 AND day < $2 AND NOT events.must_stay(user_id, retention, day, $3)
"""
_PARTITIONS = """
SELECT to_date(right(c.relname, 8), 'YYYYMMDD') AS day FROM pg_catalog.pg_inherits i JOIN pg_catalog.pg_class c ON c.oid = i.inhrelid
WHERE i.inhparent = to_regclass('events.events_' || $1) AND c.relname ~ '_[0-9]{8}$'
"""
_USERS_OF_DAY = """
SELECT user_id FROM events.days WHERE retention = $1 AND day = $2 AND user_id > $3 AND NOT events.must_stay(user_id, $1, $2, $5)
ORDER BY user_id LIMIT $4
"""
_LOCK_CURSORS = "SELECT user_id FROM events.cursors WHERE user_id = ANY($1::uuid[]) ORDER BY user_id FOR UPDATE"
_RAISE = """
UPDATE events.cursors c SET oldest = greatest(c.oldest, 1 + (
    SELECT max(e.cursor) FROM events.events e
    WHERE e.user_id = c.user_id AND e.retention = $2 AND e.recorded_at >= $3 AND e.recorded_at < $4))
WHERE c.user_id = ANY($1::uuid[])
"""
_OLD_HEADS = f"""
DELETE FROM events.heads WHERE run_id IN (
    SELECT run_id FROM events.heads WHERE retention = $1 AND created_at < $2 AND last_at < $2 AND {_OVER} LIMIT $3)
"""
_OLD_STEPS = f"""
DELETE FROM events.steps WHERE run_id IN (
    SELECT run_id FROM (SELECT DISTINCT run_id FROM events.steps) s
    WHERE NOT EXISTS (SELECT FROM events.heads h WHERE h.run_id = s.run_id AND NOT ({_OVER} AND h.last_at < $1)) LIMIT $2)
"""
_NOBODY = "00000000-0000-0000-0000-000000000000"


class Erasures:
    """Takes away one user's record, behind the wall of that user."""

    def __init__(self, database: postgres.DatabaseManager) -> None:
        self._database = database

    async def begin_erasure(self, user_id: str, request_id: str, asked_by: str, thread_id: str = "") -> erasure.Erasure:
        """Hide everything there is, forget of runs all but that they ended, and note that the rest is to go. With a thread, forget the
        steps of its runs, and note that what is in their events is to go.

        Raises `FailedPrecondition`, `AlreadyExists`.
        """
        async with self._database.transaction(user_id) as transaction:
            await transaction.execute("INSERT INTO events.cursors (user_id) VALUES ($1) ON CONFLICT DO NOTHING", user_id)
            last = await transaction.value("SELECT last FROM events.cursors WHERE user_id = $1 FOR UPDATE", user_id)
            if (known := await transaction.row(_ONE_ERASURE, user_id, request_id)) is not None:
                return _same(_erasure(known), thread_id)
            live = await transaction.fetch(*((_LIVE_OF_THREAD, user_id, thread_id) if thread_id else (_LIVE, user_id)))
            if live:
                runs = ", ".join(str(row["run_id"]) for row in live)
                raise errors.FailedPrecondition(f"These runs have not ended: {runs}. Cancel them, or wait for them.", runs=runs)
            hidden = await (_forget_steps(transaction, user_id, thread_id) if thread_id else _hide(transaction, user_id))
            await transaction.execute(_NOTE, user_id, request_id, asked_by, last, hidden, thread_id)
        return erasure.Erasure(user_id, request_id, last, 0, hidden, done=False, thread_id=thread_id)

    async def days(self, user_id: str, upto: int) -> Sequence[tuple[date, str]]:
        """The days and classes in which the user has events up to a cursor."""
        query = "SELECT day, retention FROM events.days WHERE user_id = $1 AND first_cursor <= $2 ORDER BY first_cursor"
        async with self._database.transaction(user_id) as transaction:
            return [(row["day"], row["retention"]) for row in await transaction.fetch(query, user_id, upto)]

    async def erase(self, wanted: erasure.Erasure, day: date, retention: str, many: int) -> tuple[int, bool]:
        """Delete some events of a day and class; how many, and whether any is left. The day itself is forgotten with its last."""
        events = (*_span(wanted, day, retention), wanted.upto)

        async def work(transaction: postgres.Transaction) -> tuple[int, bool]:
            await _alone(transaction, wanted.user_id)
            gone = _count(await transaction.execute(_ERASE, *events, many))
            await transaction.execute(_COUNT, wanted.user_id, wanted.request_id, gone)
            left = bool(await transaction.value(_LEFT, *events))
            if not left:
                await transaction.execute(_FORGET, wanted.user_id, retention, day, wanted.request_id)
            return gone, left

        return await self._database.retried(wanted.user_id, work)

    async def blank(self, wanted: erasure.Erasure, day: date, retention: str, after: int, many: int) -> tuple[int, int]:
        """Take away what is in some events of the thread, of a day and class, after a cursor; how many, and up to which cursor."""
        events = (*_span(wanted, day, retention), wanted.upto, wanted.thread_id, after)

        async def work(transaction: postgres.Transaction) -> tuple[int, int]:
            await _alone(transaction, wanted.user_id)
            rows = await transaction.fetch(_BLANK, *events, frames.DATA, frames.ERASED, many)
            await transaction.execute(_COUNT, wanted.user_id, wanted.request_id, len(rows))
            return len(rows), max((row["cursor"] for row in rows), default=after)

        return await self._database.retried(wanted.user_id, work)

    async def end_erasure(self, wanted: erasure.Erasure) -> erasure.Erasure:
        """Note that nothing is left."""
        async with self._database.transaction(wanted.user_id) as transaction:
            await transaction.execute(_DONE, wanted.user_id, wanted.request_id)
            row = await transaction.row(_ONE_ERASURE, wanted.user_id, wanted.request_id)
        return wanted if row is None else _erasure(row)


class Retention:
    """Takes away what is too old, of all users."""

    def __init__(self, database: postgres.DatabaseManager) -> None:
        self._database = database

    async def period(self, retention: str, wanted: int, now: datetime, grace: timedelta) -> days.Period:
        """How long a class is kept from now on, given what its policy wants."""
        async with self._database.transaction() as transaction:
            row = await transaction.row(_KNOWN_PERIOD, retention)
            known = days.Period(row["days"], row["wanted"], row["since"]) if row is not None else None
            period = days.kept(known, wanted, now, grace)
            if period != known:
                await transaction.execute(_PERIOD, retention, period.days, period.wanted, period.since)
        return period

    async def in_use(self, retention: str, since: date) -> bool:
        """Whether anything of the class was recorded lately."""
        async with self._database.transaction() as transaction:
            return bool(await transaction.value(_IN_USE, retention, since))

    async def prepare(self, retention: str, day: date) -> bool:
        """Make the partition of a day to come; False when it is there. Raises `Locked`, and `Unfit` when the day has events already."""
        try:
            while (done := await self._step(retention, day)) == "again":
                pass
        except Exception:
            await self.reopen(retention)
            raise
        return done == "made"

    async def _step(self, retention: str, day: date) -> str:
        async with self._database.transaction() as transaction:
            return str(await transaction.value("SELECT events.prepare_day($1, $2)", retention, day))

    async def reopen(self, retention: str) -> None:
        """Let events be recorded of days whose preparation was interrupted. Raises `Locked`."""
        async with self._database.transaction() as transaction:
            await transaction.execute("SELECT events.reopen_days($1)", retention)

    async def days_before(self, retention: str, oldest: date, today: date) -> Sequence[date]:
        """The days of a class before one that are to go, with events or only with a partition."""
        async with self._database.transaction() as transaction:
            marked = {row["day"] for row in await transaction.fetch(_MARKED_BEFORE, retention, oldest, today)}
            made = {row["day"] for row in await transaction.fetch(_PARTITIONS, retention)}
        return sorted(marked | {day for day in made if day < oldest})

    async def raise_oldest(self, retention: str, day: date, today: date, after: str, many: int) -> str:
        """Send the readers of some users, in the order of their ids, past a day; the last of them, empty when there are no more."""
        between = (days.begin_of(day), days.begin_of(day + days.A_DAY))
        async with self._database.transaction() as transaction:
            rows = await transaction.fetch(_USERS_OF_DAY, retention, day, after or _NOBODY, many, today)
            users = [str(row["user_id"]) for row in rows]
            if users:
                await transaction.execute(_LOCK_CURSORS, users)
                await transaction.execute(_RAISE, users, retention, *between)
        return users[-1] if users else ""

    async def drop(self, retention: str, day: date, today: date, many: int) -> bool:
        """Drop a day of a class, or of a day without a partition some events; whether it is gone. Raises `Locked`."""
        async with self._database.transaction() as transaction:
            return bool(await transaction.value("SELECT events.drop_day($1, $2, $3, $4)", retention, day, today, many))

    async def drop_heads(self, retention: str, before: datetime, many: int) -> int:
        """Delete some heads of runs that ended before; how many."""
        async with self._database.transaction() as transaction:
            return _count(await transaction.execute(_OLD_HEADS, retention, before, many))

    async def drop_steps(self, before: datetime, many: int) -> int:
        """Delete the steps of some runs that ended before; how many steps."""
        async with self._database.transaction() as transaction:
            return _count(await transaction.execute(_OLD_STEPS, before, many))

    async def unfinished(self, before: datetime) -> Sequence[erasure.Erasure]:
        """Erasures that were begun before and have not ended."""
        async with self._database.transaction() as transaction:
            return [_erasure(row) for row in await transaction.fetch(_UNFINISHED, before)]


async def _hide(transaction: postgres.Transaction, user_id: str) -> int:
    await transaction.execute(_STEPS_OF_USER, user_id)
    erased = _count(await transaction.execute(_ERASE_HEADS, user_id, _NOBODY))
    await transaction.execute("UPDATE events.cursors SET oldest = last + 1 WHERE user_id = $1", user_id)
    return erased


async def _forget_steps(transaction: postgres.Transaction, user_id: str, thread_id: str) -> int:
    await transaction.execute(_END_HEADS, user_id, thread_id)
    await transaction.execute(_STEPS_OF_THREAD, user_id, thread_id)
    return len(await transaction.fetch(_RUNS_OF_THREAD, user_id, thread_id))


def _erasure(row: postgres.Row) -> erasure.Erasure:
    thread_id = "" if row["thread_id"] is None else str(row["thread_id"])
    return erasure.Erasure(str(row["user_id"]), row["request_id"], row["upto"], row["events"], row["runs"], row["done"], thread_id)


async def _alone(transaction: postgres.Transaction, user_id: str) -> None:
    # before any event is held: those who take them in another order would wait for each other
    await transaction.execute(_PATIENT)
    await transaction.execute(_ALONE, user_id)


def _span(wanted: erasure.Erasure, day: date, retention: str) -> tuple[object, ...]:
    return wanted.user_id, retention, days.begin_of(day), days.begin_of(day + days.A_DAY)


def _same(known: erasure.Erasure, thread_id: str) -> erasure.Erasure:
    if known.thread_id != thread_id:
        raise errors.AlreadyExists("Another erasure has this request id.", field="request_id")
    return known


def _count(tag: str) -> int:
    """The number of rows in a command tag."""
    return int(tag.rpartition(" ")[2])
