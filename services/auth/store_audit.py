"""SQL for the record of access. The role sees all tenants; it can read and add, and nobody can change."""

from __future__ import annotations

from collections.abc import Sequence

from chassis import postgres
from services.auth import audit, trail

_COLUMNS = "position, at, tenant_id, user_id, actor, action, outcome, detail, correlation_id, hash"
_APPEND = (
    "SELECT auth.append_audit(NULLIF(tenant, '')::uuid, NULLIF(about, '')::uuid, actor, action, outcome, detail, correlation)"
    " FROM (SELECT * FROM unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::text[], $6::text[], $7::text[])"
    " WITH ORDINALITY AS told (tenant, about, actor, action, outcome, detail, correlation, place) ORDER BY place) AS told"
)
_FIND = (
    f"SELECT {_COLUMNS} FROM auth.audit WHERE tenant_id = $1::uuid"
    " AND ($2 = '' OR tenant_id::text || user_id::text = $1::uuid::text || NULLIF($2, '')::uuid::text)"
    " AND ($3 = '' OR action = $3) AND ($4 = '' OR outcome = $4) AND ($5::timestamptz IS NULL OR at >= $5)"
    " AND ($6::timestamptz IS NULL OR at < $6) AND ($7::bigint = 0 OR position < $7) ORDER BY position DESC LIMIT $8"
)


class AuditStore:
    """Statements of the role `netra_auth_system`."""

    def __init__(self, database: postgres.DatabaseManager) -> None:
        self._database = database

    async def append(self, entries: Sequence[audit.Told]) -> None:
        """Add entries, in this order."""
        fields = ("tenant_id", "user_id", "actor", "action", "outcome", "detail", "correlation_id")
        columns = [[getattr(told, field) for told in entries] for field in fields]
        async with self._database.transaction() as transaction:
            await transaction.fetch(_APPEND, *columns)

    async def note(self, reader: audit.Reader, action: str, detail: str) -> None:
        """Record that somebody reads."""
        async with self._database.transaction() as transaction:
            await trail.append(transaction, reader.user_id, reader.actor, action, detail=detail)

    async def find(self, wanted: audit.Filter, before: int, most: int, reader: audit.Reader) -> list[audit.Entry]:
        """Entries, newest first, older than `before` when it is not 0; the read is recorded."""
        narrowed = {
            "user": wanted.user_id,
            "action": wanted.action,
            "outcome": wanted.outcome,
            "since": wanted.since,
            "until": wanted.until,
        }
        detail = ", ".join(f"{name} {value}" for name, value in narrowed.items() if value)
        async with self._database.transaction() as transaction:
            rows = await transaction.fetch(
                _FIND, wanted.tenant_id, wanted.user_id, wanted.action, wanted.outcome, wanted.since, wanted.until, before, most
            )
            await trail.append(transaction, reader.user_id, reader.actor, "query_audit", detail=detail[:500])
        return [_entry(row) for row in rows]

    async def entries(self, after: int, upto: int, most: int) -> list[audit.Entry]:
        """Entries of all tenants in their order."""
        query = f"SELECT {_COLUMNS} FROM auth.audit WHERE position > $1 AND position <= $2 ORDER BY position LIMIT $3"
        async with self._database.transaction() as transaction:
            return [_entry(row) for row in await transaction.fetch(query, after, upto, most)]

    async def head(self) -> audit.Head:
        """The end."""
        query = "SELECT position, hash, (SELECT coalesce(max(a.position), 0) FROM auth.audit AS a) AS last_position FROM auth.audit_head"
        async with self._database.transaction() as transaction:
            row = await transaction.row(query)
        return audit.Head(row["position"], row["hash"], row["last_position"]) if row is not None else audit.Head(0, b"", 0)


def _entry(row: postgres.Row) -> audit.Entry:
    told = audit.Told(
        str(row["tenant_id"] or ""), str(row["user_id"] or ""), row["actor"], row["action"], row["outcome"], row["detail"],
        row["correlation_id"],
    )  # fmt: skip
    return audit.Entry(row["position"], row["at"], told, row["hash"])
