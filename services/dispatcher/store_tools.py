"""SQL for tools that are registered from outside; the platform's rows, through the system role."""

from __future__ import annotations

from chassis import postgres
from services.dispatcher.tools import registrations

# of each name so many versions that were replaced are kept
_VERSIONS = 100
_COLUMNS = "name, version, digest, document, state, registered_by, revision"
# a change writes one row that is not replaced: of its name that is what counts
_SINCE = f"SELECT {_COLUMNS} FROM dispatcher.tools WHERE revision > $1 AND state <> 'replaced' ORDER BY revision LIMIT $2"
_END = "UPDATE dispatcher.tools SET state = $2, revision = $3, changed_by = $4, changed_at = now() WHERE name = $1 AND state = 'active'"
_ADD = """
INSERT INTO dispatcher.tools (name, version, digest, document, state, revision, registered_by, changed_by)
VALUES ($1, $2, $3, $4, 'active', $5, $6, $6)
ON CONFLICT (name, version) DO UPDATE SET state = 'active', revision = $5, changed_by = $6, changed_at = now()
"""
_PRUNE = """
DELETE FROM dispatcher.tools WHERE name = $1 AND state = 'replaced'
  AND version NOT IN (SELECT version FROM dispatcher.tools WHERE name = $1 AND state = 'replaced' ORDER BY revision DESC LIMIT $2)
"""


class ToolStore:
    """The registrations of all dispatchers."""

    def __init__(self, database: postgres.DatabaseManager) -> None:
        self._database = database

    async def since(self, revision: int, most: int) -> list[registrations.Kept]:
        """What changed after a revision, oldest first: of each name the version that counts, or the one that was removed."""
        return [_kept(row) for row in await self._database.alone(_SINCE, revision, most)]

    async def register(self, new: registrations.Kept, decide: registrations.Decide) -> bool:
        """Make this version the active one of its name, if `decide` says so; nobody else changes anything meanwhile."""
        async with self._database.transaction() as transaction:
            if not await self._decided(transaction, new.name, decide):
                return False
            revision = await _next(transaction)
            await transaction.execute(_END, new.name, registrations.REPLACED, revision, new.registered_by)
            await transaction.execute(_ADD, new.name, new.version, new.digest, new.document, revision, new.registered_by)
            await transaction.execute(_PRUNE, new.name, _VERSIONS)
        return True

    async def deregister(self, name: str, by: str, decide: registrations.Decide) -> bool:
        """Have no active version of a name, if `decide` says so; nobody else changes anything meanwhile."""
        async with self._database.transaction() as transaction:
            if not await self._decided(transaction, name, decide):
                return False
            await transaction.execute(_END, name, registrations.REMOVED, await _next(transaction), by)
        return True

    async def _decided(self, transaction: postgres.Transaction, name: str, decide: registrations.Decide) -> bool:
        await transaction.execute("SELECT revision FROM dispatcher.tools_head FOR UPDATE")
        rows = await transaction.fetch(f"SELECT {_COLUMNS} FROM dispatcher.tools WHERE name = $1", name)
        active = await transaction.value("SELECT count(*) FROM dispatcher.tools WHERE state = 'active'")
        return decide([_kept(row) for row in rows], active)


async def _next(transaction: postgres.Transaction) -> int:
    return int(await transaction.value("UPDATE dispatcher.tools_head SET revision = revision + 1 RETURNING revision"))


def _kept(row: postgres.Row) -> registrations.Kept:
    return registrations.Kept(
        row["name"], row["version"], row["digest"], row["document"], row["state"], row["registered_by"], row["revision"]
    )  # fmt: skip
