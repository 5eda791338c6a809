"""SQL for one user's record: opens runs and reads, under row-level security."""

from __future__ import annotations

from chassis import postgres
from netra import errors
from services.events import heads, log

_POSITION = "SELECT last, oldest FROM events.cursors WHERE user_id = $1"
# sizes are known without reading the frames, so a page costs what it sends
_PAGE = """
SELECT cursor, run_id, seq, thread_id, type, ends, frame FROM (
    SELECT cursor, run_id, seq, thread_id, type, ends, frame,
           sum(octet_length(frame)) OVER (ORDER BY cursor) - octet_length(frame) AS before
    FROM events.events WHERE user_id = $1 AND cursor > $2 AND cursor <= $3 {filter} ORDER BY cursor LIMIT $4
) page WHERE before < $5 ORDER BY cursor
"""
_PAGE_OF_ALL = _PAGE.format(filter="")
_PAGE_OF_RUN = _PAGE.format(filter="AND run_id = $6")
_NEW_HEAD = """
INSERT INTO events.heads (run_id, user_id, thread_id, request_id, correlation_id, trace_id, retention, deadline)
VALUES ($1, $2, $3, $4, $5, $6, $7, to_timestamp($8::float8)) ON CONFLICT DO NOTHING
"""
_HEAD = "SELECT epoch, next_seq, ended, terminal_type FROM events.heads WHERE run_id = $1 AND user_id = $2 FOR UPDATE"
_OPEN_CALLS = """
SELECT tool_call_id FROM events.events WHERE user_id = $2 AND run_id = $1 AND type IN ('tool_executing', 'tool_completed')
GROUP BY tool_call_id HAVING count(*) FILTER (WHERE type = 'tool_completed') = 0 ORDER BY min(seq)
"""


class Record:
    """One user's part of the record per call."""

    def __init__(self, database: postgres.DatabaseManager) -> None:
        self._database = database

    async def open(self, head: heads.NewHead, epoch: int) -> heads.Opened:
        """Raise the epoch of a head, made when it is new. Raises `Fenced`, or `NotFound` when it is another user's."""
        async with self._database.transaction(head.user_id) as transaction:
            # in the order of the writer's locks: cursors, then heads
            await transaction.execute("INSERT INTO events.cursors (user_id) VALUES ($1) ON CONFLICT DO NOTHING", head.user_id)
            await transaction.execute(
                _NEW_HEAD, head.run_id, head.user_id, head.thread_id, head.request_id, head.correlation_id, head.trace_id,
                head.retention, head.deadline,
            )  # fmt: skip
            row = await transaction.row(_HEAD, head.run_id, head.user_id)
            if row is None:
                raise errors.NotFound("There is no such run.")
            if epoch <= row["epoch"]:
                raise errors.Fenced(f"The run is owned under epoch {row['epoch']} already.", epoch=row["epoch"])
            owner = (head.run_id, head.user_id)
            await transaction.execute("UPDATE events.heads SET epoch = $3 WHERE run_id = $1 AND user_id = $2", *owner, epoch)
            steps = await transaction.fetch("SELECT key, result FROM events.steps WHERE run_id = $1 AND user_id = $2 ORDER BY key", *owner)
            calls = await transaction.fetch(_OPEN_CALLS, *owner)
        return heads.Opened(
            row["next_seq"], row["ended"], row["terminal_type"],
            [(step["key"], step["result"]) for step in steps], [call["tool_call_id"] for call in calls],
        )  # fmt: skip

    async def page(self, user_id: str, after: int, *, limit: int, max_bytes: int, run_id: str = "") -> log.Page:
        """The user's events after a cursor; at least one, however big, if there is one."""
        async with self._database.transaction(user_id) as transaction:
            # first how far, then what: both commit together, so nothing up to there is missing
            row = await transaction.row(_POSITION, user_id)
            position = log.Position(row["last"], row["oldest"]) if row is not None else log.Position()
            if position.last <= after:
                return log.Page([], after, position)
            arguments = (user_id, after, position.last, limit, max_bytes)
            query, filters = (_PAGE_OF_RUN, (run_id,)) if run_id else (_PAGE_OF_ALL, ())
            rows = await transaction.fetch(query, *arguments, *filters)
        events = [_recorded(user_id, found) for found in rows]
        whole = len(events) < limit and sum(len(event.frame) for event in events) < max_bytes
        return log.Page(events, position.last if whole else events[-1].cursor, position)

    async def end_of(self, user_id: str, run_id: str) -> int:
        """The cursor of the run's terminal event, 0 while it has none. Raises `NotFound`."""
        query = "SELECT ended, last_cursor FROM events.heads WHERE run_id = $1 AND user_id = $2"
        async with self._database.transaction(user_id) as transaction:
            row = await transaction.row(query, run_id, user_id)
        if row is None:
            raise errors.NotFound("There is no such run.")
        return int(row["last_cursor"]) if row["ended"] else 0


def _recorded(user_id: str, row: postgres.Row) -> log.Recorded:
    return log.Recorded(
        user_id, row["cursor"], _text(row["run_id"]), row["seq"], _text(row["thread_id"]), row["type"], row["frame"], row["ends"]
    )  # fmt: skip


def _text(value: object) -> str:
    return "" if value is None else str(value)
