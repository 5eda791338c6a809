"""The dispatchers that are open, by user: how many one may have, and which one gives way."""

from __future__ import annotations

from typing import Literal, Protocol

from netra import errors
from services.dispatcher.tools import metrics

WhenFull = Literal["evict", "reject"]
_RETRY_MS = 1000


class Kept(Protocol):
    """A dispatcher, as the book has it."""

    @property
    def busy(self) -> bool:
        """Whether it has a call that has not ended."""
        ...

    async def close(self) -> None:
        """End it; nothing of it is left."""
        ...


class Book:
    """Who has which dispatchers open. One of an accepted run is `held`: it is listed, but neither counted nor made to give way."""

    def __init__(self, most: int, when_full: WhenFull) -> None:
        self._most, self._when_full = most, when_full
        # in the order in which they were used last, the one that is idle for the longest time first
        self._open: dict[str, dict[Kept, bool]] = {}

    def live(self, user: str = "") -> int:
        """How many are open: of a user, or of all."""
        return len(self._open.get(user, ())) if user else sum(map(len, self._open.values()))

    async def enter(self, user: str, new: Kept, *, held: bool, most: int = 0) -> None:
        """List one. `most`, when it is more than what everybody may have, is what this user may.

        Raises `QuotaExceeded` when the user has as many as they may, and none of them is idle or none may give way.
        """
        idle = None if held else self.require_room(user, most)
        if idle is not None:
            # out of the book before it is closed: nobody else chooses it meanwhile
            self.leave(user, idle)
        self._open.setdefault(user, {})[new] = held
        metrics.live(1)
        if idle is not None:
            await idle.close()

    def require_room(self, user: str, most: int = 0) -> Kept | None:
        """The one that would give way for another; None when there is room. Raises `QuotaExceeded`."""
        allowed, mine = max(self._most, most), self._open.get(user, {})
        if sum(not held for held in mine.values()) < allowed:
            return None
        idle = next((one for one, held in mine.items() if not held and not one.busy), None)
        if idle is None or self._when_full == "reject":
            metrics.refused("dispatchers")
            message = f"You have {allowed} dispatchers of tools open, which is all you may. Close one, or wait until one is idle."
            raise errors.QuotaExceeded(message, limit=allowed, retry_after_ms=_RETRY_MS)
        return idle

    def used(self, user: str, one: Kept) -> None:
        """It has just been used: others give way before it."""
        mine = self._open.get(user)
        if mine is not None and one in mine:
            mine[one] = mine.pop(one)

    def leave(self, user: str, one: Kept) -> None:
        """It is closed, or about to be."""
        mine = self._open.get(user)
        if mine is None or one not in mine:
            return
        del mine[one]
        metrics.live(-1)
        if not mine:
            del self._open[user]

    async def close(self) -> None:
        """Close them all."""
        for mine in list(self._open.values()):
            for one in list(mine):
                await one.close()
