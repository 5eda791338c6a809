"""Erases the record of one user: hidden at once, deleted in parts, carried on by the sweep after a crash."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from typing import Protocol

from chassis import telemetry

_AT_ONCE = 2_000
_erased = telemetry.meter.create_counter("netra.events.erased", description="Events deleted because their user's record was erased.")


@dataclass(frozen=True, slots=True)
class Erasure:
    """What was asked for: everything of a user up to a cursor. `events` and `runs` were deleted so far."""

    user_id: str
    request_id: str
    upto: int
    events: int
    runs: int
    done: bool


class Kept(Protocol):
    """One user's record."""

    async def begin_erasure(self, user_id: str, request_id: str, asked_by: str) -> Erasure:
        """Hide everything there is, forget of runs all but that they ended, and note that the rest is to go; or the one begun before.

        Raises `FailedPrecondition` while runs have not ended.
        """
        ...

    async def days(self, user_id: str, upto: int) -> Sequence[tuple[date, str]]:
        """The days and classes in which the user has events up to a cursor."""
        ...

    async def erase(self, erasure: Erasure, day: date, retention: str, many: int) -> tuple[int, bool]:
        """Delete some events of a day and class; how many, and whether any is left. The day itself is forgotten with its last."""
        ...

    async def end_erasure(self, erasure: Erasure) -> Erasure:
        """Note that nothing is left."""
        ...


class Erasures:
    """Erases records."""

    def __init__(self, kept: Kept) -> None:
        self._kept = kept

    async def erase(self, user_id: str, request_id: str, asked_by: str) -> Erasure:
        """Erase everything up to now. Asked again under the same `request_id`, it says what was erased then.

        Raises `FailedPrecondition` while runs of the user have not ended.
        """
        return await self.finish(await self._kept.begin_erasure(user_id, request_id, asked_by))

    async def finish(self, erasure: Erasure) -> Erasure:
        """Delete what is left of an erasure that was begun."""
        if erasure.done:
            return erasure
        for day, retention in await self._kept.days(erasure.user_id, erasure.upto):
            left = True
            while left:
                gone, left = await self._kept.erase(erasure, day, retention, _AT_ONCE)
                _erased.add(gone)
        return await self._kept.end_erasure(erasure)
