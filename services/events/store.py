"""SQL for one user's record: opens runs and reads, under row-level security."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from chassis import log as log_
from chassis import postgres
from netra import errors
from services.events import days, heads, ledger, log, memory, paging

_log = log_.get(__name__)
# what is stopped in the middle of a transaction holds up nobody for long; a plan that fits any day would look into every day
OPTIONS = {"idle_in_transaction_session_timeout": "2s", "lock_timeout": "500ms", "plan_cache_mode": "force_custom_plan"}
_NEVER = datetime(1970, 1, 1, tzinfo=UTC)

# how far the record reaches, and the first days and classes that hold something after a cursor: in the order of cursors, as time is
_POSITION = f"""
SELECT c.last, c.oldest, d.day, d.retention, d.first_cursor FROM events.cursors c LEFT JOIN LATERAL (
    SELECT day, retention, first_cursor FROM events.days
    WHERE user_id = $1 AND first_cursor <= greatest($2, c.oldest - 1) + $3 AND day >= (
        SELECT max(day) FROM events.days WHERE user_id = $1 AND first_cursor <= greatest($2, c.oldest - 1) + 1)
    ORDER BY first_cursor LIMIT {days.MAX_ROWS}
) d ON true WHERE c.user_id = $1 ORDER BY d.first_cursor
"""
_SPAN_OF_RUN = "SELECT retention, created_at, last_at FROM events.heads WHERE run_id = $2 AND user_id = $1"
_COLUMNS = "cursor, run_id, seq, thread_id, type, ends, frame"
_AFTER = "user_id = $1 AND cursor > $2 AND cursor <= $3"
_PAGE_OF_ALL, _PAGE_OF_RUN, _PAGE_ANYWHERE = (
    paging.page(_COLUMNS, "cursor", _AFTER + narrowed, limit="$4", max_bytes="$5")
    for narrowed in (
        " AND retention = ANY($6::text[]) AND recorded_at >= $7 AND recorded_at < $8",
        " AND run_id = $6 AND retention = $7 AND recorded_at >= $8 AND recorded_at <= $9",
        "",
    )
)
# the wall of the user for the time of the statement, and behind it the function
_OPEN = """
SELECT r.refused, r.calls, r.reached, r.reached_at, clock_timestamp() AS now, (SELECT id FROM events.generation) AS generation,
       (r.head).run_id, (r.head).user_id, (r.head).thread_id, (r.head).request_id, (r.head).correlation_id, (r.head).trace_id,
       (r.head).retention, (r.head).created_at, (r.head).epoch, (r.head).next_seq, (r.head).last_digest, (r.head).last_first_seq,
       (r.head).last_cursor, (r.head).last_at, (r.head).ended, (r.head).terminal_type
FROM (SELECT set_config('netra.user_id', $1, true)::uuid AS user_id) wall
-- before its epoch is raised: what the context of a session's calls ($11) opens is new, or in the thread of that
CROSS JOIN LATERAL (
    SELECT wall.user_id WHERE NOT $11::boolean
        OR NOT EXISTS (SELECT FROM events.heads AS h WHERE h.run_id = $3 AND h.user_id = wall.user_id AND h.thread_id <> $4)) owner
CROSS JOIN LATERAL events.open_run(owner.user_id, $2, $3, $4, $5, $6, $7, $8, to_timestamp($9::float8), $10) r
"""
# sizes are known without reading the results
_STEPS = """
SELECT key, result FROM (
    SELECT key, result, sum(octet_length(result)) OVER (ORDER BY key) - octet_length(result) AS before
    FROM events.steps WHERE run_id = $1 AND user_id = $2 AND key > $3 ORDER BY key LIMIT $4
) page WHERE before < $5 ORDER BY key
"""


@dataclass(frozen=True, slots=True)
class _Lookup:
    """Where to look for a page: the query, up to which cursor it is complete, the arguments beyond those of every page."""

    query: str
    through: int
    more: tuple[object, ...]


class Record:
    """One user's part of the record per call. What a run's new owner is told is left to the `memory` as well."""

    def __init__(self, database: postgres.DatabaseManager, known: memory.Memory | None = None) -> None:
        self._database = database
        self._memory = known or memory.Memory()

    async def open(self, head: heads.NewHead, epoch: int) -> heads.Opened:
        """Raise the epoch of a head, made when it is new; the same epoch again, whose answer was lost, gets the same answer.

        Raises `Fenced`, or `NotFound` when it is another user's, or not in the thread of a session's calls that it is opened for.
        """
        asked = time.monotonic()
        rows = await self._database.alone(
            _OPEN, head.user_id, head.tenant_id, head.run_id, head.thread_id, head.request_id, head.correlation_id, head.trace_id,
            head.retention, head.deadline, epoch, head.of_calls,
        )  # fmt: skip
        if not rows:
            raise errors.NotFound("There is no such run.")
        row = rows[0]
        if row["refused"]:
            raise errors.Fenced(f"The run is owned under epoch {row['epoch']} already.", epoch=row["epoch"])
        self._memory.of(row["generation"], row["now"], asked)
        self._memory.opened(memory.Run.of(row).head(row), ledger.Cursor(row["reached"], row["reached_at"]))
        return heads.Opened(row["next_seq"], row["ended"], row["terminal_type"], row["calls"] or [])

    async def steps(
        self, user_id: str, thread_id: str, run_id: str, epoch: int, after: str, *, limit: int, max_bytes: int
    ) -> heads.Steps:  # fmt: skip
        """Steps after a key, for the owner of the run; at least one, however big, if there is one. Raises `NotFound`, `Fenced`."""
        query = "SELECT epoch FROM events.heads WHERE run_id = $1 AND user_id = $2 AND thread_id = $3 AND NOT erased"
        async with self._database.transaction(user_id) as transaction:
            owned = await transaction.value(query, run_id, user_id, thread_id)
            if owned is None:
                raise errors.NotFound("There is no such run.")
            if owned != epoch:
                raise errors.Fenced(f"The run is owned under epoch {owned}, not {epoch}.", epoch=owned)
            rows = await transaction.fetch(_STEPS, run_id, user_id, after, limit + 1, max_bytes)
        found = [(row["key"], row["result"]) for row in rows[:limit]]
        more = len(rows) > limit or sum(len(result) for _, result in found) >= max_bytes
        return heads.Steps(found, found[-1][0] if more else "")

    async def page(self, user_id: str, after: int, *, limit: int, max_bytes: int, run_id: str = "") -> log.Page:
        """The user's events after a cursor; at least one, however big, if there is one and no run is asked for."""
        page = await self._page(user_id, after, limit, max_bytes, run_id)
        if not run_id and _has_hole(page, after):
            # the day was dropped between two looks; or, and that must not be, the days are wrong
            page = await self._page(user_id, after, limit, max_bytes, run_id, everywhere=True)
            if _has_hole(page, after):
                _log.error("the record has a hole", user_id=user_id, after=after, through=page.through, found=len(page.events))
        return page

    async def _page(
        self, user_id: str, after: int, limit: int, max_bytes: int, run_id: str, *, everywhere: bool = False
    ) -> log.Page:  # fmt: skip
        async with self._database.transaction(user_id) as transaction:
            # first how far, then what: both commit together, so nothing up to there is missing
            rows = await transaction.fetch(_POSITION, user_id, after, limit)
            position = log.Position(rows[0]["last"], rows[0]["oldest"]) if rows else log.Position()
            # what retention hides is not shown any more, dropped or not
            start = max(after, position.oldest - 1)
            if position.last <= start:
                return log.Page([], max(after, position.last), position)
            wanted = min(position.last, start + limit)
            if run_id:
                lookup = await self._of_run(transaction, user_id, run_id, position.last)
            else:
                lookup = _Lookup(_PAGE_ANYWHERE, wanted, ()) if everywhere else _of_all(rows, wanted)
            found = await transaction.fetch(lookup.query, user_id, start, lookup.through, limit, max_bytes, *lookup.more)
        events = [_recorded(user_id, row) for row in found]
        whole = len(events) < limit and sum(len(event.frame) for event in events) < max_bytes
        return log.Page(events, lookup.through if whole else events[-1].cursor, position)

    async def _of_run(self, transaction: postgres.Transaction, user_id: str, run_id: str, last: int) -> _Lookup:
        span = await transaction.row(_SPAN_OF_RUN, user_id, run_id)
        # without a head there is nothing: an empty span finds that
        times = (span["retention"], span["created_at"], span["last_at"]) if span is not None else ("", _NEVER, _NEVER)
        return _Lookup(_PAGE_OF_RUN, last, (run_id, *times))

    async def end_of(self, user_id: str, run_id: str) -> int:
        """The cursor of the run's terminal event, 0 while it has none. Raises `NotFound`."""
        query = "SELECT ended, last_cursor FROM events.heads WHERE run_id = $1 AND user_id = $2 AND NOT erased"
        async with self._database.transaction(user_id) as transaction:
            row = await transaction.row(query, run_id, user_id)
        if row is None:
            raise errors.NotFound("There is no such run.")
        return int(row["last_cursor"]) if row["ended"] else 0

    async def tenant_of(self, user_id: str) -> str:
        """The tenant the user's record belongs to; empty when there is none, or it was not told yet."""
        async with self._database.transaction(user_id) as transaction:
            return _text(await transaction.value("SELECT tenant_id FROM events.cursors WHERE user_id = $1", user_id))


def _of_all(rows: Sequence[postgres.Row], last: int) -> _Lookup:
    found = [days.Day(row["day"], row["retention"], row["first_cursor"]) for row in rows if row["day"] is not None]
    if not found:
        return _Lookup(_PAGE_ANYWHERE, last, ())
    window = days.window(found, last)
    return _Lookup(_PAGE_OF_ALL, window.through, (list(window.classes), window.begins, window.ends))


def _has_hole(page: log.Page, after: int) -> bool:
    """Whether something is missing: without a filter, cursors are contiguous."""
    start = max(after, page.position.oldest - 1)
    return page.through > start and (len(page.events) != page.through - start or page.events[-1].cursor != page.through)


def _recorded(user_id: str, row: postgres.Row) -> log.Recorded:
    return log.Recorded(
        user_id, row["cursor"], _text(row["run_id"]), row["seq"], _text(row["thread_id"]), row["type"], row["frame"], row["ends"]
    )  # fmt: skip


def _text(value: object) -> str:
    return "" if value is None else str(value)
