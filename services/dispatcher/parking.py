"""Strands of a run, and which of them wait for something from outside: when all do, the run is put away; pure but for the time."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field

MESSAGE, APPROVAL, TIMER = "message", "approval", "timer"
# a run that only sleeps stays where it is when it goes on this soon
SOON_S = 5.0


@dataclass(frozen=True, slots=True)
class Wait:
    """What a strand waits for: a message, an approval or a time; until when at the latest, in seconds since 1970."""

    what: str
    until: float
    approval_id: str = ""


@dataclass(frozen=True, slots=True)
class Away:
    """How a run is put away: what it waits for, as it is told, until when at the latest, and which approvals it waits for."""

    waits_for: str
    until: float
    approvals: tuple[str, ...] = ()


@dataclass(eq=False, slots=True)
class Strand:
    """One strand of an agent's code: it counts its steps, in their order. Another, running beside, has keys and a count of its own.

    `at` is when its last step ended, in seconds since 1970. A strand that is `frozen` takes no step that is not in the record: it stands
    still before it, and says so there.
    """

    prefix: str = ""
    at: float = 0.0
    frozen: asyncio.Event | None = None
    count: int = 0
    chances: int = 0
    # steps that are under way, and how many of them wait for something from outside
    under_way: int = 0
    parked: int = 0
    # what steps of it wait for: strands that run for them
    groups: list[Group] = field(default_factory=list)
    over: bool = False

    def next(self) -> str:
        """The place of the next step."""
        self.count += 1
        return f"{self.prefix}{self.count}"

    def idle(self) -> bool:
        """Whether nothing of it can go on by itself."""
        return self.under_way > 0 and self.under_way == self.parked + sum(group.idle() for group in self.groups)

    def stand_still(self) -> None:
        """It goes no further."""
        self.parked += 1
        if self.frozen is not None:
            self.frozen.set()


@dataclass(eq=False, slots=True)
class Group:
    """Strands that run for one step. When one has failed that step goes on, whatever the others do."""

    strands: list[Strand]
    failed: bool = False

    def idle(self) -> bool:
        """Whether none of them can go on by itself, and not all are over."""
        left = [strand for strand in self.strands if not strand.over]
        return not self.failed and bool(left) and all(strand.idle() for strand in left)


class Parking:
    """Where the strands of one run wait. `notify` is called once, when all of them do: from then on none of them goes on here."""

    def __init__(self, root: Strand, notify: Callable[[], None] = lambda: None, *, stays: bool = True) -> None:
        """`stays`: the run is not put away, whatever it waits for."""
        self._root, self._notify, self._stays = root, notify, stays
        self._waiting: dict[asyncio.Future[None], tuple[Strand, Wait]] = {}
        self.away: Away | None = None

    async def wait(self, strand: Strand, what: Wait) -> None:
        """Returns when there is something new, or it is time. Never returns once the run is put away."""
        woken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting[woken] = (strand, what)
        strand.parked += 1
        try:
            self.look()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(what.until - time.time(), 0.0)):
                    await woken
        finally:
            self._leave(woken)
        await self.gate()

    def _leave(self, woken: asyncio.Future[None]) -> None:
        if (place := self._waiting.pop(woken, None)) is not None:
            place[0].parked -= 1

    async def gate(self) -> None:
        """Returns at once; never, when the run is put away."""
        if self.away is not None:
            await asyncio.Event().wait()

    def wake(self) -> None:
        """There may be something new: whoever waits looks again. Does nothing once the run is put away; its row says the same."""
        if self.away is not None:
            return
        for woken in list(self._waiting):
            self._leave(woken)
            if not woken.done():
                woken.set_result(None)

    def look(self) -> None:
        """Put the run away when all of its strands wait, and not for a short while only."""
        if self.away is not None or self._stays or not self._root.idle():
            return
        waits = [wait for _, wait in self._waiting.values()]
        if not waits or any(wait.what == TIMER and wait.until - time.time() < SOON_S for wait in waits):
            return
        found = {wait.what for wait in waits}
        approvals = tuple(sorted(wait.approval_id for wait in waits if wait.approval_id))
        # what is said to the thread is for the run that waits for it
        waits_for = next(what for what in (MESSAGE, APPROVAL, TIMER) if what in found)
        self.away = Away(waits_for, min(wait.until for wait in waits), approvals)
        self._notify()
