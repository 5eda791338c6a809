"""Passwords set anew: by the user, who knows the present one, or with a reset token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Protocol

from chassis import audit, identity
from netra import errors, ids
from services.auth import callers, opaque, passwords, revocations, throttle, users

_LIFETIME = timedelta(hours=1)


@dataclass(frozen=True, slots=True)
class Setting:
    """A new password, and by what right: the present one (`verified`) or a reset token (`reset_digest`)."""

    password_hash: str
    verified: str | None = None
    reset_digest: bytes | None = None
    # the session that goes on; the others end
    but: str = ""
    cancel_runs: bool = False


@dataclass(frozen=True, slots=True)
class Ended:
    """How many sessions ended with a password, and what to tell."""

    sessions: int
    told: Sequence[revocations.Revocation]


class Kept(Protocol):
    """Where the passwords and reset tokens of one user are kept."""

    async def password_hash(self, user_id: str) -> str | None:
        """The user's password hash, if they have a password."""
        ...

    async def add_reset(self, user_id: str, tenant_id: str, invitation: users.Invitation, actor: str) -> datetime | None:
        """Add a reset token in place of earlier ones; when it ends. None when there is no such user in the tenant, or disabled."""
        ...

    async def reset_issuer(self, user_id: str, token_digest: bytes) -> str | None:
        """The administrator who made a reset token; None when nobody did."""
        ...

    async def set_password(self, user_id: str, setting: Setting) -> Ended | None:
        """Set a password, use up what it was set with, end sessions. None when the right to do so is gone by now."""
        ...


class Known(Protocol):
    """Where reset tokens are found without knowing whose they are."""

    async def reset_user(self, token_digest: bytes) -> str | None:
        """The user of a reset token that can be used."""
        ...

    async def audit(self, user_id: str | None, action: str, outcome: str, detail: str) -> None:
        """Add a line about somebody who did not prove who they are."""
        ...


class Reach(Protocol):
    """Who may do what to whom."""

    async def reaches(self, admin_id: str, user_id: str) -> bool:
        """Whether an administrator may do to a user, now, what they did before."""
        ...


class Resets:
    """Sets passwords."""

    def __init__(
        self, rows: Kept, system: Known, hashing: passwords.Passwords, told: users.Told, slowed: throttle.Throttle
    ) -> None:  # fmt: skip
        self._rows, self._system, self._hashing, self._told, self._throttle = rows, system, hashing, told, slowed

    async def token(self, admin: identity.Principal, user_id: str) -> tuple[str, datetime]:
        """A reset token for a user of the administrator's tenant, and when it ends. Raises `NotFound`."""
        made = opaque.new(opaque.RESET)
        invitation = users.Invitation(opaque.digest(made), _LIFETIME, admin.user_id)
        ends_at = await self._rows.add_reset(
            ids.UserId(user_id), admin.tenant_id, invitation, audit.actor(identity.Caller(principal=admin))
        )  # fmt: skip
        if ends_at is None:
            raise errors.NotFound("There is no such user, or they are disabled.", field="user_id")
        return made, ends_at

    async def reset(self, token: str, new_password: str, origin: callers.Origin, reach: Reach) -> None:
        """Set a password with a token, once, and end all sessions. Raises `Unauthenticated`, `InvalidPayload`, `RateLimited`."""
        passwords.check(new_password, "new_password")
        await self._throttle.called("reset", origin)
        found = opaque.digest(token)
        user_id = await self._system.reset_user(found) if opaque.looks_like(opaque.RESET, token) else None
        if user_id is None or not await self._is_vouched_for(user_id, found, reach):
            await self._throttle.wrong(throttle.unguessable("reset", origin))
            raise _spent()
        await self._throttle.succeeded("reset", user_id)
        ended = await self._rows.set_password(user_id, Setting(await self._hashing.hash(new_password), reset_digest=found))
        if ended is None:
            raise _spent()
        await self._told.withdraw(ended.told)

    async def change(self, principal: identity.Principal, current: str, new_password: str, *, cancel_runs: bool) -> int:
        """Set the user's password and end their other sessions; how many that were.

        Raises `InvalidPayload` naming the password that is wrong, `RateLimited`.
        """
        passwords.check(new_password, "new_password")
        verified = await self._verified(principal, current)
        setting = Setting(
            await self._hashing.hash(new_password), verified=verified, but=principal.session_id, cancel_runs=cancel_runs
        )  # fmt: skip
        ended = await self._rows.set_password(principal.user_id, setting)
        if ended is None:
            raise _wrong()
        await self._told.withdraw(ended.told)
        return ended.sessions

    async def _is_vouched_for(self, user_id: str, token_digest: bytes, reach: Reach) -> bool:
        issuer = await self._rows.reset_issuer(user_id, token_digest)
        return issuer is None or await reach.reaches(issuer, user_id)

    async def _verified(self, principal: identity.Principal, current: str) -> str:
        stored = await self._rows.password_hash(principal.user_id)
        async with self._throttle.guess(throttle.password_check(principal.user_id)) as attempt:
            if not await self._hashing.verify(stored, current) or stored is None:
                attempt.failed()
                await self._system.audit(principal.user_id, "change_password", "refused", "wrong password")
                raise _wrong()
        return stored


def _wrong() -> errors.InvalidPayload:
    return errors.InvalidPayload("current_password is not your present password", field="current_password")


def _spent() -> errors.Unauthenticated:
    return errors.Unauthenticated("The reset token is not valid any more. Ask for another one.")
