"""Keys for programs: made once, shown by their prefix, narrowed to some permissions, ended at once."""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Protocol

from chassis import identity
from chassis.trust import Trust
from netra import errors, ids
from services.auth import callers, feed, revocations, throttle, tokens, users

METHOD = "api_key"
USUAL_LIFE, LONGEST_LIFE = timedelta(days=90), timedelta(days=365)
MOST_KEYS = 50
_FORM = re.compile(r"nak_[A-Za-z0-9]{8}_[A-Za-z0-9_\-]{43}")
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"


@dataclass(frozen=True, slots=True)
class Key:
    """A key without its secret."""

    key_id: str
    name: str
    prefix: str
    scopes: tuple[str, ...]
    created_at: datetime
    expires_at: datetime
    last_used_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class Wanted:
    """A key to be made; checked. It owns a session."""

    key_id: str
    session_id: str
    name: str
    prefix: str
    secret_digest: bytes
    scopes: tuple[str, ...]
    life: timedelta


@dataclass(frozen=True, slots=True)
class Found:
    """Whose key was presented, and the session it stands for."""

    account: users.Account
    session: tokens.Session
    scopes: tuple[str, ...]


class Kept(Protocol):
    """Where the keys of one user are kept."""

    async def add_key(self, user_id: str, session_id: str, wanted: Wanted, most: int) -> Key:
        """Add a key that is asked for in a session, and the key's own session.

        Raises `Unauthenticated` when user or session have ended by now, `QuotaExceeded` when the user has as many keys as may be.
        """
        ...

    async def keys_of(self, user_id: str, most: int) -> list[Key]:
        """The keys in force, newest first."""
        ...

    async def revoke_key(self, user_id: str, key_id: str) -> revocations.Revocation | None:
        """End a key and its session; None when there is none in force. Raises `NotFound`."""
        ...


class Known(Protocol):
    """Where a key is found by its digest."""

    async def by_key(self, secret_digest: bytes, address: str) -> Found | None:
        """The key, when it and its session are in force; notes that it was used."""
        ...

    async def audit(self, user_id: str | None, action: str, outcome: str, detail: str) -> None:
        """Add a line about somebody who is not signed in."""
        ...


class ApiKeys:
    """The keys of all users; each method works for one."""

    def __init__(
        self, rows: Kept, system: Known, issue: tokens.Tokens, told: feed.Feed, trusted: Trust, guesses: throttle.Throttle
    ) -> None:
        self._rows, self._system, self._issue = rows, system, issue
        self._told, self._trust, self._guesses = told, trusted, guesses

    async def create(self, owner: identity.Principal, name: str, scopes: Iterable[str], life: timedelta | None) -> tuple[Key, str]:
        """A new key, and its secret, which is nowhere else. Raises `InvalidPayload`, `PermissionDenied`, `QuotaExceeded`."""
        if not 1 <= len(name.strip()) <= 100 or not name.isprintable():
            raise errors.InvalidPayload("name must be a text of 1 to 100 characters", field="name")
        if life is not None and not timedelta(minutes=1) <= life <= LONGEST_LIFE:
            raise errors.InvalidPayload(f"lifetime must be from one minute to {LONGEST_LIFE.days} days", field="lifetime")
        wanted_scopes = self._narrowed(owner, scopes)
        shown = "nak_" + "".join(secrets.choice(_LETTERS) for _ in range(8))
        api_key = f"{shown}_{secrets.token_urlsafe(32)}"
        wanted = Wanted(
            ids.uuid7(), ids.SessionId.new(), name.strip(), shown, _digest(api_key), wanted_scopes, USUAL_LIFE if life is None else life
        )
        return await self._rows.add_key(owner.user_id, owner.session_id, wanted, MOST_KEYS), api_key

    async def all(self, owner: identity.Principal) -> list[Key]:
        """The keys in force, newest first."""
        return await self._rows.keys_of(owner.user_id, MOST_KEYS)

    async def revoke(self, owner: identity.Principal, key_id: str) -> None:
        """End a key, its tokens and sockets. Raises `NotFound`."""
        ended = await self._rows.revoke_key(owner.user_id, ids.Id(key_id))
        if ended is not None:
            await self._told.withdraw([ended])

    async def sign_in(self, api_key: str, origin: callers.Origin) -> tokens.Issued:
        """An access token narrowed to the key's scopes. Raises the same `Unauthenticated` whatever was wrong."""
        await self._guesses.called(METHOD, origin)
        found = await self._system.by_key(_digest(api_key), origin.address) if _FORM.fullmatch(api_key) else None
        if found is None or found.account.disabled:
            await self._guesses.wrong(throttle.unguessable(METHOD, origin))
            await self._system.audit(found.account.user.user_id if found else None, METHOD, "refused", api_key[:12] if found else "")
            raise errors.Unauthenticated("The API key is not valid. Make a new one.")
        await self._guesses.succeeded(METHOD, found.session.session_id)
        return self._issue.for_user(found.account.user, found.session, scope=found.scopes)

    def _narrowed(self, owner: identity.Principal, scopes: Iterable[str]) -> tuple[str, ...]:
        chosen = tuple(sorted(set(scopes)))
        if not 1 <= len(chosen) <= identity.MAX_SCOPE:
            raise errors.InvalidPayload(f"scopes must name 1 to {identity.MAX_SCOPE} permissions, for example runs:write", field="scopes")
        allowed = owner.narrowed(self._trust.permissions(owner.roles, owner.tier))
        for scope in chosen:
            if scope not in allowed:
                raise errors.PermissionDenied(f"You cannot give a key the permission {scope[:64]}: you do not have it.", field="scopes")
        return chosen


def _digest(api_key: str) -> bytes:
    return hashlib.sha256(api_key.encode("utf-8", "surrogatepass")).digest()
