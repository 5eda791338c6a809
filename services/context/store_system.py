"""SQL for what belongs to no user any more, or never did: left-over files, the signing key. The only file that uses the system role."""

from __future__ import annotations

from datetime import timedelta

from chassis.postgres import DatabaseManager
from services.context.keys import WrappedKey

# an upload that lives is touched far more often
_ABANDONED = timedelta(hours=1)
_CHUNKS_AT_ONCE = 32


class SystemStore:
    """Statements of the role netra_context_system."""

    def __init__(self, database: DatabaseManager) -> None:
        self._database = database

    async def current_key(self) -> WrappedKey | None:
        """The key that signs now, if one was made."""
        async with self._database.transaction() as transaction:
            row = await transaction.row("SELECT kid, sealed FROM context.signing_keys WHERE state = 'current'")
        return None if row is None else WrappedKey(row["kid"], row["sealed"])

    async def offer_key(self, key: WrappedKey) -> None:
        """Make this the current key, unless there is one: of replicas that start together one wins."""
        async with self._database.transaction() as transaction:
            await transaction.execute(
                "INSERT INTO context.signing_keys (kid, state, sealed) VALUES ($1, 'current', $2)"
                " ON CONFLICT (state) WHERE state = 'current' DO NOTHING",
                key.kid, key.sealed,
            )  # fmt: skip

    async def give_up_abandoned(self) -> None:
        """Give up the uploads that nothing came for: their process died."""
        query = "UPDATE context.artifacts SET state = 'discarded' WHERE state = 'uploading' AND touched_at < now() - $1::interval"
        async with self._database.transaction() as transaction:
            await transaction.execute(query, _ABANDONED)

    async def remove_some(self) -> bool:
        """Remove a few chunks of a file that was given up, or what is left of it; whether there was one."""
        async with self._database.transaction() as transaction:
            # replicas that sweep together take different files
            artifact_id = await transaction.value(
                "SELECT artifact_id FROM context.artifacts WHERE state = 'discarded' LIMIT 1 FOR UPDATE SKIP LOCKED"
            )
            if artifact_id is None:
                return False
            removed = await transaction.execute(
                "DELETE FROM context.artifact_chunks WHERE artifact_id = $1 AND position IN"
                " (SELECT position FROM context.artifact_chunks WHERE artifact_id = $1 LIMIT $2)",
                artifact_id, _CHUNKS_AT_ONCE,
            )  # fmt: skip
            if removed == "DELETE 0":
                await transaction.execute("DELETE FROM context.artifacts WHERE artifact_id = $1", artifact_id)
        return True
