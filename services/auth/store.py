"""SQL for users, sessions, revocations and keys."""

from __future__ import annotations

from datetime import timedelta

from chassis import postgres
from services.auth import keys, revocations, sessions, tokens, users

# after this, no token that a retired key signed is valid any more
_RETIRED_SHOWN = timedelta(hours=2)
_KEYS_LOCK = "SELECT pg_advisory_xact_lock(hashtext('auth.signing_keys'))"
_INSERT_KEY = "INSERT INTO auth.signing_keys (kid, state, public_key, wrapped) VALUES ($1, $2, $3, $4)"
_AUDIT = "INSERT INTO auth.audit (user_id, actor, action, outcome, detail) VALUES ($1, $2, $3, $4, $5)"


async def _audit(
    transaction: postgres.Transaction, user_id: str | None, actor: str, action: str, outcome: str = "ok", detail: str = ""
) -> None:
    """Add a line to the audit trail, in the transaction of what it tells about."""
    await transaction.execute(_AUDIT, user_id, actor, action, outcome, detail)


class Store:
    """Statements of the role `netra_auth`: row-level security shows one user at a time."""

    def __init__(self, database: postgres.DatabaseManager) -> None:
        self._database = database

    async def create_user(self, user: users.User, email: str, password_hash: str, actor: str) -> None:
        """Add a user. Raises `Conflict` when the e-mail is taken."""
        query = (
            "INSERT INTO auth.users (user_id, tenant_id, email, roles, tier, version, password_hash) VALUES ($1, $2, $3, $4, $5, $6, $7)"
        )
        async with self._database.transaction(user.user_id) as transaction:
            await transaction.execute(
                query, user.user_id, user.tenant_id, email, list(user.roles), user.tier, user.version, password_hash
            )  # fmt: skip
            detail = f"roles {','.join(user.roles)}; tier {user.tier}"
            await _audit(transaction, user.user_id, actor, "create_user", detail=detail)

    async def email_of(self, user_id: str) -> str | None:
        """The e-mail address of a user."""
        async with self._database.transaction(user_id) as transaction:
            email: str | None = await transaction.value("SELECT email FROM auth.users WHERE user_id = $1", user_id)
            return email

    async def open_session(self, user_id: str, opening: sessions.Opening) -> tokens.Session:
        """Add a session with its first refresh token; store the new hash of the password if there is one."""
        async with self._database.transaction(user_id) as transaction:
            remaining_s = await transaction.value(
                "INSERT INTO auth.sessions (session_id, user_id, device, expires_at) VALUES ($1, $2, $3, now() + $4)"
                " RETURNING extract(epoch FROM expires_at - now())::bigint",
                opening.session_id, user_id, opening.device, opening.absolute,
            )  # fmt: skip
            await transaction.execute(
                "INSERT INTO auth.refresh_tokens (token_digest, session_id, user_id, expires_at) VALUES ($1, $2, $3, now() + $4)",
                opening.refresh_digest, opening.session_id, user_id, opening.idle,
            )  # fmt: skip
            if opening.rehashed is not None:
                await transaction.execute("UPDATE auth.users SET password_hash = $2 WHERE user_id = $1", user_id, opening.rehashed)
            await _audit(transaction, user_id, f"user:{user_id}", "login", detail=f"session {opening.session_id}")
        return tokens.Session(opening.session_id, remaining_s)

    async def end_session(self, user_id: str, session_id: str, reason: str, actor: str) -> revocations.Revocation | None:
        """End a session and withdraw its tokens; None when it has ended before."""
        async with self._database.transaction(user_id) as transaction:
            revoked_at = await transaction.value(
                "WITH ended AS (UPDATE auth.sessions SET ended_at = now(), end_reason = $3"
                " WHERE session_id = $1 AND user_id = $2 AND ended_at IS NULL RETURNING session_id)"
                " INSERT INTO auth.revocations (session_id) SELECT session_id FROM ended RETURNING revoked_at",
                session_id, user_id, reason,
            )  # fmt: skip
            outcome = "ok" if revoked_at is not None else "had ended"
            await _audit(transaction, user_id, actor, "end_session", outcome, f"{reason}; session {session_id}")
        return revocations.Revocation(session_id, revoked_at) if revoked_at is not None else None

    async def signing_keys(self) -> list[keys.SigningKey]:
        """Own keys: next, current, and those retired so lately that their tokens may still live."""
        async with self._database.transaction() as transaction:
            rows = await transaction.fetch(
                "SELECT kid, state, public_key, wrapped, now() - coalesce(activated_at, now()) AS age FROM auth.signing_keys"
                " WHERE retired_at IS NULL OR retired_at > now() - $1::interval ORDER BY created_at, kid",
                _RETIRED_SHOWN,
            )  # fmt: skip
        return [keys.SigningKey(row["kid"], row["state"], row["public_key"], row["wrapped"], row["age"]) for row in rows]

    async def add_first_keys(self, current: keys.SigningKey, following: keys.SigningKey) -> None:
        """Add two keys unless there are keys."""
        async with self._database.transaction() as transaction:
            await transaction.execute(_KEYS_LOCK)
            if await transaction.value("SELECT EXISTS (SELECT FROM auth.signing_keys WHERE state = 'current')"):
                return
            for key in (current, following):
                await transaction.execute(_INSERT_KEY, key.kid, key.state, key.public_key, key.wrapped)
            await transaction.execute("UPDATE auth.signing_keys SET activated_at = now() WHERE kid = $1", current.kid)

    async def rotate_keys(self, current_kid: str, following: keys.SigningKey) -> bool:
        """Retire the current key and forget its private part, activate the next, add a new next. False when it is not current."""
        async with self._database.transaction() as transaction:
            await transaction.execute(_KEYS_LOCK)
            retired = await transaction.value(
                "UPDATE auth.signing_keys SET state = 'retired', retired_at = now(), wrapped = NULL"
                " WHERE kid = $1 AND state = 'current' RETURNING kid",
                current_kid,
            )
            if retired is None:
                return False
            await transaction.execute("UPDATE auth.signing_keys SET state = 'current', activated_at = now() WHERE state = 'next'")
            await transaction.execute(_INSERT_KEY, following.kid, following.state, following.public_key, following.wrapped)
            await _audit(transaction, None, "auth", "rotate_keys", detail=f"retired {current_kid}")
        return True

    async def published_keys(self) -> list[keys.PublishedKey]:
        """The keys of other services."""
        async with self._database.transaction() as transaction:
            rows = await transaction.fetch("SELECT issuer, kid, public_key FROM auth.published_keys ORDER BY issuer, published_at, kid")
        return [keys.PublishedKey(row["issuer"], row["kid"], row["public_key"]) for row in rows]

    async def publish_key(self, issuer: str, kid: str, public_key: bytes) -> bool:
        """Add a key of another service. False when the id stands for another key."""
        async with self._database.transaction() as transaction:
            added = await transaction.value(
                "INSERT INTO auth.published_keys (issuer, kid, public_key) VALUES ($1, $2, $3) ON CONFLICT DO NOTHING RETURNING kid",
                issuer, kid, public_key,
            )  # fmt: skip
            if added is not None:
                await _audit(transaction, None, f"service:{issuer}", "publish_key", detail=f"kid {kid}")
                return True
            known = await transaction.value("SELECT public_key FROM auth.published_keys WHERE issuer = $1 AND kid = $2", issuer, kid)
        return bool(known == public_key)
