"""Makes users: the form of an e-mail address, a password, roles and a tier."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from chassis import log, postgres
from netra import errors, ids
from services.auth import passwords, permissions

_log = log.get(__name__)
_EMAIL = re.compile(r"[a-z0-9.!#$%&'*+/=?^_`{|}~\-]{1,64}@[a-z0-9](?:[a-z0-9.\-]*[a-z0-9])?")
_MAX_EMAIL = 254
_SAME_TIER = {"": "free", "mid": "business"}


@dataclass(frozen=True, slots=True)
class User:
    """What a token says about a user."""

    user_id: str
    tenant_id: str
    roles: tuple[str, ...]
    tier: str
    version: int


@dataclass(frozen=True, slots=True)
class Account:
    """What a sign-in needs to know."""

    user: User
    password_hash: str | None
    disabled: bool


@dataclass(frozen=True, slots=True)
class Wanted:
    """A user to be made; checked."""

    email: str
    password: str
    roles: tuple[str, ...]
    tier: str


def normal_email(text: str) -> str | None:
    """The address as it is stored, or None when it is not one."""
    email = text.strip().lower()
    return email if len(email) <= _MAX_EMAIL and _EMAIL.fullmatch(email) else None


def wanted(email: str, password: str, roles: Iterable[str], tier: str) -> Wanted:
    """Check each field. Raises `InvalidPayload` naming the one that is wrong."""
    address = normal_email(email)
    if address is None:
        raise errors.InvalidPayload("email must be an e-mail address of at most 254 characters", field="email")
    if not passwords.MIN_LENGTH <= len(password) <= passwords.MAX_LENGTH:
        message = f"password must have {passwords.MIN_LENGTH} to {passwords.MAX_LENGTH} characters"
        raise errors.InvalidPayload(message, field="password")
    chosen = tuple(sorted(set(roles))) or ("user",)
    if not set(chosen) <= set(permissions.ROLES):
        raise errors.InvalidPayload(f"roles must be out of {', '.join(permissions.ROLES)}", field="roles")
    known_tier = _SAME_TIER.get(tier, tier)
    if known_tier not in permissions.TIERS:
        raise errors.InvalidPayload(f"tier must be one of {', '.join(permissions.TIERS)}", field="tier")
    return Wanted(address, password, chosen, known_tier)


class Kept(Protocol):
    """Where users are kept."""

    async def create_user(self, user: User, email: str, password_hash: str, actor: str) -> None:
        """Add a user. Raises `Conflict` when the e-mail is taken."""
        ...

    async def email_of(self, user_id: str) -> str | None:
        """The e-mail address of a user."""
        ...


class Known(Protocol):
    """Where users are found by what they sign in with."""

    async def by_email(self, email: str) -> Account | None:
        """The user who signs in with this address."""
        ...


class Users:
    """The users of this installation."""

    def __init__(self, rows: Kept, system: Known, hashing: passwords.Passwords) -> None:
        self._rows, self._system, self._hashing = rows, system, hashing

    async def create(self, user: Wanted, tenant_id: str, actor: str) -> ids.UserId:
        """Make a user. Raises `AlreadyExists` when the e-mail is taken."""
        user_id = ids.UserId.new()
        hashed = await self._hashing.hash(user.password)
        record = User(user_id, tenant_id, user.roles, user.tier, 1)
        try:
            await self._rows.create_user(record, user.email, hashed, actor)
        except postgres.Conflict:
            raise errors.AlreadyExists("A user with this e-mail exists.", field="email") from None
        return user_id

    async def email_of(self, user_id: str) -> str:
        """A user's e-mail address. Raises `NotFound`."""
        email = await self._rows.email_of(user_id)
        if email is None:
            raise errors.NotFound("There is no such user.")
        return email

    async def bootstrap(self, email: str, password: str) -> None:
        """Make the first administrator, in a tenant of its own, unless there is such a user. Raises `ValueError` when it cannot be."""
        try:
            admin = wanted(email, password, ("admin", "user"), "internal")
        except errors.InvalidPayload as error:
            raise ValueError(f"NETRA_BOOTSTRAP_ADMIN and the secret file bootstrap_admin: {error.message}") from None
        if await self._system.by_email(admin.email) is not None:
            return
        try:
            await self.create(admin, ids.TenantId.new(), "bootstrap")
        except errors.AlreadyExists:
            return  # another replica was faster
        _log.info("the first administrator was created")
