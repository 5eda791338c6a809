"""The statements of API keys and outside sign-in that cross users: nobody is known yet."""

from __future__ import annotations

from datetime import timedelta

from chassis import postgres
from services.auth import api_keys, outside, tokens, trail, users

_USER = "u.user_id, u.tenant_id, u.roles, u.tier, u.version, u.password_hash, u.disabled_at IS NOT NULL AS disabled"


class OutsideStore:
    """Statements of the role `netra_auth_system`, which sees all users but only the columns granted to it."""

    def __init__(self, database: postgres.DatabaseManager) -> None:
        self._database = database

    async def by_key(self, secret_digest: bytes, address: str) -> api_keys.Found | None:
        """The key, when it and its session are in force; notes that it was used, once a minute."""
        async with self._database.transaction() as transaction:
            row = await transaction.row(
                f"SELECT {_USER}, k.key_id, k.scopes, k.session_id,"
                " extract(epoch FROM least(s.expires_at, k.expires_at) - now())::bigint AS remaining_s,"
                " coalesce(k.last_used_at < now() - interval '1 minute', true) AS due"
                " FROM auth.api_keys AS k JOIN auth.sessions AS s USING (session_id) JOIN auth.users AS u ON u.user_id = k.user_id"
                " WHERE k.secret_digest = $1 AND k.expires_at > now() AND s.expires_at > now() AND s.ended_at IS NULL",
                secret_digest,
            )
            if row is None:
                return None
            if row["due"] and not row["disabled"]:
                await transaction.execute("UPDATE auth.api_keys SET last_used_at = now() WHERE key_id = $1", row["key_id"])
                await transaction.execute(
                    "UPDATE auth.sessions SET last_used_at = now(), address = $2 WHERE session_id = $1", row["session_id"], address
                )
        return api_keys.Found(_account(row), tokens.Session(str(row["session_id"]), row["remaining_s"]), tuple(row["scopes"]))

    async def add_attempt(self, attempt: outside.Attempt, life: timedelta) -> None:
        """Keep a sign-in that begins."""
        async with self._database.transaction() as transaction:
            await transaction.execute(
                "INSERT INTO auth.oidc_attempts (state_digest, binding_digest, provider, nonce, code_verifier, redirect_uri, callback_uri,"
                " code_challenge, expires_at) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, now() + $9)",
                attempt.state_digest, attempt.binding_digest, attempt.provider, attempt.nonce, attempt.code_verifier,
                attempt.redirect_uri, attempt.callback_uri, attempt.code_challenge, life,
            )  # fmt: skip

    async def take_attempt(self, state_digest: bytes) -> outside.Attempt | None:
        """A sign-in under way, which nobody can take again."""
        async with self._database.transaction() as transaction:
            row = await transaction.row(
                "DELETE FROM auth.oidc_attempts WHERE state_digest = $1 RETURNING binding_digest, provider, nonce, code_verifier,"
                " redirect_uri, callback_uri, code_challenge, expires_at > now() AS lives",
                state_digest,
            )
        if row is None or not row["lives"]:
            return None
        return outside.Attempt(
            state_digest,
            row["binding_digest"],
            row["provider"],
            row["nonce"],
            row["code_verifier"],
            row["redirect_uri"],
            row["callback_uri"],
            row["code_challenge"],
        )

    async def by_identity(self, provider: str, subject: str) -> users.Account | None:
        """The user that a person of a provider is."""
        async with self._database.transaction() as transaction:
            row = await transaction.row(
                "WITH known AS (UPDATE auth.identities SET last_used_at = now() WHERE provider = $1 AND subject = $2 RETURNING user_id)"
                f" SELECT {_USER} FROM auth.users AS u JOIN known USING (user_id)",
                provider, subject,
            )  # fmt: skip
        return _account(row) if row is not None else None

    async def by_email(self, email: str) -> users.Account | None:
        """The user who has this address."""
        async with self._database.transaction() as transaction:
            row = await transaction.row(f"SELECT {_USER} FROM auth.users AS u WHERE u.email = $1", email)
        return _account(row) if row is not None else None

    async def link(self, person: users.Identity, user_id: str) -> None:
        """From now on the person is that user. Raises `Conflict` when they became one meanwhile."""
        async with self._database.transaction() as transaction:
            await transaction.execute(
                "INSERT INTO auth.identities (provider, subject, user_id, email) VALUES ($1, $2, $3, $4)",
                person.provider, person.subject, user_id, person.email,
            )  # fmt: skip
            await trail.append(transaction, user_id, "auth", "link_identity", detail=f"oidc:{person.provider}")

    async def add_code(self, code: outside.Code, life: timedelta) -> None:
        """Keep a one-time code."""
        async with self._database.transaction() as transaction:
            await transaction.execute(
                "INSERT INTO auth.login_codes (code_digest, bound_to, user_id, method, device, expires_at)"
                " VALUES ($1, $2, $3, $4, $5, now() + $6)",
                code.digest, code.bound_to, code.user_id, code.method, code.device, life,
            )  # fmt: skip

    async def redeem_code(self, digest: bytes) -> outside.Redeemed | None:
        """What a one-time code is good for: once, while it lives."""
        async with self._database.transaction() as transaction:
            row = await transaction.row(
                "WITH used AS (UPDATE auth.login_codes SET used_at = now()"
                " WHERE code_digest = $1 AND used_at IS NULL AND expires_at > now() RETURNING user_id, method, device, bound_to)"
                f" SELECT {_USER}, used.method, used.device, used.bound_to FROM used JOIN auth.users AS u ON u.user_id = used.user_id",
                digest,
            )
        if row is None:
            return None
        code = outside.Code(digest, row["bound_to"], str(row["user_id"]), row["method"], row["device"])
        return outside.Redeemed(_account(row), code)

    async def audit(self, user_id: str | None, action: str, outcome: str, detail: str, actor: str = "anonymous") -> None:
        """Add a line about somebody who is not signed in."""
        async with self._database.transaction() as transaction:
            await trail.append(transaction, user_id, actor, action, outcome, detail)


def _account(row: postgres.Row) -> users.Account:
    user = users.User(str(row["user_id"]), str(row["tenant_id"]), tuple(row["roles"]), row["tier"], row["version"])
    return users.Account(user, row["password_hash"], row["disabled"])
