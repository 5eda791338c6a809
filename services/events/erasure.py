"""Erases the record of one user: hidden at once, deleted in parts, carried on by the sweep after a crash.

Of one thread only what is in its events: they keep their place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from typing import Protocol

from chassis import telemetry

_AT_ONCE = 2_000
# these are written again, and each can be large
_BLANKED_AT_ONCE = 200
_erased = telemetry.meter.create_counter(
    "netra.events.erased", description="Events deleted, or emptied with their thread, because their user asked for it."
)


@dataclass(frozen=True, slots=True)
class Erasure:
    """What was asked for: everything of a user up to a cursor. `events` and `runs` were deleted so far.

    With a thread, it is what is in the user's events of that thread.
    """

    user_id: str
    request_id: str
    upto: int
    events: int
    runs: int
    done: bool
    thread_id: str = ""


class Kept(Protocol):
    """One user's record."""

    async def begin_erasure(self, user_id: str, request_id: str, asked_by: str, thread_id: str = "") -> Erasure:
        """Hide everything there is, forget of runs all but that they ended, and note that the rest is to go; or the one begun before.
        With a thread, forget the steps of its runs, and note that what is in their events is to go.

        Raises `FailedPrecondition` while runs have not ended, `AlreadyExists` when the one begun before was another.
        """
        ...

    async def days(self, user_id: str, upto: int) -> Sequence[tuple[date, str]]:
        """The days and classes in which the user has events up to a cursor."""
        ...

    async def erase(self, erasure: Erasure, day: date, retention: str, many: int) -> tuple[int, bool]:
        """Delete some events of a day and class; how many, and whether any is left. The day itself is forgotten with its last."""
        ...

    async def blank(self, erasure: Erasure, day: date, retention: str, after: int, many: int) -> tuple[int, int]:
        """Take away what is in some events of the thread, of a day and class, after a cursor; how many, and up to which cursor."""
        ...

    async def end_erasure(self, erasure: Erasure) -> Erasure:
        """Note that nothing is left."""
        ...


class Erasures:
    """Erases records."""

    def __init__(self, kept: Kept) -> None:
        self._kept = kept

    async def erase(self, user_id: str, request_id: str, asked_by: str, thread_id: str = "") -> Erasure:
        """Erase everything up to now, or what is in the events of a thread. Asked again under the same `request_id`, it says what
        was erased then.

        Raises `FailedPrecondition` while runs of the user, or of the thread, have not ended; `AlreadyExists` when something else was
        asked for under the same `request_id`.
        """
        return await self.finish(await self._kept.begin_erasure(user_id, request_id, asked_by, thread_id))

    async def finish(self, erasure: Erasure) -> Erasure:
        """Delete what is left of an erasure that was begun."""
        if erasure.done:
            return erasure
        if erasure.thread_id:
            await self._blank(erasure)
        else:
            await self._delete(erasure)
        return await self._kept.end_erasure(erasure)

    async def _blank(self, erasure: Erasure) -> None:
        for day, retention in await self._kept.days(erasure.user_id, erasure.upto):
            through, gone = 0, _BLANKED_AT_ONCE
            while gone == _BLANKED_AT_ONCE:
                gone, through = await self._kept.blank(erasure, day, retention, through, _BLANKED_AT_ONCE)
                _erased.add(gone)

    async def _delete(self, erasure: Erasure) -> None:
        for day, retention in await self._kept.days(erasure.user_id, erasure.upto):
            left = True
            while left:
                gone, left = await self._kept.erase(erasure, day, retention, _AT_ONCE)
                _erased.add(gone)
