"""Pages of the record, a few at a time: users in the order in which they came, and those far behind in every second turn only."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator
from typing import Protocol

from chassis import telemetry
from services.events import log

# whoever is further behind than this is in no hurry
FAR = 10_000
_KNOWN = 10_000
_waiting = telemetry.meter.create_gauge("netra.events.pages_waiting", description="Pages of the record that wait for their turn.")


class Record(Protocol):
    """One user's record."""

    async def page(self, user_id: str, after: int, *, limit: int, max_bytes: int, run_id: str = "") -> log.Page: ...


class _Lane:
    """Who waits: users in the order in which they came; whoever waits for several pages goes to the end after each."""

    def __init__(self) -> None:
        self._users: dict[str, deque[asyncio.Future[None]]] = {}

    def add(self, user_id: str, turn: asyncio.Future[None]) -> None:
        self._users.setdefault(user_id, deque()).append(turn)

    def take(self, busy: set[str]) -> tuple[str, asyncio.Future[None]] | None:
        """The first turn of a user who is not served just now."""
        for user_id in self._users:
            if user_id not in busy:
                turns = self._users.pop(user_id)
                turn = turns.popleft()
                if turns:
                    self._users[user_id] = turns
                return user_id, turn
        return None

    def remove(self, user_id: str, turn: asyncio.Future[None]) -> None:
        turns = self._users.get(user_id)
        if turns is not None and turn in turns:
            turns.remove(turn)
            if not turns:
                del self._users[user_id]


class Pages:
    """Reads `at_once` pages at a time, at most one of a user, so that many who resume do not hold up whoever is live."""

    def __init__(self, record: Record, at_once: int) -> None:
        self._record = record
        self._free = at_once
        self._busy: set[str] = set()
        self._near, self._far = _Lane(), _Lane()
        self._far_next = False
        self._waiting = 0
        self._last: dict[str, int] = {}

    async def page(self, user_id: str, after: int, *, limit: int, max_bytes: int, run_id: str = "") -> log.Page:
        """As the record's own, in its turn."""
        far = self._last.get(user_id, 0) - after > FAR
        async with self._turn(user_id, self._far if far else self._near):
            page = await self._record.page(user_id, after, limit=limit, max_bytes=max_bytes, run_id=run_id)
        self._remember(user_id, page)
        return page

    def _remember(self, user_id: str, page: log.Page) -> None:
        self._last.pop(user_id, None)
        if page.position.last - page.through > FAR:
            self._last[user_id] = page.position.last
            if len(self._last) > _KNOWN:
                del self._last[next(iter(self._last))]

    @contextlib.asynccontextmanager
    async def _turn(self, user_id: str, lane: _Lane) -> AsyncIterator[None]:
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        lane.add(user_id, turn)
        self._count(1)
        self._admit()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._leave(user_id)
            else:
                lane.remove(user_id, turn)
                self._count(-1)
            raise
        try:
            yield
        finally:
            self._leave(user_id)

    def _leave(self, user_id: str) -> None:
        self._busy.discard(user_id)
        self._free += 1
        self._admit()

    def _admit(self) -> None:
        while self._free and (found := self._next()) is not None:
            user_id, turn = found
            self._free -= 1
            self._count(-1)
            self._busy.add(user_id)
            turn.set_result(None)

    def _next(self) -> tuple[str, asyncio.Future[None]] | None:
        first, second = (self._far, self._near) if self._far_next else (self._near, self._far)
        if (found := first.take(self._busy)) is not None:
            self._far_next = first is self._near
            return found
        return second.take(self._busy)

    def _count(self, change: int) -> None:
        self._waiting += change
        _waiting.set(self._waiting)
