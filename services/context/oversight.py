"""Who looks at whose contexts: users at their own, with `contexts:audit` at those of their tenant; that is told in two places."""

from __future__ import annotations

from typing import Protocol

from chassis import audit, identity, trust
from netra import errors, ids
from services.context import contexts, pages
from services.context.contexts import About, Entry, Filter, Line, Stored

_AUDIT = "contexts:audit"
_LAST_ENTRY = 2**63 - 1


class Own(Protocol):
    """What one user sees."""

    async def by_id(self, user_id: ids.UserId, context_id: ids.ContextId, within: ids.ContextId | None = None) -> Stored | None:
        """The user's context with this id; None, too, when it is asked for within another one that is closed."""
        ...

    async def page(self, user_id: ids.UserId, wanted: Filter, before: ids.ContextId | None, limit: int) -> tuple[list[Stored], bool]:
        """The user's contexts made before another one, newest first, fewer than `limit` when they are long; and whether there are more."""
        ...

    async def trail(self, user_id: ids.UserId, about: About, after: int, limit: int) -> list[Entry]:
        """Lines of the user's audit trail behind one of them, oldest first."""
        ...


class OfTenant(Protocol):
    """The same of users of a tenant; nothing of others. Each read adds a line to the user's audit trail."""

    async def by_id(self, user_id: ids.UserId, tenant_id: ids.TenantId, context_id: ids.ContextId, line: Line) -> Stored | None:
        """A context."""
        ...

    async def page(
        self, user_id: ids.UserId, tenant_id: ids.TenantId, wanted: Filter, before: ids.ContextId | None, limit: int, line: Line
    ) -> tuple[list[Stored], bool]:
        """A page of contexts."""
        ...

    async def trail(
        self, user_id: ids.UserId, tenant_id: ids.TenantId, about: About, after: int, limit: int, line: Line
    ) -> list[Entry]:  # fmt: skip
        """A page of the audit trail."""
        ...


class Oversight:
    """Reads for the caller at hand. An id of somebody else, of another tenant or of nobody is answered in the same way."""

    def __init__(self, own: Own, of_tenant: OfTenant, trusted: trust.Trust, acts: audit.Acts) -> None:
        self._own, self._of_tenant, self._trust, self._acts = own, of_tenant, trusted, acts

    async def get(self, whose: str, context_id: ids.ContextId) -> Stored:
        """A context. Raises `NotFound`, `PermissionDenied`, `FailedPrecondition` within a closed context, `Unavailable` when untold."""
        caller = identity.current()
        if (user_id := await self._other(whose)) is not None:
            line = self._line(caller.user, "context")
            found = await self._of_tenant.by_id(user_id, caller.user.tenant_id, context_id, line)
        elif caller.context is not None:
            found = await self._within(caller.context.user_id, context_id, caller.context.context_id)
        else:
            found = await self._own.by_id(caller.user_id, context_id)
        if found is None:
            raise contexts.no_context()
        return found

    async def contexts(self, whose: str, wanted: Filter, page_size: int, page_token: str) -> tuple[list[Stored], str]:
        """One page, newest first, and the token of the next. Raises `InvalidPayload`, `PermissionDenied`, `Unavailable` when untold."""
        caller, before, limit = identity.current().user, _context_id(pages.unpacked(page_token, "c")), pages.limit(page_size)
        if (user_id := await self._other(whose)) is not None:
            line = self._line(caller, "contexts")
            page, cut = await self._of_tenant.page(user_id, caller.tenant_id, wanted, before, limit + 1, line)
        else:
            page, cut = await self._own.page(caller.user_id, wanted, before, limit + 1)
        page, cut = page[:limit], cut or len(page) > limit
        return page, pages.packed("c", page[-1].context.context_id) if cut else ""

    async def trail(self, whose: str, about: About, page_size: int, page_token: str) -> tuple[list[Entry], str]:
        """One page, oldest first, and the token of the next. Raises `InvalidPayload`, `PermissionDenied`, `Unavailable` when untold."""
        caller, after, limit = identity.current().user, _number(pages.unpacked(page_token, "l")), pages.limit(page_size)
        if (user_id := await self._other(whose)) is not None:
            line = self._line(caller, "audit trail")
            found = await self._of_tenant.trail(user_id, caller.tenant_id, about, after, limit + 1, line)
        else:
            found = await self._own.trail(caller.user_id, about, after, limit + 1)
        page = found[:limit]
        return page, pages.packed("l", str(page[-1].entry_id)) if len(found) > limit else ""

    async def _within(self, user_id: ids.UserId, context_id: ids.ContextId, within: ids.ContextId) -> Stored | None:
        found = await self._own.by_id(user_id, context_id, within)
        if found is None and (mine := await self._own.by_id(user_id, within)) is not None and mine.closed_at is not None:
            raise contexts.closed()
        return found

    async def _other(self, whose: str) -> ids.UserId | None:
        """The user whose contexts are meant when that is not the caller; it is in the record of access then, or this fails."""
        caller = identity.current()
        if not whose or whose == caller.user_id:
            return None
        if caller.principal is None:
            raise errors.PermissionDenied("A context shows contexts of its own user only.", field="user_id")
        # before the id is looked at: who may not, learns nothing about it
        identity.require(self._trust, caller.principal, _AUDIT)
        user_id = ids.UserId(whose)
        await self._acts.tell("read_contexts", "asked", caller, user_id=user_id, tenant_id=caller.principal.tenant_id)
        return user_id

    def _line(self, reader: identity.Principal, what: str) -> Line:
        return Line(reader.user_id, "read", {"what": what})


def _context_id(place: str) -> ids.ContextId | None:
    try:
        return ids.ContextId(place) if place else None
    except errors.InvalidPayload:
        raise pages.unknown() from None


def _number(place: str) -> int:
    if not place:
        return 0
    if not place.isdecimal() or len(place) > 19 or int(place) > _LAST_ENTRY:
        raise pages.unknown()
    return int(place)
