"""Keeps calls away from what is not well: a breaker for what fails again and again, places for what bears only so many at a time."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from typing import Literal

State = Literal["closed", "open", "half_open"]
# while one call tries whether it works again, the others may ask so much later
_TRIAL_S = 1.0


class Breaker:
    """Lets calls through until `failures` in a row failed, of at least `sources` different callers; then none for `open_s` seconds.

    After that one call is let through: when it succeeds all are again, when it fails none is for `open_s` seconds more. What a call says
    that was let through before the last of these changes is not heard.
    """

    __slots__ = ("_count", "_failures", "_now", "_open_s", "_opened_at", "_sources", "_state", "_those", "_trial", "generation")

    def __init__(self, failures: int, open_s: float, *, sources: int = 1, now: Callable[[], float] = time.monotonic) -> None:
        self._failures, self._open_s, self._sources, self._now = failures, open_s, sources, now
        self._state: State = "closed"
        self._count, self._those, self._opened_at, self._trial = 0, set[str](), 0.0, False
        self.generation = 0

    @property
    def state(self) -> State:
        """How it is now."""
        return "half_open" if self._state == "open" and self._left_s() <= 0 else self._state

    @property
    def failed_before(self) -> int:
        """How many failed in a row."""
        return self._count

    def refused_for_s(self) -> float:
        """0.0 when a call may pass now; else how many seconds from now it may ask again."""
        if self._state == "closed":
            return 0.0
        if (left_s := self._left_s()) > 0:
            return left_s
        return _TRIAL_S if self._trial else 0.0

    def enter(self) -> int:
        """Let a call through, which `refused_for_s` allowed; returns what it brings back to one of `succeeded`, `failed`, `left`."""
        if self._state == "open":
            self._trial = True
        return self.generation

    def succeeded(self, ticket: int) -> bool:
        """A call has succeeded. Whether that changed the state."""
        if ticket != self.generation:
            return False
        self._count = 0
        self._those.clear()
        if self._state == "closed":
            return False
        self._become("closed")
        return True

    def failed(self, ticket: int, source: str = "") -> bool:
        """A call of this source has failed. Whether that changed the state."""
        if ticket != self.generation:
            return False
        self._count += 1
        self._those.add(source)
        if self._state == "closed" and (self._count < self._failures or len(self._those) < self._sources):
            return False
        self._become("open")
        return True

    def left(self, ticket: int) -> None:
        """A call has ended and says nothing: it was cancelled, or failed by a fault of its caller's."""
        if ticket == self.generation:
            self._trial = False

    def _become(self, state: State) -> None:
        self._state, self._opened_at, self._trial = state, self._now(), False
        self.generation += 1

    def _left_s(self) -> float:
        return self._opened_at + self._open_s - self._now()


class Full(Exception):
    """All places are taken, and so are those where one could wait."""


class Places:
    """At most `most` at a time, and at most `waiting` that wait: of those who wait, who has fewest places is next, then who came first."""

    def __init__(self, most: int, waiting: int) -> None:
        self.most, self._most_waiting = most, waiting
        self._taken: Counter[str] = Counter()
        self._waiting: list[tuple[str, asyncio.Future[None]]] = []

    @property
    def taken(self) -> int:
        """How many there are."""
        return self._taken.total()

    @property
    def waiting(self) -> int:
        """How many wait."""
        return len(self._waiting)

    def taken_at_once(self, key: str) -> bool:
        """Whether there was a place without a wait, which is taken then."""
        if self._waiting or self.taken >= self.most:
            return False
        self._taken[key] += 1
        return True

    async def take(self, key: str) -> None:
        """Returns when there is a place. Raises `Full`."""
        if self.taken_at_once(key):
            return
        if len(self._waiting) >= self._most_waiting:
            raise Full
        granted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        entry = (key, granted)
        self._waiting.append(entry)
        try:
            await granted
        except asyncio.CancelledError:
            if granted.done() and not granted.cancelled():
                self.give_back(key)
            raise
        finally:
            if entry in self._waiting:
                self._waiting.remove(entry)

    def give_back(self, key: str) -> None:
        """A place is free again."""
        self._taken[key] -= 1
        if not self._taken[key]:
            del self._taken[key]
        while self._waiting and self.taken < self.most:
            entry = min(self._waiting, key=lambda one: self._taken[one[0]])
            self._waiting.remove(entry)
            if not entry[1].done():
                self._taken[entry[0]] += 1
                entry[1].set_result(None)
