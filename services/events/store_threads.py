"""SQL for the events of one thread, whoever owns them, under row-level security: a transaction sees what its grant token named."""

from __future__ import annotations

from collections.abc import Sequence

from chassis import postgres
from netra import errors
from services.events import follow, log, paging, progress

_HEADS = """
SELECT run_id, user_id, retention, created_at, last_at, next_seq, ended FROM events.heads
WHERE thread_id = $1 AND NOT erased AND {wanted} ORDER BY run_id
"""
_NAMED = _HEADS.format(wanted="run_id = ANY($2::uuid[])")
_AFTER = _HEADS.format(wanted="run_id > $2") + "LIMIT $3"
# each part reads its own index, and of that no more than there is room for: a thread can have very many runs
_PART = "(SELECT run_id FROM events.heads WHERE thread_id = $1 AND NOT erased AND run_id > $4 AND {wanted} ORDER BY run_id LIMIT $5)"
_PARTS = " UNION ALL ".join(_PART.format(wanted=wanted) for wanted in ("run_id = ANY($2::uuid[])", "run_id > $3", "NOT ended"))
_GOING_ON = _HEADS.format(wanted=f"run_id IN ({_PARTS})") + "LIMIT $5"
# what retention hides is not shown, dropped or not
_OF_RUN = """
user_id = $1 AND run_id = $2 AND thread_id = $3 AND retention = $4 AND recorded_at BETWEEN $5 AND $6
AND seq > $7 AND seq <= $8 AND cursor >= $9
"""
_PAGE = paging.page("seq, type, ends, frame", "seq", _OF_RUN, limit="$10", max_bytes="$11")
_FIRST = "00000000-0000-0000-0000-000000000000"


class Threads:
    """The runs and events of a thread, for whoever was given leave to read it."""

    def __init__(self, database: postgres.DatabaseManager) -> None:
        self._database = database

    async def named(self, reader: follow.Reader, run_ids: Sequence[str]) -> Sequence[progress.Head]:
        """These runs, as far as they are of the thread."""
        return await self._heads(reader, _NAMED, list(run_ids))

    async def after(self, reader: follow.Reader, run_id: str, many: int) -> Sequence[progress.Head]:
        """The next runs of the thread, in the order of their ids."""
        return await self._heads(reader, _AFTER, run_id or _FIRST, many)

    async def going_on(self, reader: follow.Reader, run_ids: Sequence[str], since: str, after: str, many: int) -> Sequence[progress.Head]:
        """Of these runs, those that have not ended, and those with ids after `since`, the first `many` with ids after `after`."""
        return await self._heads(reader, _GOING_ON, list(run_ids), since or _FIRST, after or _FIRST, many)

    async def _heads(self, reader: follow.Reader, query: str, *more: object) -> Sequence[progress.Head]:
        async with self._database.transaction(reader.user_id, within={"thread_id": reader.thread_id}) as transaction:
            return [_head(row) for row in await transaction.fetch(query, reader.thread_id, *more)]

    async def head(self, reader: follow.Reader, run_id: str) -> progress.Head:
        """One run of the thread. Raises `NotFound`."""
        heads = await self.named(reader, [run_id])
        if not heads:
            raise errors.NotFound("There is no such run in this thread.", field="run_id")
        return heads[0]

    async def events(self, reader: follow.Reader, wanted: Sequence[progress.Wanted], limit: int, max_bytes: int) -> Sequence[progress.Read]:
        """The next events of runs, one run after the other, as far as there is room; at least one, however big, if there is one."""
        found: list[progress.Read] = []
        async with self._database.transaction(reader.user_id, within={"thread_id": reader.thread_id}) as transaction:
            for one in wanted:
                head = one.head
                span = (head.retention, head.opened_at, head.last_at, one.after, head.last, one.oldest)
                rows = await transaction.fetch(_PAGE, head.user_id, head.run_id, reader.thread_id, *span, limit, max_bytes)
                found.append(progress.Read(one, [_recorded(reader, head, row) for row in rows]))
                limit -= len(rows)
                max_bytes -= sum(len(row["frame"]) for row in rows)
                if limit <= 0 or max_bytes <= 0:
                    break
        return found


def _head(row: postgres.Row) -> progress.Head:
    return progress.Head(
        str(row["run_id"]), str(row["user_id"]), row["retention"], row["created_at"], row["last_at"], row["next_seq"] - 1, row["ended"]
    )


def _recorded(reader: follow.Reader, head: progress.Head, row: postgres.Row) -> log.Recorded:
    # the cursor is their owner's, and nobody else's
    return log.Recorded(head.user_id, 0, head.run_id, row["seq"], reader.thread_id, row["type"], row["frame"], row["ends"])
