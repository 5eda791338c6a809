"""Prepares the days to come and drops those that are older than their class is kept; carries on erasures that a crash interrupted."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from datetime import UTC, date, datetime, timedelta
from typing import Any, Protocol

from chassis import log as log_
from chassis import postgres, telemetry
from netra import errors
from services.events import days, erasure

_log = log_.get(__name__)
_swept = telemetry.meter.create_counter("netra.events.swept", description="What was dropped because of its age, or prepared.")
_FIRST_S = 60.0
_AHEAD = 3
_USED_WITHIN = timedelta(days=8)
# the dispatcher may still ask for the steps of a run that has just ended
_STEPS_STAY = timedelta(minutes=10)
_CRASHED_AFTER = timedelta(minutes=5)
_USERS, _ROWS = 200, 2_000
_AWAY = (errors.Unavailable, errors.DeadlineExceeded)


class Kept(Protocol):
    """The record of all users, by class and day."""

    async def period(self, retention: str, wanted: int, now: datetime, grace: timedelta) -> days.Period: ...
    async def in_use(self, retention: str, since: date) -> bool: ...
    async def prepare(self, retention: str, day: date) -> bool: ...
    async def reopen(self, retention: str) -> None: ...
    async def days_before(self, retention: str, oldest: date, today: date) -> Sequence[date]: ...
    async def raise_oldest(self, retention: str, day: date, today: date, after: str, many: int) -> str: ...
    async def drop(self, retention: str, day: date, today: date, many: int) -> bool: ...
    async def drop_heads(self, retention: str, before: datetime, many: int) -> int: ...
    async def drop_steps(self, before: datetime, many: int) -> int: ...
    async def unfinished(self, before: datetime) -> Sequence[erasure.Erasure]: ...


class Sweep:
    """Keeps each class as long as its policy says. Every replica sweeps; what one has done, another finds done.

    `days_of` says how many days a class is kept; 0 when nobody knows, and nothing of it is dropped then.
    """

    def __init__(
        self, kept: Kept, erasures: erasure.Erasures, days_of: Callable[[str], int], classes: Sequence[str], grace_h: float
    ) -> None:
        self._kept, self._erasures, self._days_of, self._classes = kept, erasures, days_of, classes
        self._grace = timedelta(hours=grace_h)

    async def run(self, every_s: float) -> None:
        """Sweep, for ever."""
        for retention in self._classes:
            await self._tried(self._kept.reopen(retention), retention)
        await asyncio.sleep(min(_FIRST_S, every_s))
        while True:
            await self.once(datetime.now(UTC))
            await asyncio.sleep(every_s)

    async def once(self, now: datetime) -> None:
        """Sweep. What cannot be done now is left to the next time."""
        wanted = {retention: kept_for for retention in self._classes if (kept_for := self._days_of(retention))}
        for retention in self._classes:
            await self._tried(self._prepare(retention, now), retention)
        # first all of them: a day of one class may have to stay for the sake of another
        for retention in wanted:
            await self._tried(self._note_period(retention, wanted[retention], now), retention)
        for retention in wanted:
            await self._tried(self._drop_old(retention, wanted[retention], now), retention)
        await self._tried(self._drop_steps(now - _STEPS_STAY), "")
        await self._tried(self._erase(now - _CRASHED_AFTER), "")

    async def _tried(self, work: Coroutine[Any, Any, None], retention: str) -> None:
        try:
            await work
        except _AWAY as error:
            _log.info("a part of the sweep is left to the next one", retention=retention, reason=error.message)
        except postgres.Unfit:
            _log.error(
                "a day has events already and cannot get a partition; they are deleted one by one in their time", retention=retention
            )

    async def _prepare(self, retention: str, now: datetime) -> None:
        today = days.day_of(now)
        await self._kept.reopen(retention)
        if await self._kept.in_use(retention, today - _USED_WITHIN):
            # not today: its events lie elsewhere already
            for ahead in range(1, _AHEAD + 1):
                _swept.add(await self._kept.prepare(retention, today + ahead * days.A_DAY), {"what": "prepared"})

    async def _note_period(self, retention: str, wanted: int, now: datetime) -> None:
        await self._kept.period(retention, wanted, now, self._grace)

    async def _drop_old(self, retention: str, wanted: int, now: datetime) -> None:
        oldest = days.oldest_kept(await self._kept.period(retention, wanted, now, self._grace), now)
        today = days.day_of(now)
        for day in await self._kept.days_before(retention, oldest, today):
            await self._drop(retention, day, today)
        gone = _ROWS
        while gone == _ROWS:
            gone = await self._kept.drop_heads(retention, days.begin_of(oldest), _ROWS)
            _swept.add(gone, {"what": "heads"})

    async def _drop(self, retention: str, day: date, today: date) -> None:
        # readers first: whoever reads on from here on is told that the record begins later
        user = await self._kept.raise_oldest(retention, day, today, "", _USERS)
        while user:
            user = await self._kept.raise_oldest(retention, day, today, user, _USERS)
        while not await self._kept.drop(retention, day, today, _ROWS):
            pass
        _log.info("a day was dropped", retention=retention, day=day.isoformat())
        _swept.add(1, {"what": "days"})

    async def _drop_steps(self, before: datetime) -> None:
        while gone := await self._kept.drop_steps(before, _USERS):
            _swept.add(gone, {"what": "steps"})

    async def _erase(self, before: datetime) -> None:
        for unfinished in await self._kept.unfinished(before):
            await self._erasures.finish(unfinished)
