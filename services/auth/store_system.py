"""The statements that cross users: login by e-mail, rotation of refresh tokens, revocations for all, lists of a tenant, sweeping."""

from __future__ import annotations

from datetime import datetime, timedelta

from chassis import postgres
from services.auth import revocations, sessions, tokens, trail, users

# kept a day beyond their end, so that a late reuse is still noticed
_SWEPT_AFTER = timedelta(days=1)
_SESSIONS_KEPT = timedelta(days=30)
_DEVICES_KEPT = timedelta(days=30)
# how long after its use a refresh token may be brought again: the answer may have been lost
_GRACE = timedelta(seconds=10)
_USER = "u.user_id, u.tenant_id, u.roles, u.tier, u.version"
_LIVE = "s.ended_at IS NULL AND s.expires_at > now() AND s.idle_until > now() AND u.disabled_at IS NULL"
_ROTATE = f"""
WITH used AS (
    UPDATE auth.refresh_tokens AS t SET used_at = now() FROM auth.sessions AS s, auth.users AS u
    WHERE t.token_digest = $1 AND t.used_at IS NULL AND t.expires_at > now()
      AND s.session_id = t.session_id AND u.user_id = t.user_id AND {_LIVE}
    RETURNING t.session_id, {_USER}, least(now() + s.idle, s.expires_at) AS idle_until),
child AS (
    INSERT INTO auth.refresh_tokens (token_digest, session_id, user_id, expires_at) SELECT $2, session_id, user_id, idle_until FROM used),
touched AS (
    UPDATE auth.sessions AS s SET last_used_at = now(), idle_until = used.idle_until, address = coalesce(NULLIF($3, ''), s.address)
    FROM used WHERE s.session_id = used.session_id)
SELECT session_id, user_id, tenant_id, roles, tier, version, floor(extract(epoch FROM idle_until - now()))::bigint AS remaining_s FROM used
"""
_AGAIN = f"""
SELECT s.session_id, {_USER}, floor(extract(epoch FROM least(s.idle_until, s.expires_at) - now()))::bigint AS remaining_s
FROM auth.refresh_tokens AS t
JOIN auth.refresh_tokens AS child ON child.token_digest = $2 AND child.session_id = t.session_id
JOIN auth.sessions AS s ON s.session_id = t.session_id
JOIN auth.users AS u ON u.user_id = t.user_id
WHERE t.token_digest = $1 AND t.used_at > now() - $3::interval AND child.used_at IS NULL AND child.expires_at > now() AND {_LIVE}
"""
_BY_EMAIL = f"""
SELECT {_USER}, u.password_hash, u.disabled_at IS NOT NULL AS disabled,
    ARRAY(SELECT d.device_digest FROM auth.known_devices AS d WHERE d.user_id = u.user_id AND d.device_digest = ANY($2)
          AND d.last_used_at > now() - $3::interval) AS marks
FROM auth.users AS u WHERE u.email = $1
"""
# table, its key, since when a row matters to nobody any more, and how long it is kept after that
_SWEEP = (
    ("refresh_tokens", "token_digest", "expires_at", _SWEPT_AFTER),
    ("revocations", "revocation_id", "revoked_at", _SWEPT_AFTER),
    # with them go API keys, of which each has one
    ("sessions", "session_id", "least(expires_at, ended_at)", _SESSIONS_KEPT),
    ("known_devices", "user_id, device_digest", "last_used_at", _DEVICES_KEPT),
    ("reset_tokens", "token_digest", "expires_at", _SWEPT_AFTER),
    ("login_codes", "code_digest", "expires_at", timedelta()),
    ("oidc_attempts", "state_digest", "expires_at", timedelta()),
)
_SWEPT_AT_ONCE = 1_000


class SystemStore:
    """Statements of the role `netra_auth_system`, which sees all users but only the columns granted to it."""

    def __init__(self, database: postgres.DatabaseManager) -> None:
        self._database = database

    async def by_email(self, email: str, device: bytes = b"", address: bytes = b"") -> users.Account | None:
        """The user who signs in with this address, and whether they did before from this device or network address."""
        async with self._database.transaction() as transaction:
            row = await transaction.row(_BY_EMAIL, email, [device, address], _DEVICES_KEPT)
        if row is None:
            return None
        known = "device" if device in row["marks"] else "address" if address in row["marks"] else ""
        return users.Account(_user(row), row["password_hash"], row["disabled"], known)

    async def rotate(self, used: bytes, child: bytes, address: str) -> sessions.Renewed | None:
        """Use up a refresh token and add its child: of many that try at once, one succeeds."""
        async with self._database.transaction() as transaction:
            return _renewed(await transaction.row(_ROTATE, used, child, address))

    async def renewed_again(self, used: bytes, child: bytes) -> sessions.Renewed | None:
        """The same for a token that was used a moment ago, while its child has not been."""
        async with self._database.transaction() as transaction:
            return _renewed(await transaction.row(_AGAIN, used, child, _GRACE))

    async def used_before(self, digest: bytes) -> sessions.Reused | None:
        """Whose refresh token this was, if it has been used."""
        async with self._database.transaction() as transaction:
            row = await transaction.row(
                "SELECT user_id, session_id FROM auth.refresh_tokens WHERE token_digest = $1 AND used_at IS NOT NULL", digest
            )
        return sessions.Reused(str(row["user_id"]), str(row["session_id"])) if row is not None else None

    async def reset_user(self, token_digest: bytes) -> str | None:
        """The user of a reset token that can be used."""
        async with self._database.transaction() as transaction:
            found = await transaction.value(
                "SELECT user_id FROM auth.reset_tokens WHERE token_digest = $1 AND expires_at > now()", token_digest
            )
        return str(found) if found is not None else None

    async def resolved(self, tenant_id: str, user_id: str | None, email: str | None) -> str | None:
        """The active user of a tenant with this id or e-mail address."""
        column, wanted = ("user_id", user_id) if user_id is not None else ("email", email)
        # one row by a unique index, and then a look at it: it takes as long for a foreign or disabled user as for one that is not there
        query = f"SELECT user_id, tenant_id = $2 AND disabled_at IS NULL AS fits FROM auth.users WHERE {column} = $1"
        async with self._database.transaction() as transaction:
            row = await transaction.row(query, wanted, tenant_id)
        return str(row["user_id"]) if row is not None and row["fits"] else None

    async def users(self, tenant_id: str, *, before: str, most: int, contains: str, actor: str) -> list[users.Profile]:
        """Users of a tenant, newest first, older than the user `before`; the read is recorded."""
        query = (
            "SELECT user_id, tenant_id, email, roles, tier, version, created_at, disabled_at FROM auth.users WHERE tenant_id = $1"
            " AND ($2 = '' OR user_id < NULLIF($2, '')::uuid) AND position($3 IN email) > 0 ORDER BY user_id DESC LIMIT $4"
        )
        async with self._database.transaction() as transaction:
            rows = await transaction.fetch(query, tenant_id, before, contains, most)
            await trail.append(transaction, None, actor, "list_users", detail=f"{len(rows)} users", tenant_id=tenant_id)
        return [users.Profile(_user(row), row["email"], row["created_at"], row["disabled_at"]) for row in rows]

    async def revocations(self, since: datetime | None, kept: timedelta) -> tuple[list[revocations.Revocation], datetime]:
        """What was withdrawn after `since` (or within `kept`), and the time of the database at which this was true."""
        query = (
            "SELECT session_id, user_id, revoked_at, security, roles, tier FROM auth.revocations"
            " WHERE revoked_at > $1 ORDER BY revoked_at"
        )  # fmt: skip
        async with self._database.transaction() as transaction:
            read_at: datetime = await transaction.value("SELECT now()")
            rows = await transaction.fetch(query, since or read_at - kept)
        return [_revocation(row) for row in rows], read_at

    async def audit(self, user_id: str | None, action: str, outcome: str, detail: str) -> None:
        """Add a line about somebody who is not signed in."""
        async with self._database.transaction() as transaction:
            await trail.append(transaction, user_id, "anonymous", action, outcome, detail)

    async def sweep(self) -> None:
        """Delete what can matter to nobody any more, little by little."""
        for table, key, over, kept in _SWEEP:
            query = (
                f"DELETE FROM auth.{table} WHERE ({key}) IN (SELECT {key} FROM auth.{table} WHERE {over} < now() - $1::interval LIMIT $2)"
            )
            while await self._swept(query, kept) == _SWEPT_AT_ONCE:
                pass

    async def _swept(self, query: str, kept: timedelta) -> int:
        async with self._database.transaction() as transaction:
            return int((await transaction.execute(query, kept, _SWEPT_AT_ONCE)).rpartition(" ")[2])


def _user(row: postgres.Row) -> users.User:
    return users.User(str(row["user_id"]), str(row["tenant_id"]), tuple(row["roles"]), row["tier"], row["version"])


def _renewed(row: postgres.Row | None) -> sessions.Renewed | None:
    return sessions.Renewed(_user(row), tokens.Session(str(row["session_id"]), row["remaining_s"])) if row is not None else None


def _revocation(row: postgres.Row) -> revocations.Revocation:
    return revocations.Revocation(
        str(row["session_id"] or ""), row["revoked_at"], str(row["user_id"] or ""), row["security"],
        tuple(row["roles"] or ()), row["tier"] or "",
    )  # fmt: skip
