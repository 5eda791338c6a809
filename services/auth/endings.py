"""Ends sessions and withdraws what was issued in them, inside the transaction of whoever has a reason to."""

from __future__ import annotations

from chassis import postgres
from services.auth import revocations

# a minute more than those that live: a refresh that began just before their end may still commit
_END = """
WITH ended AS (
    UPDATE auth.sessions SET ended_at = now(), end_reason = $2
    WHERE user_id = $1 AND ended_at IS NULL AND least(expires_at, idle_until) > now() - interval '1 minute'
      AND ($4 = '' OR session_id = NULLIF($4, '')::uuid) AND ($5 = '' OR session_id <> NULLIF($5, '')::uuid)
      AND ($6 OR method <> 'api_key')
    RETURNING session_id),
told AS (INSERT INTO auth.revocations (session_id, security) SELECT session_id, $3 FROM ended)
SELECT session_id, now() AS revoked_at FROM ended
"""
_WITHDRAW = "INSERT INTO auth.revocations (user_id, security) VALUES ($1, $2)"


async def end_sessions(
    transaction: postgres.Transaction, user_id: str, reason: str, *, security: bool = False, only: str = "", but: str = "",
    keys: bool = True,
) -> list[revocations.Revocation]:  # fmt: skip
    """End the user's sessions: `only` one, or all `but` one; with those of API keys or without. Returns what to tell."""
    rows = await transaction.fetch(_END, user_id, reason, security, only, but, keys)
    return [revocations.Revocation(str(row["session_id"]), row["revoked_at"], security=security) for row in rows]


async def withdraw_user(transaction: postgres.Transaction, user_id: str, *, security: bool) -> revocations.Revocation:
    """Withdraw all that was issued to the user before now. Returns what to tell."""
    await transaction.execute(_WITHDRAW, user_id, security)
    return revocations.Revocation("", await transaction.value("SELECT now()"), user_id, security)
