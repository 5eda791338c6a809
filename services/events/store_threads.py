"""SQL for the events of one thread, whoever owns them, under row-level security: a transaction sees what its grant token named."""

from __future__ import annotations

from collections.abc import Sequence

from chassis import postgres
from netra import errors
from services.events import follow, log

# the time is there also when there is no head
_HEADS = """
SELECT t.now, h.run_id, h.user_id, h.retention, h.created_at, h.last_at, h.next_seq, h.ended
FROM (SELECT clock_timestamp() AS now) t LEFT JOIN (
    SELECT * FROM events.heads WHERE thread_id = $1 AND NOT erased AND {wanted}
) h ON true ORDER BY h.run_id
"""
_NAMED = _HEADS.format(wanted="run_id = ANY($2::uuid[])")
_AFTER = _HEADS.format(wanted="run_id > $2 ORDER BY run_id LIMIT $3")
_MOVED = _HEADS.format(wanted="last_at > $2")
# sizes are known without reading the frames, so a page costs what it sends; what retention hides is not shown, dropped or not
_PAGE = """
SELECT seq, type, ends, frame FROM (
    SELECT seq, type, ends, frame, sum(octet_length(frame)) OVER (ORDER BY seq) - octet_length(frame) AS before
    FROM events.events
    WHERE user_id = $1 AND run_id = $2 AND thread_id = $3 AND retention = $4 AND recorded_at BETWEEN $5 AND $6
      AND seq > $7 AND seq <= $8 AND cursor >= $9
    ORDER BY seq LIMIT $10
) page WHERE before < $11 ORDER BY seq
"""
_FIRST = "00000000-0000-0000-0000-000000000000"


class Threads:
    """The runs and events of a thread, for whoever was given leave to read it."""

    def __init__(self, database: postgres.DatabaseManager) -> None:
        self._database = database

    async def named(self, reader: follow.Reader, run_ids: Sequence[str]) -> follow.Look:
        """These runs, as far as they are of the thread."""
        return await self._look(reader, _NAMED, list(run_ids))

    async def after(self, reader: follow.Reader, run_id: str, many: int) -> follow.Look:
        """The next runs of the thread, in the order of their ids."""
        return await self._look(reader, _AFTER, run_id or _FIRST, many)

    async def moved(self, reader: follow.Reader, since: follow.Moment) -> follow.Look:
        """The runs of the thread with events recorded since."""
        return await self._look(reader, _MOVED, since)

    async def _look(self, reader: follow.Reader, query: str, *more: object) -> follow.Look:
        async with self._database.transaction(reader.user_id, within={"thread_id": reader.thread_id}) as transaction:
            rows = await transaction.fetch(query, reader.thread_id, *more)
        return follow.Look(rows[0]["now"], [_head(row) for row in rows if row["run_id"] is not None])

    async def head(self, reader: follow.Reader, run_id: str) -> follow.Head:
        """One run of the thread. Raises `NotFound`."""
        heads = (await self.named(reader, [run_id])).heads
        if not heads:
            raise errors.NotFound("There is no such run in this thread.", field="run_id")
        return heads[0]

    async def events(self, reader: follow.Reader, wanted: Sequence[follow.Wanted], limit: int, max_bytes: int) -> Sequence[follow.Read]:
        """The next events of runs, one run after the other, as far as there is room; at least one, however big, if there is one."""
        found: list[follow.Read] = []
        async with self._database.transaction(reader.user_id, within={"thread_id": reader.thread_id}) as transaction:
            for one in wanted:
                head = one.head
                span = (head.retention, head.opened_at, head.last_at, one.after, head.last, one.oldest)
                rows = await transaction.fetch(_PAGE, head.user_id, head.run_id, reader.thread_id, *span, limit, max_bytes)
                found.append(follow.Read(one, [_recorded(reader, head, row) for row in rows]))
                limit -= len(rows)
                max_bytes -= sum(len(row["frame"]) for row in rows)
                if limit <= 0 or max_bytes <= 0:
                    break
        return found


def _head(row: postgres.Row) -> follow.Head:
    return follow.Head(
        str(row["run_id"]), str(row["user_id"]), row["retention"], row["created_at"], row["last_at"], row["next_seq"] - 1, row["ended"]
    )


def _recorded(reader: follow.Reader, head: follow.Head, row: postgres.Row) -> log.Recorded:
    # the cursor is their owner's, and nobody else's
    return log.Recorded(head.user_id, 0, head.run_id, row["seq"], reader.thread_id, row["type"], row["frame"], row["ends"])
