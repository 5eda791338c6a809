"""A user's whole record as it is now, oldest first; a few pages at a time for all who ask."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Protocol

from netra import errors
from services.events import log

_PAGE_EVENTS = 500
_PAGE_BYTES = 256 * 1024


class Pages(Protocol):
    """One user's record."""

    async def page(self, user_id: str, after: int, *, limit: int, max_bytes: int) -> log.Page: ...


class Exports:
    """Reads records out."""

    def __init__(self, pages: Pages, at_once: int) -> None:
        self._pages = pages
        # held while a page is read, not while it is sent: whoever takes none holds up nobody
        self._turns = asyncio.Semaphore(at_once)

    async def pages(self, user_id: str) -> AsyncIterator[log.Page]:
        """At least one page; all tell the position at which the first was read. Raises `FailedPrecondition` when retention or an
        erasure takes away what was still to come."""
        page = await self._page(user_id, 0)
        begun = page.position
        while True:
            events = [event for event in page.events if event.cursor <= begun.last]
            yield log.Page(events, min(page.through, begun.last), begun)
            if page.through >= begun.last:
                return
            after = page.through
            page = await self._page(user_id, after)
            if page.position.oldest > after + 1:
                message = f"The record begins at cursor {page.position.oldest} now: what was still to come is gone. Begin again."
                raise errors.FailedPrecondition(message, oldest=page.position.oldest)

    async def _page(self, user_id: str, after: int) -> log.Page:
        async with self._turns:
            return await self._pages.page(user_id, after, limit=_PAGE_EVENTS, max_bytes=_PAGE_BYTES)
