"""Ends sessions and withdraws what was issued in them, inside the transaction of whoever has a reason to."""

from __future__ import annotations

from collections.abc import Sequence

from chassis import postgres
from services.auth import revocations

# whoever opens a session or makes an API key holds this as well: what is not yet there when we look begins after us
_LOCK = "SELECT user_id FROM auth.users WHERE user_id = $1 FOR NO KEY UPDATE"
# A minute more than those that live: a refresh that began just before their end may still commit. A session that is over already ends
# once more for a reason of security: its runs went on until now.
_END = """
WITH ended AS (
    UPDATE auth.sessions SET ended_at = coalesce(ended_at, now()), end_reason = $2
    WHERE user_id = $1 AND (cardinality($4::uuid[]) = 0 OR session_id = ANY($4)) AND ($5 = '' OR session_id <> NULLIF($5, '')::uuid)
      AND ((ended_at IS NULL AND least(expires_at, idle_until) > now() - interval '1 minute')
           OR ($3 AND session_id = ANY($4) AND end_reason IS DISTINCT FROM $2))
    RETURNING session_id),
told AS (INSERT INTO auth.revocations (session_id, security) SELECT session_id, $3 FROM ended)
SELECT session_id, now() AS revoked_at FROM ended
"""
# what was begun in them may still run, for as long as a run may
_LEFT = "SELECT session_id FROM auth.sessions WHERE user_id = $1 AND least(expires_at, ended_at) > now() - interval '25 hours'"
_RIGHTS = "INSERT INTO auth.revocations (user_id, roles, tier) VALUES ($1, $2, $3)"
_WITHDRAW = "INSERT INTO auth.revocations (user_id, security) VALUES ($1, $2)"


async def end_sessions(
    transaction: postgres.Transaction, user_id: str, reason: str, *, security: bool = False, only: Sequence[str] = (), but: str = ""
) -> list[revocations.Revocation]:
    """End the user's sessions, API keys included: `only` some, or all `but` one. Returns what to tell."""
    await transaction.execute(_LOCK, user_id)
    rows = await transaction.fetch(_END, user_id, reason, security, list(only), but)
    return [revocations.Revocation(str(row["session_id"]), row["revoked_at"], security=security) for row in rows]


async def stop_runs(transaction: postgres.Transaction, user_id: str, reason: str, *, but: str) -> list[revocations.Revocation]:
    """Have the runs cancelled, too, of sessions that were over before, all `but` one. Returns what to tell."""
    left = [row["session_id"] for row in await transaction.fetch(_LEFT, user_id)]
    return await end_sessions(transaction, user_id, reason, security=True, only=left, but=but) if left else []


async def withdraw_user(transaction: postgres.Transaction, user_id: str, *, security: bool) -> revocations.Revocation:
    """Withdraw all that was issued to the user before now. Returns what to tell."""
    await transaction.execute(_WITHDRAW, user_id, security)
    return revocations.Revocation("", await transaction.value("SELECT now()"), user_id, security)


async def tell_rights(transaction: postgres.Transaction, user_id: str, roles: Sequence[str], tier: str) -> revocations.Revocation:
    """What the user has from now on: what they began before has no more than that. Returns what to tell."""
    await transaction.execute(_RIGHTS, user_id, list(roles), tier)
    return revocations.Revocation("", await transaction.value("SELECT now()"), user_id, roles=tuple(roles), tier=tier)
