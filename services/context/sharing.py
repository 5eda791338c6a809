"""Threads that their owners let others of the tenant read or write to, and the tokens that prove it to other services."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from types import MappingProxyType
from typing import Protocol

from chassis import identity
from netra import errors, ids
from services.context import changes, pages
from services.context.keys import SigningKey

ACCESSES = ("read", "write")


@dataclass(frozen=True, slots=True)
class Grant:
    """What a user may do with a thread of another one."""

    thread_id: ids.ThreadId
    grantee_id: ids.UserId
    access: str
    created_at: datetime
    withdrawn_at: datetime | None


@dataclass(frozen=True, slots=True)
class Grantee:
    """Another user, named by id or by e-mail address; by exactly one of them."""

    user_id: str = ""
    email: str = ""

    def __post_init__(self) -> None:
        if bool(self.user_id) == bool(self.email):
            raise errors.InvalidPayload("Say by user_id or by email whom the thread is granted to.", field=self.field)
        if self.user_id:
            ids.UserId(self.user_id)

    @property
    def field(self) -> str:
        """The field that names them."""
        return "email" if self.email else "user_id"


@dataclass(frozen=True, slots=True)
class Signed:
    """A grant token."""

    token: str
    expires_at: datetime
    access: str


class Directory(Protocol):
    """Where users are found."""

    async def resolve(self, tenant_id: ids.TenantId, user_id: str, email: str) -> ids.UserId:
        """An active user of the tenant. Raises `NotFound`."""
        ...


class Kept(Protocol):
    """Where grants are kept."""

    async def refuse_others(self, change: changes.Change) -> None:
        """Raises `NotFound` or `PermissionDenied` unless the thread is the user's own and not deleted."""
        ...

    async def grant(self, change: changes.Change, tenant_id: ids.TenantId, grantee_id: ids.UserId, access: str) -> Grant:
        """Let another user read or write; granting again changes the access. Raises `NotFound`, `PermissionDenied`."""
        ...

    async def withdraw(self, change: changes.Change, grantee_id: ids.UserId) -> Grant:
        """End a grant, once. Raises `NotFound`, `PermissionDenied`."""
        ...

    async def grants(
        self, user_id: ids.UserId, thread_id: ids.ThreadId, after: tuple[datetime, str] | None, limit: int, *, withdrawn: bool
    ) -> list[Grant]:
        """Grants of a thread of the user made after another one, oldest first. Raises `NotFound`, `PermissionDenied`."""
        ...

    async def access(self, user_id: ids.UserId, thread_id: ids.ThreadId) -> str | None:
        """What the user may do with a thread; with one they deleted, too: before it can be erased its runs are to end."""
        ...


class Sharing:
    """The grants of all users; each method works for one."""

    def __init__(self, kept: Kept, directory: Directory, key: SigningKey, token_s: int) -> None:
        self._kept, self._directory, self._key, self._token_s = kept, directory, key, token_s

    async def grant(self, change: changes.Change, tenant_id: ids.TenantId, grantee: Grantee, access: str) -> Grant:
        """Let another user of the tenant read or write; granting again changes the access.

        Raises `InvalidPayload`, `NotFound`, `PermissionDenied`, `AlreadyExists`.
        """
        if access not in ACCESSES:
            raise errors.InvalidPayload("access must be ACCESS_READ or ACCESS_WRITE", field="access")
        # who does not own the thread learns nothing about users
        await self._kept.refuse_others(change)
        grantee_id = await self._directory.resolve(tenant_id, grantee.user_id, grantee.email)
        if grantee_id == change.user_id:
            raise errors.InvalidPayload("The thread is yours already.", field=grantee.field)
        asked = replace(change, detail=MappingProxyType({"grantee_id": grantee_id, "access": access}))
        return await self._kept.grant(asked, tenant_id, grantee_id, access)

    async def withdraw(self, change: changes.Change, grantee_id: ids.UserId) -> Grant:
        """End a grant at once. Raises `NotFound`, `PermissionDenied`, `AlreadyExists`."""
        asked = replace(change, detail=MappingProxyType({"grantee_id": grantee_id}))
        return await self._kept.withdraw(asked, grantee_id)

    async def grants(
        self, user_id: ids.UserId, thread_id: ids.ThreadId, page_size: int, page_token: str, *, withdrawn: bool
    ) -> tuple[list[Grant], str]:
        """One page, oldest first, and the token of the next. Raises `NotFound`, `PermissionDenied`, `InvalidPayload`."""
        after, limit = _place(pages.unpacked(page_token, "g")), pages.limit(page_size)
        found = await self._kept.grants(user_id, thread_id, after, limit + 1, withdrawn=withdrawn)
        page = found[:limit]
        if len(found) <= limit:
            return page, ""
        return page, pages.packed("g", f"{page[-1].created_at.astimezone(UTC).isoformat()} {page[-1].grantee_id}")

    async def token(self, principal: identity.Principal, thread_id: ids.ThreadId) -> Signed:
        """What the user may do with the thread, signed for other services. Raises `NotFound`."""
        access = await self._kept.access(principal.user_id, thread_id)
        if access is None:
            raise changes.no_thread()
        claims = {
            "sub": str(principal.user_id), "tid": str(principal.tenant_id), "kind": identity.THREAD, "res": str(thread_id), "acc": access,
        }  # fmt: skip
        expires_at = datetime.now(UTC).replace(microsecond=0) + timedelta(seconds=self._token_s)
        token = identity.sign(self._key.private, self._key.kid, identity.GRANT, claims, self._token_s)
        return Signed(token, expires_at, access)


def _place(place: str) -> tuple[datetime, str] | None:
    if not place:
        return None
    moment, _, grantee_id = place.partition(" ")
    try:
        at, user_id = datetime.fromisoformat(moment), ids.UserId(grantee_id)
    except (ValueError, errors.InvalidPayload):
        raise pages.unknown() from None
    # in the one form in which it was given out
    if at.tzinfo is None or at.isoformat() != moment or user_id != grantee_id:
        raise pages.unknown()
    return at, user_id
