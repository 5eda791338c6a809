"""SQL for API keys, as the user whose keys they are."""

from __future__ import annotations

from chassis import postgres
from netra import errors
from services.auth import api_keys, revocations, trail

_KEY = "k.key_id, k.name, k.prefix, k.scopes, k.created_at, k.expires_at, k.last_used_at"
_IN_FORCE = "s.ended_at IS NULL AND k.expires_at > now()"


class KeyStore:
    """Statements of the role `netra_auth`: row-level security shows one user at a time."""

    def __init__(self, database: postgres.DatabaseManager) -> None:
        self._database = database

    async def add_key(self, user_id: str, session_id: str, wanted: api_keys.Wanted, most: int) -> api_keys.Key:
        """Add a key that is asked for in a session, and the key's own session.

        Raises `Unauthenticated` when user or session have ended by now, `QuotaExceeded` when the user has as many keys as may be.
        """
        async with self._database.transaction(user_id) as transaction:
            # whoever ends the user or the session waits for this, or is waited for; and the count holds
            locked = "SELECT user_id FROM auth.users WHERE user_id = $1 AND disabled_at IS NULL FOR NO KEY UPDATE"
            lives = "SELECT session_id FROM auth.sessions WHERE user_id = $1 AND session_id = $2 AND ended_at IS NULL"
            if await transaction.value(locked, user_id) is None or await transaction.value(lives, user_id, session_id) is None:
                raise errors.Unauthenticated("The session has ended. Sign in again.")
            count = await transaction.value(
                "SELECT count(*) FROM auth.api_keys AS k JOIN auth.sessions AS s USING (session_id)"
                f" WHERE k.user_id = $1 AND s.user_id = $1 AND {_IN_FORCE}",
                user_id,
            )
            if count >= most:
                raise errors.QuotaExceeded(f"You have {count} API keys, which is the most. Revoke one first.", limit=most)
            await transaction.execute(
                "INSERT INTO auth.sessions (session_id, user_id, device, method, expires_at, idle, idle_until)"
                " VALUES ($1, $2, $3, $4, now() + $5, $5, now() + $5)",
                wanted.session_id, user_id, wanted.name, api_keys.METHOD, wanted.life,
            )  # fmt: skip
            row = await transaction.row(
                "INSERT INTO auth.api_keys AS k (key_id, user_id, session_id, name, prefix, secret_digest, scopes, expires_at)"
                f" VALUES ($1, $2, $3, $4, $5, $6, $7, now() + $8) RETURNING {_KEY}",
                wanted.key_id, user_id, wanted.session_id, wanted.name, wanted.prefix, wanted.secret_digest, list(wanted.scopes),
                wanted.life,
            )  # fmt: skip
            detail = f"{wanted.prefix}; scopes {' '.join(wanted.scopes)}"
            await trail.append(transaction, user_id, f"user:{user_id}", "create_api_key", detail=detail)
        assert row is not None  # noqa: S101 - INSERT ... RETURNING
        return _key(row)

    async def keys_of(self, user_id: str, most: int) -> list[api_keys.Key]:
        """The keys in force, newest first."""
        async with self._database.transaction(user_id) as transaction:
            rows = await transaction.fetch(
                f"SELECT {_KEY} FROM auth.api_keys AS k JOIN auth.sessions AS s USING (session_id)"
                f" WHERE k.user_id = $1 AND s.user_id = $1 AND {_IN_FORCE} ORDER BY k.key_id DESC LIMIT $2",
                user_id, most,
            )  # fmt: skip
        return [_key(row) for row in rows]

    async def revoke_key(self, user_id: str, key_id: str) -> revocations.Revocation | None:
        """End a key and its session; None when it has ended before. Raises `NotFound`."""
        async with self._database.transaction(user_id) as transaction:
            known = await transaction.row(
                "SELECT session_id, prefix FROM auth.api_keys WHERE user_id = $1 AND key_id = $2", user_id, key_id
            )
            if known is None:
                raise errors.NotFound("There is no such API key.", field="key_id")
            revoked_at = await transaction.value(
                "WITH ended AS (UPDATE auth.sessions SET ended_at = now(), end_reason = 'key revoked'"
                " WHERE user_id = $1 AND session_id = $2 AND ended_at IS NULL RETURNING session_id)"
                " INSERT INTO auth.revocations (session_id, revoked_at) SELECT session_id, now() FROM ended RETURNING now()",
                user_id, known["session_id"],
            )  # fmt: skip
            outcome = "ok" if revoked_at is not None else "had ended"
            await trail.append(transaction, user_id, f"user:{user_id}", "revoke_api_key", outcome, known["prefix"])
        return revocations.Revocation(str(known["session_id"]), revoked_at) if revoked_at is not None else None


def _key(row: postgres.Row) -> api_keys.Key:
    return api_keys.Key(
        str(row["key_id"]), row["name"], row["prefix"], tuple(row["scopes"]), row["created_at"], row["expires_at"], row["last_used_at"]
    )
