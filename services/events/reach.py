"""Whose record a caller may reach: their own, or with the permission for it that of a user of their tenant."""

from __future__ import annotations

import time
from typing import Protocol

from chassis import audit, identity, trust
from netra import errors, ids


class Tenants(Protocol):
    """Whose record belongs to which tenant."""

    async def tenant_of(self, user_id: str) -> str:
        """The tenant; empty when the user has no record, or none that tells."""
        ...


class Reach:
    """Decides, and tells the record of access."""

    def __init__(self, tenants: Tenants, trusted: trust.Trust, acts: audit.Acts) -> None:
        self._tenants, self._trust, self._acts = tenants, trusted, acts

    async def reader(self, wanted: str) -> ids.UserId:
        """Whose record is to be read; that of another is told. Raises `PermissionDenied`, `NotFound`, `Unavailable`."""
        user_id = await self._admitted(wanted, "users:read")
        if user_id != identity.current().user_id:
            await self._tell("export_events", user_id, "ok")
        return user_id

    async def eraser(self, wanted: str) -> ids.UserId:
        """Whose record is to be erased; told always. Raises `PermissionDenied`, `NotFound`, `Unavailable`."""
        user_id = await self._admitted(wanted, "users:write")
        await self._tell("erase_events", user_id, "asked")
        return user_id

    def still(self) -> None:
        """That the caller's session goes on, for what takes long. Raises `Unauthenticated`."""
        caller = identity.current().user
        if self._trust.revoked(caller):
            raise errors.Unauthenticated("The session has ended. Sign in again.")
        if caller.expires_at + identity.LEEWAY_S <= time.time():
            raise errors.Unauthenticated("The token has expired.")

    async def _admitted(self, wanted: str, permission: str) -> ids.UserId:
        caller = identity.current().user
        if not wanted or wanted == caller.user_id:
            return caller.user_id
        identity.require(self._trust, caller, permission)
        user_id = ids.UserId(wanted)
        if await self._tenants.tenant_of(user_id) != caller.tenant_id:
            raise errors.NotFound("There is no record of such a user.")
        return user_id

    async def _tell(self, action: str, user_id: ids.UserId, outcome: str) -> None:
        caller = identity.current()
        await self._acts.tell(action, outcome, caller, user_id=user_id, tenant_id=caller.user.tenant_id)
