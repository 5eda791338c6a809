"""The users of a tenant, as administrators make, see, change and stop them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Protocol

from chassis import audit, identity, log, postgres, trust
from netra import errors, ids
from services.auth import opaque, pages, passwords, permissions, revocations

_log = log.get(__name__)
_EMAIL = re.compile(r"[a-z0-9.!#$%&'*+/=?^_`{|}~\-]{1,64}@[a-z0-9](?:[a-z0-9.\-]*[a-z0-9])?")
_MAX_EMAIL = 254
_MAX_REASON = 500
_SAME_TIER = {"": "free", "mid": "business"}
_INVITATION = timedelta(days=7)
_TRIES = 5
_MANAGE = "users:write"


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
    """What a sign-in needs to know. `known`: whether it comes from a `device` or an `address` that signed in before."""

    user: User
    password_hash: str | None
    disabled: bool
    known: str = ""


@dataclass(frozen=True, slots=True)
class Profile:
    """A user as administrators see them."""

    user: User
    email: str
    created_at: datetime
    disabled_at: datetime | None


@dataclass(frozen=True, slots=True)
class Wanted:
    """A user to be made; checked. Without a password they are invited."""

    email: str
    password: str
    roles: tuple[str, ...]
    tier: str


@dataclass(frozen=True, slots=True)
class Invitation:
    """What lets a user set a password; worth as much as the administrator who made it is by then."""

    token_digest: bytes
    lifetime: timedelta
    issuer: str | None


@dataclass(frozen=True, slots=True)
class Identity:
    """A person as an outside provider names them."""

    provider: str
    subject: str
    email: str


@dataclass(frozen=True, slots=True)
class Changed:
    """A user after a change, and what ended with it."""

    profile: Profile
    ended: Sequence[revocations.Revocation] = ()


def normal_email(text: str) -> str | None:
    """The address as it is stored, or None when it is not one."""
    # a letter of another script may have one of ours as its lower case
    email = text.strip().lower() if text.isascii() else ""
    return email if len(email) <= _MAX_EMAIL and _EMAIL.fullmatch(email) else None


def wanted(email: str, password: str, roles: Iterable[str], tier: str) -> Wanted:
    """Check each field. Raises `InvalidPayload` naming the one that is wrong."""
    address = normal_email(email)
    if address is None:
        raise errors.InvalidPayload("email must be an e-mail address of at most 254 characters", field="email")
    if password:
        passwords.check(password, "password")
    return Wanted(address, password, checked_roles(roles) or ("user",), checked_tier(tier))


def checked_roles(roles: Iterable[str]) -> tuple[str, ...]:
    """The roles, sorted, each once. Raises `InvalidPayload`."""
    chosen = tuple(sorted(set(roles)))
    if not set(chosen) <= set(permissions.ROLES):
        raise errors.InvalidPayload(f"roles must be out of {', '.join(permissions.ROLES)}", field="roles")
    return chosen


def checked_tier(tier: str) -> str:
    """The tier by its one name. Raises `InvalidPayload`."""
    known = _SAME_TIER.get(tier, tier)
    if known not in permissions.TIERS:
        raise errors.InvalidPayload(f"tier must be one of {', '.join(permissions.TIERS)}", field="tier")
    return known


class Kept(Protocol):
    """Where users are kept. Methods with a tenant find only its users, and return None for any other."""

    async def create_user(self, user: User, email: str, password_hash: str | None, invitation: Invitation | None, actor: str) -> None:
        """Add a user. Raises `Conflict` when the e-mail is taken."""
        ...

    async def known(self, user_id: str) -> Profile | None:
        """One user of whatever tenant."""
        ...

    async def email_of(self, user_id: str) -> str | None:
        """The e-mail address of a user."""
        ...

    async def profile(self, user_id: str, tenant_id: str, actor: str) -> Profile | None:
        """One user; the read is recorded when there is an actor."""
        ...

    async def change_user(self, before: User, roles: Sequence[str], tier: str, *, ends_sessions: bool, actor: str) -> Changed | None:
        """Set roles and tier, end reset tokens; None when the user is not as before any more."""
        ...

    async def disable_user(self, user_id: str, tenant_id: str, reason: str, actor: str) -> Changed | None:
        """Stop a user and end what they have."""
        ...

    async def enable_user(self, user_id: str, tenant_id: str, actor: str) -> Changed | None:
        """Let a user sign in again."""
        ...


class Known(Protocol):
    """Where users are found without knowing their id."""

    async def by_email(self, email: str, device: bytes = b"", address: bytes = b"") -> Account | None:
        """The user who signs in with this address, and whether they did before from this device or network address."""
        ...

    async def resolved(self, tenant_id: str, user_id: str | None, email: str | None) -> str | None:
        """The active user of a tenant with this id or e-mail address."""
        ...

    async def users(self, tenant_id: str, *, before: str, most: int, contains: str, actor: str) -> list[Profile]:
        """Users of a tenant, newest first, older than the user `before`; the read is recorded."""
        ...


class Told(Protocol):
    """Who is told of what ended."""

    async def withdraw(self, withdrawn: Iterable[revocations.Revocation]) -> None:
        """Tell at once."""
        ...


class Users:
    """The users of this installation."""

    def __init__(self, rows: Kept, system: Known, hashing: passwords.Passwords, trusted: trust.Trust, told: Told) -> None:
        self._rows, self._system, self._hashing, self._trust, self._told = rows, system, hashing, trusted, told

    async def create(self, user: Wanted, tenant_id: str, actor: str, issuer: str | None = None) -> tuple[ids.UserId, str]:
        """Make a user; for one without a password, also the token that sets it. Raises `AlreadyExists` when the e-mail is taken."""
        user_id = ids.UserId.new()
        hashed = await self._hashing.hash(user.password) if user.password else None
        reset_token = "" if user.password else opaque.new(opaque.RESET)
        invitation = Invitation(opaque.digest(reset_token), _INVITATION, issuer) if reset_token else None
        record = User(user_id, tenant_id, user.roles, user.tier, 1)
        try:
            await self._rows.create_user(record, user.email, hashed, invitation, actor)
        except postgres.Conflict:
            raise errors.AlreadyExists("A user with this e-mail exists.", field="email") from None
        return user_id, reset_token

    async def email_of(self, user_id: str) -> str:
        """A user's e-mail address. Raises `NotFound`."""
        email = await self._rows.email_of(user_id)
        if email is None:
            raise _nobody()
        return email

    async def resolve(self, tenant_id: str, user_id: str, email: str) -> ids.UserId:
        """An active user of a tenant by id or e-mail address. Raises `InvalidPayload`, and `NotFound` for all that are none alike."""
        tenant = ids.TenantId(tenant_id)
        if user_id:
            found = await self._system.resolved(tenant, ids.UserId(user_id), None)
        else:
            address = normal_email(email)
            if address is None:
                raise errors.InvalidPayload("email must be an e-mail address of at most 254 characters", field="email")
            found = await self._system.resolved(tenant, None, address)
        if found is None:
            raise errors.NotFound("There is no such user in your tenant.", field="user_id" if user_id else "email")
        return ids.UserId(found)

    async def get(self, admin: identity.Principal, user_id: str) -> Profile:
        """One user of the administrator's tenant. Raises `NotFound`."""
        found = await self._rows.profile(ids.UserId(user_id), admin.tenant_id, _actor(admin))
        if found is None:
            raise _nobody()
        return found

    async def page(self, admin: identity.Principal, page_size: int, page_token: str, contains: str) -> tuple[list[Profile], str]:
        """Users of the administrator's tenant, newest first, and the token of the next page."""
        size, before = pages.size(page_size), pages.after(page_token)
        if before:
            try:
                ids.UserId(before)
            except errors.InvalidPayload:
                raise pages.wrong() from None
        if len(contains) > _MAX_EMAIL or "\0" in contains:
            raise errors.InvalidPayload(f"email_contains must be a text of at most {_MAX_EMAIL} characters", field="email_contains")
        found = await self._system.users(
            admin.tenant_id, before=before, most=size + 1, contains=contains.strip().lower(), actor=_actor(admin)
        )
        return found[:size], pages.token(found[size - 1].user.user_id) if len(found) > size else ""

    def require_reach(self, admin: identity.Principal, roles: Sequence[str], tier: str) -> None:
        """Raises `PermissionDenied` when this is more than the administrator's token allows: nobody makes or rules over whoever may
        more."""
        more = self._more(admin.narrowed(self._trust.permissions(admin.roles, admin.tier)), roles, tier)
        if more or _is_above(tier, admin.tier):
            what = f"the permission {more[0]}" if more else f"the tier {tier}"
            raise errors.PermissionDenied(f"This user has {what}, which you do not have here.", permission=more[0] if more else "")

    async def reaches(self, admin_id: str, user_id: str) -> bool:
        """Whether an administrator may do to a user, now, what they did before."""
        admin, user = await self._rows.known(admin_id), await self._rows.known(user_id)
        if admin is None or user is None or admin.disabled_at is not None or admin.user.tenant_id != user.user.tenant_id:
            return False
        may = self._trust.permissions(admin.user.roles, admin.user.tier)
        return _MANAGE in may and not self._more(may, user.user.roles, user.user.tier) and not _is_above(user.user.tier, admin.user.tier)

    async def within_reach(self, admin: identity.Principal, user_id: str) -> Profile:
        """A user of the administrator's tenant who may no more than the administrator. Raises `NotFound`, `PermissionDenied`."""
        found = await self._rows.profile(ids.UserId(user_id), admin.tenant_id, "")
        if found is None:
            raise _nobody()
        self.require_reach(admin, found.user.roles, found.user.tier)
        return found

    async def change(self, admin: identity.Principal, user_id: str, roles: Iterable[str], tier: str) -> Profile:
        """Set roles and tier, where given. Fewer rights end the user's sessions. Raises `NotFound`, `FailedPrecondition` for less of
        one's own."""
        chosen, wanted_tier = checked_roles(roles), checked_tier(tier) if tier else ""
        for _ in range(_TRIES):
            found = await self.within_reach(admin, user_id)
            now_roles, now_tier = chosen or found.user.roles, wanted_tier or found.user.tier
            self.require_reach(admin, now_roles, now_tier)
            if (now_roles, now_tier) == (found.user.roles, found.user.tier):
                return found
            ends = self._loses(found.user, now_roles, now_tier)
            if user_id == admin.user_id and (ends or "admin" not in now_roles):
                field = "tier" if _is_above(found.user.tier, now_tier) else "roles"
                raise errors.FailedPrecondition("You cannot take rights from yourself. Let another administrator do it.", field=field)
            changed = await self._rows.change_user(found.user, now_roles, now_tier, ends_sessions=ends, actor=_actor(admin))
            if changed is not None:
                return await self._told_of(changed)
        raise errors.Unavailable("The user is being changed by others. Try again.", retry_after_ms=100)

    async def disable(self, admin: identity.Principal, user_id: str, reason: str) -> Profile:
        """Stop a user at once. Raises `NotFound`, `FailedPrecondition` for oneself."""
        if user_id == admin.user_id:
            raise errors.FailedPrecondition("You cannot disable yourself. Let another administrator do it.", field="user_id")
        if len(reason) > _MAX_REASON or "\0" in reason:
            raise errors.InvalidPayload(f"reason must be a text of at most {_MAX_REASON} characters", field="reason")
        await self.within_reach(admin, user_id)
        return await self._told_of(await self._rows.disable_user(ids.UserId(user_id), admin.tenant_id, reason, _actor(admin)))

    async def enable(self, admin: identity.Principal, user_id: str) -> Profile:
        """Let a user sign in again. Raises `NotFound`."""
        await self.within_reach(admin, user_id)
        return await self._told_of(await self._rows.enable_user(ids.UserId(user_id), admin.tenant_id, _actor(admin)))

    async def bootstrap(self, email: str, password: str) -> None:
        """Make the first administrator, in a tenant of its own, unless there is such a user. Raises `ValueError` when it cannot be."""
        try:
            passwords.check(password, "password")
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

    def _loses(self, before: User, roles: Sequence[str], tier: str) -> bool:
        return bool(self._more(self._trust.permissions(roles, tier), before.roles, before.tier)) or _is_above(before.tier, tier)

    def _more(self, than: frozenset[str], roles: Sequence[str], tier: str) -> list[str]:
        """What the roles allow in the tier beyond some permissions."""
        return sorted(self._trust.permissions(roles, tier) - than)

    async def _told_of(self, changed: Changed | None) -> Profile:
        if changed is None:
            raise _nobody()
        await self._told.withdraw(changed.ended)
        return changed.profile


def _is_above(tier: str, other: str) -> bool:
    return permissions.TIERS.index(tier) > permissions.TIERS.index(other)


def _actor(admin: identity.Principal) -> str:
    return audit.actor(identity.Caller(principal=admin))


def _nobody() -> errors.NotFound:
    return errors.NotFound("There is no such user.", field="user_id")
