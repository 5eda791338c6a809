"""SQL for the versions of the policy."""

from __future__ import annotations

from chassis import postgres
from services.auth import policy, trail

_COLUMNS = "version, document, actor, comment, defaults, created_at"


class PolicyStore:
    """Statements of the role `netra_auth`, which adds versions and changes none."""

    def __init__(self, database: postgres.DatabaseManager) -> None:
        self._database = database

    async def latest(self) -> int:
        """The highest version; 0 when there is none."""
        async with self._database.transaction() as transaction:
            return int(await transaction.value("SELECT coalesce(max(version), 0) FROM auth.policies"))

    async def get(self, version: int) -> policy.Version | None:
        """One version."""
        async with self._database.transaction() as transaction:
            row = await transaction.row(f"SELECT {_COLUMNS} FROM auth.policies WHERE version = $1", version)
        return _version(row) if row is not None else None

    async def add(self, version: int, document: bytes, *, actor: str, comment: str, defaults: int, user_id: str | None) -> bool:
        """Add a version, and to the record that the user did. False when there is such a version by now."""
        query = (
            "INSERT INTO auth.policies (version, document, actor, comment, defaults) VALUES ($1, $2, $3, $4, $5)"
            " ON CONFLICT DO NOTHING RETURNING version"
        )
        async with self._database.transaction(user_id) as transaction:
            if await transaction.value(query, version, document, actor, comment, defaults) is None:
                return False
            detail = f"version {version}: {comment}" if comment else f"version {version}"
            await trail.append(transaction, user_id, actor, "update_policy", detail=detail)
        return True

    async def page(self, before: int, most: int) -> list[policy.Version]:
        """Versions, newest first, older than `before`; all when it is 0."""
        query = f"SELECT {_COLUMNS} FROM auth.policies WHERE $1::bigint = 0 OR version < $1 ORDER BY version DESC LIMIT $2"
        async with self._database.transaction() as transaction:
            return [_version(row) for row in await transaction.fetch(query, before, most)]


def _version(row: postgres.Row) -> policy.Version:
    return policy.Version(row["version"], row["document"], row["actor"], row["comment"], row["defaults"], row["created_at"])
