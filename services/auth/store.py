"""SQL for the sessions and passwords of one user."""

from __future__ import annotations

from datetime import datetime, timedelta

from chassis import postgres
from netra import errors
from services.auth import endings, resets, revocations, sessions, tokens, trail, users

_USER = "user_id, tenant_id, roles, tier, version"
_REMEMBER = (
    "INSERT INTO auth.known_devices (user_id, device_digest) SELECT $1, unnest($2::bytea[])"
    " ON CONFLICT (user_id, device_digest) DO UPDATE SET last_used_at = now()"
)


# of a token that was used a moment ago, while its child was not: it was under way when the session ended
_UNDER_WAY = (
    "SELECT EXISTS (SELECT FROM auth.refresh_tokens AS t JOIN auth.refresh_tokens AS child ON child.token_digest = $3"
    " WHERE t.user_id = $1 AND child.user_id = $1 AND t.token_digest = $2 AND t.used_at > now() - $4::interval AND child.used_at IS NULL)"
)
# as long as the same child is given again
_GRACE = timedelta(seconds=10)
# the newest first; as with what ends, a little more than those that live
_OLDER = (
    "SELECT session_id FROM auth.sessions WHERE user_id = $1 AND method <> 'api_key' AND ended_at IS NULL"
    " AND least(expires_at, idle_until) > now() - interval '1 minute' ORDER BY created_at DESC, session_id DESC OFFSET $2"
)


class Store:
    """Statements of the role `netra_auth`: row-level security shows one user at a time."""

    def __init__(self, database: postgres.DatabaseManager) -> None:
        self._database = database

    async def open_session(self, user_id: str, opening: sessions.Opening) -> sessions.Opened | None:
        """Add a session with its first refresh token; None when the user was disabled, or their password changed, meanwhile."""
        async with self._database.transaction(user_id) as transaction:
            # whoever disables the user or sets a password waits for this, or is waited for
            row = await transaction.row(
                f"SELECT {_USER}, password_hash FROM auth.users WHERE user_id = $1 AND disabled_at IS NULL FOR NO KEY UPDATE", user_id
            )
            if row is None or (opening.verified is not None and row["password_hash"] != opening.verified):
                return None
            ended = await self._make_room(transaction, user_id, opening.beside)
            session = await self._insert_session(transaction, user_id, opening)
            if opening.marks:
                await transaction.execute(_REMEMBER, user_id, list(opening.marks))
            if opening.rehashed is not None:
                await transaction.execute("UPDATE auth.users SET password_hash = $2 WHERE user_id = $1", user_id, opening.rehashed)
            detail = f"session {opening.session_id}; {opening.method}; from {opening.origin.address or 'an unknown address'}"
            await trail.append(transaction, user_id, f"user:{user_id}", "login", detail=detail)
            if ended:
                over = f"replaced by session {opening.session_id}; {' '.join(each.session_id for each in ended)}"
                await trail.append(transaction, user_id, "auth", "end_sessions", detail=over)
        return sessions.Opened(_user(row), session, ended)

    async def _make_room(self, transaction: postgres.Transaction, user_id: str, beside: int) -> list[revocations.Revocation]:
        older = await transaction.fetch(_OLDER, user_id, beside)
        if not older:
            return []
        return await endings.end_sessions(transaction, user_id, "replaced", only=[row["session_id"] for row in older])

    async def _insert_session(self, transaction: postgres.Transaction, user_id: str, opening: sessions.Opening) -> tokens.Session:
        remaining_s = await transaction.value(
            "INSERT INTO auth.sessions (session_id, user_id, device, method, address, idle, idle_until, expires_at)"
            " VALUES ($1, $2, $3, $4, $5, $6, now() + least($6::interval, $7), now() + $7)"
            " RETURNING floor(extract(epoch FROM idle_until - now()))::bigint",
            opening.session_id, user_id, opening.origin.device, opening.method, opening.origin.address, opening.idle, opening.absolute,
        )  # fmt: skip
        await transaction.execute(
            "INSERT INTO auth.refresh_tokens (token_digest, session_id, user_id, expires_at)"
            " SELECT $1, session_id, user_id, idle_until FROM auth.sessions WHERE session_id = $2 AND user_id = $3",
            opening.refresh_digest, opening.session_id, user_id,
        )  # fmt: skip
        return tokens.Session(opening.session_id, remaining_s)

    async def sessions(self, user_id: str, most: int) -> list[sessions.Listed]:
        """Live sessions, the most recently used first."""
        async with self._database.transaction(user_id) as transaction:
            rows = await transaction.fetch(
                "SELECT session_id, device, method, address, created_at, last_used_at, expires_at FROM auth.sessions"
                " WHERE user_id = $1 AND ended_at IS NULL AND expires_at > now() AND idle_until > now()"
                " ORDER BY last_used_at DESC, session_id DESC LIMIT $2",
                user_id, most,
            )  # fmt: skip
        return [_listed(row) for row in rows]

    async def end_session(
        self, user_id: str, session_id: str, reason: str, actor: str, *, security: bool = False
    ) -> list[revocations.Revocation]:
        """End a session and withdraw its tokens; nothing when it has ended before. Raises `NotFound`."""
        async with self._database.transaction(user_id) as transaction:
            ended = await endings.end_sessions(transaction, user_id, reason, security=security, only=[session_id])
            if security and not ended:
                return []  # that was told and recorded before, and may be asked for again and again
            if not ended and not await transaction.value(
                "SELECT EXISTS (SELECT FROM auth.sessions WHERE session_id = $1 AND user_id = $2)", session_id, user_id
            ):
                raise errors.NotFound("There is no such session.", field="session_id")
            outcome = "ok" if ended else "had ended"
            await trail.append(transaction, user_id, actor, "end_session", outcome, f"{reason}; session {session_id}")
        return ended

    async def was_under_way(self, user_id: str, used: bytes, child: bytes) -> bool:
        """Whether the same child would be given again, had the session not ended."""
        async with self._database.transaction(user_id) as transaction:
            return bool(await transaction.value(_UNDER_WAY, user_id, used, child, _GRACE))

    async def end_sessions(self, user_id: str, but: str, reason: str, actor: str) -> list[revocations.Revocation]:
        """End all sessions, except for one."""
        async with self._database.transaction(user_id) as transaction:
            ended = await endings.end_sessions(transaction, user_id, reason, but=but)
            await trail.append(transaction, user_id, actor, "end_sessions", detail=f"{reason}; {len(ended)} sessions")
        return ended

    async def password_hash(self, user_id: str) -> str | None:
        """The user's password hash, if they have a password."""
        async with self._database.transaction(user_id) as transaction:
            found: str | None = await transaction.value("SELECT password_hash FROM auth.users WHERE user_id = $1", user_id)
            return found

    async def add_reset(
        self, user_id: str, tenant_id: str, invitation: users.Invitation, actor: str
    ) -> datetime | None:  # fmt: skip
        """Add a reset token in place of earlier ones; when it ends. None when there is no such user in the tenant, or disabled."""
        async with self._database.transaction(user_id) as transaction:
            locked = "SELECT user_id FROM auth.users WHERE user_id = $1 AND tenant_id = $2 AND disabled_at IS NULL FOR NO KEY UPDATE"
            if await transaction.value(locked, user_id, tenant_id) is None:
                return None
            await _forget_resets(transaction, user_id)
            ends_at: datetime = await transaction.value(
                "INSERT INTO auth.reset_tokens (token_digest, user_id, created_by, expires_at) VALUES ($1, $2, $3, now() + $4)"
                " RETURNING expires_at",
                invitation.token_digest, user_id, invitation.issuer, invitation.lifetime,
            )  # fmt: skip
            await trail.append(transaction, user_id, actor, "create_reset_token", detail=f"valid until {ends_at.isoformat()}")
        return ends_at

    async def reset_issuer(self, user_id: str, token_digest: bytes) -> str | None:
        """The administrator who made a reset token; None when nobody did."""
        async with self._database.transaction(user_id) as transaction:
            query = "SELECT created_by FROM auth.reset_tokens WHERE user_id = $1 AND token_digest = $2"
            found: str | None = await transaction.value(query, user_id, token_digest)
            return found

    async def set_password(self, user_id: str, setting: resets.Setting) -> resets.Ended | None:
        """Set a password, use up what it was set with, end sessions. None when the right to do so is gone by now."""
        async with self._database.transaction(user_id) as transaction:
            # of two who bring the same token, the second waits here and finds it gone
            locked = "SELECT password_hash FROM auth.users WHERE user_id = $1 AND disabled_at IS NULL FOR NO KEY UPDATE"
            row = await transaction.row(locked, user_id)
            if row is None or (setting.verified is not None and row["password_hash"] != setting.verified):
                return None
            if setting.reset_digest is not None and not await _spent(transaction, user_id, setting.reset_digest):
                return None
            await transaction.execute("UPDATE auth.users SET password_hash = $2 WHERE user_id = $1", user_id, setting.password_hash)
            await _forget_resets(transaction, user_id)
            await transaction.execute("DELETE FROM auth.login_codes WHERE user_id = $1", user_id)
            action = "change_password" if setting.reset_digest is None else "reset_password"
            reason = action.replace("_", " ") + (", cancel runs" if setting.cancel_runs else "")
            ended = await endings.end_sessions(transaction, user_id, reason, security=setting.cancel_runs, but=setting.but)
            left = await endings.stop_runs(transaction, user_id, reason, but=setting.but) if setting.cancel_runs else []
            await trail.append(transaction, user_id, f"user:{user_id}", action, detail=f"{len(ended)} sessions ended")
        return resets.Ended(len(ended), [*ended, *left])


async def _spent(transaction: postgres.Transaction, user_id: str, token_digest: bytes) -> bool:
    query = "DELETE FROM auth.reset_tokens WHERE user_id = $1 AND token_digest = $2 AND expires_at > now() RETURNING user_id"
    return await transaction.value(query, user_id, token_digest) is not None


async def _forget_resets(transaction: postgres.Transaction, user_id: str) -> None:
    await transaction.execute("DELETE FROM auth.reset_tokens WHERE user_id = $1", user_id)


def _user(row: postgres.Row) -> users.User:
    return users.User(str(row["user_id"]), str(row["tenant_id"]), tuple(row["roles"]), row["tier"], row["version"])


def _listed(row: postgres.Row) -> sessions.Listed:
    return sessions.Listed(
        str(row["session_id"]), row["device"], row["method"], row["address"], row["created_at"], row["last_used_at"], row["expires_at"]
    )
