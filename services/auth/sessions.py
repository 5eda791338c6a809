"""A login, its refresh family, its expiry and its end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Protocol

from chassis import audit, identity, trust
from netra import errors, ids
from services.auth import callers, feed, opaque, passwords, revocations, throttle, tokens, users

_COMMAND_LINE = "netra cli"
PASSWORD = "password"  # noqa: S105 - how a session began
MOST_LISTED = 200


@dataclass(frozen=True, slots=True)
class Lifetimes:
    """How long a session may lie idle, how long it lives at most, how many a user may have; that of a command line lives longer."""

    idle: timedelta
    absolute: timedelta
    command_line: timedelta
    most: int = 100

    def of(self, device: str) -> tuple[timedelta, timedelta]:
        """Idle and absolute, for a device."""
        if device.startswith(_COMMAND_LINE):
            return self.command_line, self.command_line
        return self.idle, self.absolute


@dataclass(frozen=True, slots=True)
class Opening:
    """A session to be opened.

    It is not when the user has another password by now than `verified` (None: none was verified). Of the user's older ones, those
    for which there is no room `beside` it end. `marks` are what the device is recognised by; `rehashed` is the new hash of the same
    password.
    """

    session_id: str
    method: str
    origin: callers.Origin
    refresh_digest: bytes
    idle: timedelta
    absolute: timedelta
    beside: int
    marks: tuple[bytes, ...] = ()
    verified: str | None = None
    rehashed: str | None = None


@dataclass(frozen=True, slots=True)
class Opened:
    """A session that was opened for a user as they are now, and those that it ended."""

    user: users.User
    session: tokens.Session
    ended: Sequence[revocations.Revocation]


@dataclass(frozen=True, slots=True)
class Renewed:
    """What a refresh token was good for."""

    user: users.User
    session: tokens.Session


@dataclass(frozen=True, slots=True)
class Reused:
    """The session of a refresh token that was used before."""

    user_id: str
    session_id: str


@dataclass(frozen=True, slots=True)
class Listed:
    """A session as its user sees it."""

    session_id: str
    device: str
    method: str
    address: str
    created_at: datetime
    last_used_at: datetime
    expires_at: datetime


class Kept(Protocol):
    """Where the sessions of one user are kept."""

    async def open_session(self, user_id: str, opening: Opening) -> Opened | None:
        """Add a session with its first refresh token; None when the user was disabled, or their password changed, meanwhile."""
        ...

    async def sessions(self, user_id: str, most: int) -> list[Listed]:
        """Live sessions, the most recently used first."""
        ...

    async def end_session(
        self, user_id: str, session_id: str, reason: str, actor: str, *, security: bool = False
    ) -> list[revocations.Revocation]:
        """End a session and withdraw its tokens; nothing when it has ended before, unless that was for no reason of security and
        this is one. Raises `NotFound`."""
        ...

    async def was_under_way(self, user_id: str, used: bytes, child: bytes) -> bool:
        """Whether the same child would be given again for a used refresh token, had the session not ended."""
        ...

    async def end_sessions(self, user_id: str, but: str, reason: str, actor: str) -> list[revocations.Revocation]:
        """End all sessions, except for one."""
        ...


class Known(users.Known, Protocol):
    """Where users and sessions are found by what they sign in with."""

    async def rotate(self, used: bytes, child: bytes, address: str) -> Renewed | None:
        """Use up a refresh token and add its child: of many that try at once, one succeeds."""
        ...

    async def renewed_again(self, used: bytes, child: bytes) -> Renewed | None:
        """The same for a token that was used a moment ago, while its child has not been."""
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
        self, rows: Kept, system: Known, hashing: passwords.Passwords, issue: tokens.Tokens, family: opaque.Family, told: feed.Feed,
        slowed: throttle.Throttle, trusted: trust.Trust, lifetimes: Lifetimes,
    ) -> None:  # fmt: skip
        self._rows, self._system, self._hashing = rows, system, hashing
        self._issue, self._family, self._told = issue, family, told
        self.throttle, self._trust, self._lifetimes = slowed, trusted, lifetimes

    async def login(self, email: str, password: str, origin: callers.Origin) -> tokens.Issued:
        """Tokens of a new session. Raises the same `Unauthenticated` whatever was wrong, `RateLimited` when too much was."""
        await self.throttle.called("login", origin)
        address = users.normal_email(email)
        device, place = self._marks(address or "", origin)
        found = await self._system.by_email(address, device, place) if address is not None else None
        budgets = throttle.sign_in(address or "", origin, found.known if found is not None else "")
        async with self.throttle.guess(budgets, lambda spent: self._note_flood(found, origin, spent)) as attempt:
            matched = await self._hashing.verify(found.password_hash if found is not None else None, password)
            if found is None or not matched or found.disabled:
                attempt.failed()
                await self._refuse(found, matched)
                raise _wrong()
        rehashed = await self._rehashed(found, password)
        issued = await self._open(found.user, PASSWORD, origin, (device, place), found.password_hash, rehashed)
        if issued is None:
            raise _wrong()
        return issued

    async def open(self, user: users.User, method: str, origin: callers.Origin) -> tokens.Issued:
        """Tokens of a new session for somebody who proved who they are in another way. Raises `Unauthenticated` when disabled."""
        issued = await self._open(user, method, origin)
        if issued is None:
            raise errors.Unauthenticated("This account cannot sign in. Ask your administrator.")
        return issued

    async def refresh(self, refresh_token: str, origin: callers.Origin) -> tokens.Issued:
        """The next pair. Within seconds the same one again; later, reuse ends the session. Raises `Unauthenticated`, `RateLimited`."""
        await self.throttle.called("refresh", origin)
        child = self._family.child(refresh_token)
        renewed = await self._renewed(refresh_token, child, origin) if opaque.looks_like(opaque.REFRESH, refresh_token) else None
        if renewed is None:
            await self.throttle.wrong(throttle.unguessable("refresh", origin))
            raise _no_session()
        # whoever is told to wait gets this same child then: a moment is less than the grace
        await self.throttle.succeeded("refresh", renewed.session.session_id)
        return self._issue.for_user(renewed.user, renewed.session, child)

    async def listed(self, principal: identity.Principal) -> list[Listed]:
        """The user's live sessions, the most recently used first."""
        return await self._rows.sessions(principal.user_id, MOST_LISTED)

    async def end(self, principal: identity.Principal, session_id: str) -> int:
        """End one session of the user everywhere, at once; how many that were. Raises `NotFound`."""
        return await self._tell(await self._rows.end_session(principal.user_id, ids.SessionId(session_id), "logout", _actor(principal)))

    async def end_all(self, principal: identity.Principal, *, but_this: bool) -> int:
        """End all sessions of the user, or all but the one at hand; how many that were."""
        but = principal.session_id if but_this else ""
        return await self._tell(await self._rows.end_sessions(principal.user_id, but, "logout", _actor(principal)))

    async def _open(
        self, user: users.User, method: str, origin: callers.Origin, marks: tuple[bytes, ...] = (), verified: str | None = None,
        rehashed: str | None = None,
    ) -> tokens.Issued | None:  # fmt: skip
        await self.throttle.succeeded("sign_in", user.user_id)
        refresh_token = opaque.new(opaque.REFRESH)
        idle, absolute = self._lifetimes.of(origin.device)
        opening = Opening(
            ids.SessionId.new(), method, origin, opaque.digest(refresh_token), idle, absolute,
            0 if self._trust.limits(user.tier).single_session else self._lifetimes.most - 1, marks, verified, rehashed,
        )  # fmt: skip
        opened = await self._rows.open_session(user.user_id, opening)
        if opened is None:
            return None
        await self._tell(opened.ended)
        return self._issue.for_user(opened.user, opened.session, refresh_token)

    async def _rehashed(self, found: users.Account, password: str) -> str | None:
        outdated = found.password_hash is not None and self._hashing.outdated(found.password_hash)
        return await self._hashing.hash(password) if outdated else None

    def _marks(self, account: str, origin: callers.Origin) -> tuple[bytes, bytes]:
        """What is remembered of this device at this address, and of the address alone."""
        device = self._family.mark("device", account, origin.address, origin.device)
        return device, self._family.mark("address", account, origin.address)

    async def _refuse(self, found: users.Account | None, matched: bool) -> None:
        if found is None:
            await self._system.audit(None, "login", "refused", "no such user")
        else:
            reason = "disabled" if matched else "wrong password"
            await self._system.audit(found.user.user_id, "login", "refused", reason)

    async def _note_flood(self, found: users.Account | None, origin: callers.Origin, spent: throttle.Budget) -> None:
        # not each one: a flood of attempts must not become a flood of entries
        if await self.throttle.worth_noting(origin, spent):
            await self._system.audit(found.user.user_id if found is not None else None, "login", "throttled", "too many failed attempts")

    async def _renewed(self, token: str, child: str, origin: callers.Origin) -> Renewed | None:
        used, following = opaque.digest(token), opaque.digest(child)
        renewed = await self._system.rotate(used, following, origin.address) or await self._system.renewed_again(used, following)
        if renewed is None and (reused := await self._system.used_before(used)) is not None:
            await self._end_if_reused(reused, used, following)
        return renewed

    async def _end_if_reused(self, reused: Reused, used: bytes, following: bytes) -> None:
        # somebody who asks again because an answer was lost has done nothing wrong, even though the session is over by now
        if not await self._rows.was_under_way(reused.user_id, used, following):
            await self._tell(await self._rows.end_session(reused.user_id, reused.session_id, "refresh reuse", "auth", security=True))

    async def _tell(self, ended: Sequence[revocations.Revocation]) -> int:
        await self._told.withdraw(ended)
        return len(ended)


def _actor(principal: identity.Principal) -> str:
    return audit.actor(identity.Caller(principal=principal))


def _wrong() -> errors.Unauthenticated:
    return errors.Unauthenticated("E-mail or password is wrong.")


def _no_session() -> errors.Unauthenticated:
    return errors.Unauthenticated("The refresh token is not valid any more. Sign in again.")
