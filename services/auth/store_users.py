"""SQL for users as administrators see and change them: one user at a time, of the administrator's tenant."""

from __future__ import annotations

from collections.abc import Sequence

from chassis import postgres
from services.auth import endings, trail, users

_COLUMNS = "user_id, tenant_id, email, roles, tier, version, created_at, disabled_at"


class UserStore:
    """Statements of the role `netra_auth`: row-level security shows one user at a time."""

    def __init__(self, database: postgres.DatabaseManager) -> None:
        self._database = database

    async def create_user(
        self, user: users.User, email: str, password_hash: str | None, invitation: users.Invitation | None, actor: str,
        person: users.Identity | None = None,
    ) -> None:  # fmt: skip
        """Add a user, and who they are at an outside provider. Raises `Conflict` when the e-mail or the person is taken."""
        query = (
            "INSERT INTO auth.users (user_id, tenant_id, email, roles, tier, version, password_hash) VALUES ($1, $2, $3, $4, $5, $6, $7)"
        )
        async with self._database.transaction(user.user_id) as transaction:
            await transaction.execute(
                query, user.user_id, user.tenant_id, email, list(user.roles), user.tier, user.version, password_hash
            )  # fmt: skip
            if invitation is not None:
                await transaction.execute(
                    "INSERT INTO auth.reset_tokens (token_digest, user_id, created_by, expires_at) VALUES ($1, $2, $3, now() + $4)",
                    invitation.token_digest, user.user_id, invitation.issuer, invitation.lifetime,
                )  # fmt: skip
            if person is not None:
                await transaction.execute(
                    "INSERT INTO auth.identities (provider, subject, user_id, email) VALUES ($1, $2, $3, $4)",
                    person.provider, person.subject, user.user_id, person.email,
                )  # fmt: skip
            begins = "invited" if invitation is not None else f"oidc:{person.provider}" if person is not None else "with a password"
            detail = f"roles {','.join(user.roles)}; tier {user.tier}; {begins}"
            await trail.append(transaction, user.user_id, actor, "create_user", detail=detail)

    async def email_of(self, user_id: str) -> str | None:
        """The e-mail address of a user."""
        async with self._database.transaction(user_id) as transaction:
            email: str | None = await transaction.value("SELECT email FROM auth.users WHERE user_id = $1", user_id)
            return email

    async def profile(self, user_id: str, tenant_id: str, actor: str) -> users.Profile | None:
        """One user; the read is recorded when there is an actor."""
        async with self._database.transaction(user_id) as transaction:
            row = await transaction.row(f"SELECT {_COLUMNS} FROM auth.users WHERE user_id = $1 AND tenant_id = $2", user_id, tenant_id)
            if row is not None and actor:
                await trail.append(transaction, user_id, actor, "get_user")
        return _profile(row) if row is not None else None

    async def known(self, user_id: str) -> users.Profile | None:
        """One user of whatever tenant."""
        async with self._database.transaction(user_id) as transaction:
            row = await transaction.row(f"SELECT {_COLUMNS} FROM auth.users WHERE user_id = $1", user_id)
        return _profile(row) if row is not None else None

    async def change_user(
        self, before: users.User, roles: Sequence[str], tier: str, *, ends_sessions: bool, actor: str
    ) -> users.Changed | None:
        """Set roles and tier, end reset tokens; None when the user is not as before any more."""
        async with self._database.transaction(before.user_id) as transaction:
            row = await transaction.row(
                "UPDATE auth.users SET roles = $4, tier = $5, version = version + 1"
                f" WHERE user_id = $1 AND tenant_id = $2 AND version = $3 RETURNING {_COLUMNS}",
                before.user_id, before.tenant_id, before.version, list(roles), tier,
            )  # fmt: skip
            if row is None:
                return None
            # whoever made them may not have been allowed to for a user like this
            await transaction.execute("DELETE FROM auth.reset_tokens WHERE user_id = $1", before.user_id)
            ended = await endings.end_sessions(transaction, before.user_id, "fewer rights") if ends_sessions else []
            detail = f"roles {','.join(before.roles)} -> {','.join(roles)}; tier {before.tier} -> {tier}; {len(ended)} sessions ended"
            told = [*ended, await endings.tell_rights(transaction, before.user_id, roles, tier)]
            await trail.append(transaction, before.user_id, actor, "update_user", detail=detail)
        return users.Changed(_profile(row), told)

    async def disable_user(self, user_id: str, tenant_id: str, reason: str, actor: str) -> users.Changed | None:
        """Stop a user: sessions, API keys, reset tokens and sign-ins under way end. Once is enough."""
        async with self._database.transaction(user_id) as transaction:
            row = await transaction.row(
                "UPDATE auth.users SET disabled_at = now()"
                f" WHERE user_id = $1 AND tenant_id = $2 AND disabled_at IS NULL RETURNING {_COLUMNS}",
                user_id, tenant_id,
            )  # fmt: skip
            if row is None:
                return await self._as_it_is(transaction, user_id, tenant_id)
            await transaction.execute("DELETE FROM auth.reset_tokens WHERE user_id = $1", user_id)
            await transaction.execute("DELETE FROM auth.login_codes WHERE user_id = $1", user_id)
            ended = await endings.end_sessions(transaction, user_id, "disabled", security=True)
            withdrawn = await endings.withdraw_user(transaction, user_id, security=True)
            await trail.append(transaction, user_id, actor, "disable_user", detail=f"{len(ended)} sessions ended; {reason}")
        return users.Changed(_profile(row), [withdrawn, *ended])

    async def enable_user(self, user_id: str, tenant_id: str, actor: str) -> users.Changed | None:
        """Let a user sign in again."""
        async with self._database.transaction(user_id) as transaction:
            row = await transaction.row(
                "UPDATE auth.users SET disabled_at = NULL"
                f" WHERE user_id = $1 AND tenant_id = $2 AND disabled_at IS NOT NULL RETURNING {_COLUMNS}",
                user_id, tenant_id,
            )  # fmt: skip
            if row is None:
                return await self._as_it_is(transaction, user_id, tenant_id)
            await trail.append(transaction, user_id, actor, "enable_user")
        return users.Changed(_profile(row))

    async def _as_it_is(self, transaction: postgres.Transaction, user_id: str, tenant_id: str) -> users.Changed | None:
        row = await transaction.row(f"SELECT {_COLUMNS} FROM auth.users WHERE user_id = $1 AND tenant_id = $2", user_id, tenant_id)
        return users.Changed(_profile(row)) if row is not None else None


def _profile(row: postgres.Row) -> users.Profile:
    user = users.User(str(row["user_id"]), str(row["tenant_id"]), tuple(row["roles"]), row["tier"], row["version"])
    return users.Profile(user, row["email"], row["created_at"], row["disabled_at"])
