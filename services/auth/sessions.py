"""A login, its refresh family, its expiry and its end."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol

from chassis import identity
from netra import errors, ids
from services.auth import feed, passwords, revocations, tokens, users

_MAX_DEVICE = 200


@dataclass(frozen=True, slots=True)
class Lifetimes:
    """How long a session may lie idle, and how long it lives at most."""

    idle: timedelta
    absolute: timedelta


@dataclass(frozen=True, slots=True)
class Opening:
    """A session to be opened."""

    session_id: str
    device: str
    refresh_digest: bytes
    idle: timedelta
    absolute: timedelta
    rehashed: str | None


@dataclass(frozen=True, slots=True)
class Renewed:
    """What a used refresh token was good for."""

    user: users.User
    session: tokens.Session


@dataclass(frozen=True, slots=True)
class Reused:
    """The session of a refresh token that was used before."""

    user_id: str
    session_id: str


class Kept(Protocol):
    """Where the sessions of one user are kept."""

    async def open_session(self, user_id: str, opening: Opening) -> tokens.Session:
        """Add a session with its first refresh token; store the new hash of the password if there is one."""
        ...

    async def end_session(self, user_id: str, session_id: str, reason: str, actor: str) -> revocations.Revocation | None:
        """End a session and withdraw its tokens; None when it has ended before."""
        ...


class Known(users.Known, Protocol):
    """Where users and sessions are found by what they sign in with."""

    async def rotate(self, used: bytes, child: bytes, idle: timedelta) -> Renewed | None:
        """Use up a refresh token and add its child: of many that try at once, one succeeds."""
        ...

    async def used_before(self, digest: bytes) -> Reused | None:
        """Whose refresh token this was, if it has been used."""
        ...

    async def audit(self, user_id: str | None, action: str, outcome: str, detail: str) -> None:
        """Add a line about somebody who is not signed in."""
        ...


class Sessions:
    """Signs users in and out."""

    def __init__(
        self,
        rows: Kept,
        system: Known,
        hashing: passwords.Passwords,
        issue: tokens.Tokens,
        told: feed.Feed,
        lifetimes: Lifetimes,
    ) -> None:
        self._rows, self._system, self._hashing = rows, system, hashing
        self._issue, self._told, self._lifetimes = issue, told, lifetimes

    async def login(self, email: str, password: str, device: str) -> tokens.Issued:
        """Tokens of a new session. Raises the same `Unauthenticated` whatever was wrong."""
        if len(device) > _MAX_DEVICE or "\0" in device:
            raise errors.InvalidPayload(f"device must be a text of at most {_MAX_DEVICE} characters", field="device")
        address = users.normal_email(email)
        found = await self._system.by_email(address) if address is not None else None
        matched = await self._hashing.verify(found.password_hash if found is not None else None, password)
        if found is None or not matched or found.disabled:
            await self._refuse(found, matched)
            raise errors.Unauthenticated("E-mail or password is wrong.")
        return await self._open(found, password, device)

    async def refresh(self, refresh_token: str) -> tokens.Issued:
        """The next pair. A token that was used before ends its session. Raises `Unauthenticated`."""
        if not tokens.looks_like_refresh(refresh_token):
            raise _no_session()
        used, child = tokens.digest(refresh_token), tokens.new_refresh()
        renewed = await self._system.rotate(used, tokens.digest(child), self._lifetimes.idle)
        if renewed is None:
            await self._end_if_reused(used)
            raise _no_session()
        return self._issue.for_user(renewed.user, renewed.session, child)

    async def end(self, principal: identity.Principal) -> None:
        """End the session everywhere, at once."""
        ended = await self._rows.end_session(principal.user_id, principal.session_id, "logout", f"user:{principal.user_id}")
        if ended is not None:
            await self._told.withdraw(ended)

    async def _open(self, found: users.Account, password: str, device: str) -> tokens.Issued:
        outdated = found.password_hash is not None and self._hashing.outdated(found.password_hash)
        rehashed = await self._hashing.hash(password) if outdated else None
        refresh_token = tokens.new_refresh()
        opening = Opening(
            ids.SessionId.new(), device, tokens.digest(refresh_token), self._lifetimes.idle, self._lifetimes.absolute, rehashed
        )
        session = await self._rows.open_session(found.user.user_id, opening)
        return self._issue.for_user(found.user, session, refresh_token)

    async def _refuse(self, found: users.Account | None, matched: bool) -> None:
        if found is None:
            await self._system.audit(None, "login", "refused", "no such user")
        else:
            reason = "disabled" if matched else "wrong password"
            await self._system.audit(found.user.user_id, "login", "refused", reason)

    async def _end_if_reused(self, used: bytes) -> None:
        reused = await self._system.used_before(used)
        if reused is None:
            return
        ended = await self._rows.end_session(reused.user_id, reused.session_id, "refresh reuse", "auth")
        if ended is not None:
            await self._told.withdraw(ended)


def _no_session() -> errors.Unauthenticated:
    return errors.Unauthenticated("The refresh token is not valid any more. Sign in again.")
