"""The statements that cross users: login by e-mail, rotation of refresh tokens, revocations for all."""

from __future__ import annotations

from datetime import datetime, timedelta

from chassis import postgres
from services.auth import revocations, sessions, tokens, users

# kept a day beyond their end, so that a late reuse is still noticed
_SWEPT_AFTER = timedelta(days=1)
_AUDIT = "INSERT INTO auth.audit (user_id, actor, action, outcome, detail) VALUES ($1, 'anonymous', $2, $3, $4)"


class SystemStore:
    """Statements of the role `netra_auth_system`, which sees all users but only the columns granted to it."""

    def __init__(self, database: postgres.DatabaseManager) -> None:
        self._database = database

    async def by_email(self, email: str) -> users.Account | None:
        """The user who signs in with this address."""
        async with self._database.transaction() as transaction:
            row = await transaction.row(
                "SELECT user_id, tenant_id, roles, tier, version, password_hash, disabled_at IS NOT NULL AS disabled"
                " FROM auth.users WHERE email = $1",
                email,
            )
        return users.Account(_user(row), row["password_hash"], row["disabled"]) if row is not None else None

    async def rotate(self, used: bytes, child: bytes, idle: timedelta) -> sessions.Renewed | None:
        """Use up a refresh token and add its child: of many that try at once, one succeeds."""
        async with self._database.transaction() as transaction:
            row = await transaction.row(
                "WITH used AS (UPDATE auth.refresh_tokens AS t SET used_at = now() FROM auth.sessions AS s, auth.users AS u"
                " WHERE t.token_digest = $1 AND t.used_at IS NULL AND t.expires_at > now()"
                " AND s.session_id = t.session_id AND s.ended_at IS NULL AND s.expires_at > now()"
                " AND u.user_id = t.user_id AND u.disabled_at IS NULL"
                " RETURNING t.session_id, u.user_id, u.tenant_id, u.roles, u.tier, u.version,"
                " extract(epoch FROM s.expires_at - now())::bigint AS remaining_s),"
                " child AS (INSERT INTO auth.refresh_tokens (token_digest, session_id, user_id, expires_at)"
                " SELECT $2, session_id, user_id, now() + $3 FROM used),"
                " touched AS (UPDATE auth.sessions AS s SET last_used_at = now() FROM used WHERE s.session_id = used.session_id)"
                " SELECT session_id, user_id, tenant_id, roles, tier, version, remaining_s FROM used",
                used, child, idle,
            )  # fmt: skip
        return sessions.Renewed(_user(row), tokens.Session(str(row["session_id"]), row["remaining_s"])) if row is not None else None

    async def used_before(self, digest: bytes) -> sessions.Reused | None:
        """Whose refresh token this was, if it has been used."""
        async with self._database.transaction() as transaction:
            row = await transaction.row(
                "SELECT user_id, session_id FROM auth.refresh_tokens WHERE token_digest = $1 AND used_at IS NOT NULL", digest
            )
        return sessions.Reused(str(row["user_id"]), str(row["session_id"])) if row is not None else None

    async def revocations(self, since: datetime | None, kept: timedelta) -> tuple[list[revocations.Revocation], datetime]:
        """Sessions ended after `since` (or within `kept`), and the time of the database at which this was true."""
        async with self._database.transaction() as transaction:
            read_at: datetime = await transaction.value("SELECT now()")
            rows = await transaction.fetch(
                "SELECT session_id, revoked_at FROM auth.revocations WHERE revoked_at > $1 ORDER BY revoked_at", since or read_at - kept
            )
        return [revocations.Revocation(str(row["session_id"]), row["revoked_at"]) for row in rows], read_at

    async def audit(self, user_id: str | None, action: str, outcome: str, detail: str) -> None:
        """Add a line about somebody who is not signed in."""
        async with self._database.transaction() as transaction:
            await transaction.execute(_AUDIT, user_id, action, outcome, detail)

    async def sweep(self) -> None:
        """Delete what can matter to nobody any more."""
        async with self._database.transaction() as transaction:
            await transaction.execute("DELETE FROM auth.refresh_tokens WHERE expires_at < now() - $1::interval", _SWEPT_AFTER)
            await transaction.execute("DELETE FROM auth.revocations WHERE revoked_at < now() - $1::interval", _SWEPT_AFTER)


def _user(row: postgres.Row) -> users.User:
    return users.User(str(row["user_id"]), str(row["tenant_id"]), tuple(row["roles"]), row["tier"], row["version"])
