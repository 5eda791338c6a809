"""SQL that crosses users: what is old, or left over of what was erased."""

from __future__ import annotations

from collections.abc import Sequence

from chassis import postgres
from services.dispatcher import erasure, store_erasure

# with all that was said to them and that they asked for; whom another sweep has at hand is passed over
_DROP = """
WITH old AS MATERIALIZED (SELECT run_id FROM dispatcher.runs WHERE {which} LIMIT {many} FOR UPDATE SKIP LOCKED),
those AS MATERIALIZED (SELECT array_agg(run_id) AS run_ids FROM old),
asked AS (DELETE FROM dispatcher.approvals WHERE run_id = ANY((SELECT run_ids FROM those)::uuid[]) RETURNING approval_id),
votes AS (
    DELETE FROM dispatcher.approval_votes WHERE approval_id = ANY((SELECT array_agg(approval_id) FROM asked)::uuid[])),
mail AS (DELETE FROM dispatcher.messages WHERE run_id = ANY((SELECT run_ids FROM those)::uuid[]))
DELETE FROM dispatcher.runs WHERE run_id = ANY((SELECT run_ids FROM those)::uuid[]) RETURNING run_id
"""
_OLD = _DROP.format(
    which="tier = $1 AND ended_at < now() - make_interval(days => $2) AND NOT context_open ORDER BY tier, ended_at", many="$3"
)
_ERASED = _DROP.format(
    which="erased_at IS NOT NULL AND created_at < now() - interval '1 day' AND NOT context_open ORDER BY created_at", many="$1"
)
_UNFINISHED = (
    "SELECT user_id, request_id, thread_id, asked_at, runs, false AS done FROM dispatcher.erasures"
    " WHERE done_at IS NULL AND asked_at < now() - interval '5 minutes' ORDER BY asked_at LIMIT 100"
)


class OldRuns:
    """The runs of all users, through the system role."""

    def __init__(self, database: postgres.DatabaseManager) -> None:
        self._database = database

    async def drop(self, tier: str, days: int, many: int) -> int:
        """Drop some runs of a tier that ended longer ago; how many."""
        return len(await self._database.alone(_OLD, tier, days, many))

    async def drop_erased(self, many: int) -> int:
        """Drop what is left of some runs that were erased, once nobody repeats their request any more; how many."""
        return len(await self._database.alone(_ERASED, many))

    async def unfinished(self) -> Sequence[erasure.Erasure]:
        """Erasures that were begun some time ago and have not ended."""
        return [store_erasure.read(row) for row in await self._database.alone(_UNFINISHED)]
