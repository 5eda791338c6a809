"""Takes away what is kept of runs: because their user asked for it, or because it is old."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

from chassis import log, telemetry
from netra import errors, ids

_log = log.get(__name__)
_AT_ONCE = 500
# a run whose end is told already is waited for, until its row says so as well
_ENDING_S, _LOOK_S = 3.0, 0.05
_FIRST_S = 60.0
# what a request started is known for a day
_LEAST_DAYS = 2
_erased = telemetry.meter.create_counter("netra.runs.erased", description="Runs whose content was taken away because their user asked.")
_swept = telemetry.meter.create_counter("netra.runs.swept", description="Rows of runs that were dropped because of their age.")


@dataclass(frozen=True, slots=True)
class Erasure:
    """What was asked for: the runs of a user that had ended by then, or those of a thread. Of `runs` it was done so far."""

    user_id: ids.UserId
    request_id: ids.RequestId
    thread_id: str
    asked_at: datetime
    runs: int
    done: bool


class Kept(Protocol):
    """The runs of one user."""

    async def ending(self, user_id: ids.UserId, thread_id: str) -> bool:
        """Whether runs of the user, or of the thread, are at their very end."""
        ...

    async def begin(self, user_id: ids.UserId, request_id: ids.RequestId, thread_id: str) -> Erasure:
        """Note what is asked for, or return what was under the same request id.

        Raises `FailedPrecondition` while runs have not ended, `AlreadyExists` when something else was asked for under that id.
        """
        ...

    async def erase(self, erasure: Erasure, after: str, many: int) -> tuple[int, str]:
        """Take the content of some runs, after one of them; how many, and up to which."""
        ...

    async def erase_said(self, erasure: Erasure, many: int) -> int:
        """Take the user's words out of some of what they told runs of others; how many."""
        ...

    async def end(self, erasure: Erasure) -> Erasure:
        """Note that nothing is left."""
        ...


class Old(Protocol):
    """The runs of all users."""

    async def drop(self, tier: str, days: int, many: int) -> int:
        """Drop some runs of a tier that ended longer ago; how many."""
        ...

    async def drop_erased(self, many: int) -> int:
        """Drop what is left of some runs that were erased, once nobody repeats their request any more; how many."""
        ...

    async def unfinished(self) -> Sequence[Erasure]:
        """Erasures that were begun some time ago and have not ended."""
        ...


class Erasures:
    """Erases runs of users."""

    def __init__(self, kept: Kept) -> None:
        self._kept = kept

    async def erase(self, user_id: ids.UserId, request_id: ids.RequestId, thread_id: str = "") -> Erasure:
        """Take away what is in the runs of a user, or in those of a thread that are theirs. Asked again under the same `request_id`, it
        says what was erased then.

        Raises `FailedPrecondition` while one of them has not ended; `AlreadyExists` when something else was asked for under that id.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_ENDING_S):
                await self._ended(user_id, thread_id)
        return await self.finish(await self._kept.begin(user_id, request_id, thread_id))

    async def _ended(self, user_id: ids.UserId, thread_id: str) -> None:
        while True:
            if not await self._kept.ending(user_id, thread_id):
                return
            await asyncio.sleep(_LOOK_S)

    async def finish(self, erasure: Erasure) -> Erasure:
        """Take away what is left of an erasure that was begun."""
        if erasure.done:
            return erasure
        after, gone = "", _AT_ONCE
        while gone == _AT_ONCE:
            gone, after = await self._kept.erase(erasure, after, _AT_ONCE)
            _erased.add(gone)
        while await self._kept.erase_said(erasure, _AT_ONCE) == _AT_ONCE:
            pass
        return await self._kept.end(erasure)


class Sweep:
    """Drops runs that ended longer ago than their tier is kept, and carries on erasures that a crash interrupted. Every replica sweeps;
    what one has done, another finds done.

    `days_of` says how many days a tier is kept; 0 when nobody knows, and nothing of it is dropped then.
    """

    def __init__(self, old: Old, erasures: Erasures, days_of: Callable[[str], int], tiers: Sequence[str]) -> None:
        self._old, self._erasures, self._days_of, self._tiers = old, erasures, days_of, tiers

    async def run(self, every_s: float) -> None:
        """Sweep, for ever."""
        await asyncio.sleep(min(_FIRST_S, every_s))
        while True:
            try:
                await self.once()
            except errors.NetraError as error:
                _log.info("the sweep of runs is left to the next one", reason=error.message)
            await asyncio.sleep(every_s)

    async def once(self) -> None:
        """Sweep."""
        for erasure in await self._old.unfinished():
            await self._erasures.finish(erasure)
        while gone := await self._old.drop_erased(_AT_ONCE):
            _swept.add(gone)
        for tier in self._tiers:
            if days := self._days_of(tier):
                while gone := await self._old.drop(tier, max(days, _LEAST_DAYS), _AT_ONCE):
                    _swept.add(gone)
