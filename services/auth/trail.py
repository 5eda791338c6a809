"""The one way to add to the record of access: at the end of the transaction that it tells about."""

from __future__ import annotations

from chassis import postgres, telemetry

_APPEND = "SELECT auth.append_audit($1, $2, $3, $4, $5, $6, $7)"


async def append(
    transaction: postgres.Transaction, user_id: str | None, actor: str, action: str, outcome: str = "ok", detail: str = "",
    *, tenant_id: str | None = None,
) -> None:  # fmt: skip
    """Add an entry about a user, or about nobody. Without a tenant it is that of the user.

    No other entry can be added until the transaction has ended: call it last.
    """
    await transaction.execute(_APPEND, tenant_id, user_id, actor, action, outcome, detail, telemetry.correlation_id())
