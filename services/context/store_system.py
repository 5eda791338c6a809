"""SQL for what belongs to no user: the signing key. The only file that uses the system role."""

from __future__ import annotations

from chassis.postgres import DatabaseManager
from services.context.keys import WrappedKey


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
