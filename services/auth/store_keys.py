"""SQL for signing keys and the published keys of other services."""

from __future__ import annotations

from datetime import timedelta

from chassis import postgres
from services.auth import keys, trail

# after this, no token that a retired key signed is valid any more
_RETIRED_SHOWN = timedelta(hours=2)
_KEYS_LOCK = "SELECT pg_advisory_xact_lock(hashtext('auth.signing_keys'))"
_INSERT_KEY = "INSERT INTO auth.signing_keys (kid, state, public_key, wrapped) VALUES ($1, $2, $3, $4)"


class KeyStore:
    """Statements of the role `netra_auth`; keys are nobody's."""

    def __init__(self, database: postgres.DatabaseManager) -> None:
        self._database = database

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
            await trail.append(transaction, None, "auth", "rotate_keys", detail=f"retired {current_kid}")
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
                await trail.append(transaction, None, f"service:{issuer}", "publish_key", detail=f"kid {kid}")
                return True
            known = await transaction.value("SELECT public_key FROM auth.published_keys WHERE issuer = $1 AND kid = $2", issuer, kid)
        return bool(known == public_key)
