"""The crash matrix: runs of five agents are held, each at another place between two events; then something dies; all must end.

A volley is one fault that strikes runs at all places at once. One dispatcher is given all of its runs, so that it is known which one
owns them: in another volley the other one does.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.prove.runs import agents, clients, judge, outside, place

OWNER_KILLED, OWNER_STOPPED, OTHER_KILLED = "kill -9 the owner", "SIGSTOP the owner", "kill -9 the other dispatcher"
FAULTS: dict[str, str] = {
    OWNER_KILLED: "", OWNER_STOPPED: "", OTHER_KILLED: "",
    **{f"kill -9 {name}": name for name in ("events", "context", "auth", "gateway", "valkey", "postgres")},
}  # fmt: skip
GATEWAY = "kill -9 gateway"
# from the death of an owner to what its successor does. The lease is 3 s here: what is left is enough wherever this runs
BOUND = judge.Bound(promised_ms=5_000.0, gross_ms=5_000.0)
_ARRIVES_S, _RESUMES_S, _ENDS_S, _LOOK_S = 30.0, 20.0, 60.0, 0.05
_STARTS = 16
Cell = tuple[str, str]
CELLS: tuple[Cell, ...] = tuple((name, at) for name, places in agents.PLACES.items() for at in places)


@dataclass(slots=True)
class Figures:
    """What was struck, and how it went on. Times are milliseconds, by fault."""

    struck: set[tuple[str, str, str]] = field(default_factory=set)
    strikes: int = 0
    # at how many events of its record a run of an agent was struck
    boundaries: dict[str, set[int]] = field(default_factory=dict)
    resumed: dict[str, list[float]] = field(default_factory=dict)
    # the same of runs whose owner died or stood still
    taken_over: dict[str, list[float]] = field(default_factory=dict)
    missed: list[str] = field(default_factory=list)
    late: list[str] = field(default_factory=list)
    sockets_lost: dict[str, int] = field(default_factory=dict)

    def exceeded(self, *, alone: bool) -> list[str]:
        """What took longer than it may."""
        return [line for fault, found in self.taken_over.items() for line in BOUND.exceeded(f"a takeover: {fault}", found, alone=alone)]

    def report(self, wanted: int) -> dict[str, Any]:
        """For people and programs."""
        return {
            "cells": len(self.struck), "cells_wanted": wanted, "strikes": self.strikes, "missed": self.missed[:10], "late": self.late[:10],
            "boundaries": {name: len(found) for name, found in sorted(self.boundaries.items())},
            "resume_ms": {fault: judge.percentiles(found) for fault, found in self.resumed.items()},
            "takeover_ms": {fault: judge.percentiles(found) for fault, found in self.taken_over.items()},
            "over_5s": {fault: sum(ms > 5000 for ms in found) for fault, found in self.resumed.items() if max(found, default=0) > 5000},
        }  # fmt: skip


@dataclass(slots=True)
class Volley:
    """One fault, and the runs it strikes."""

    where: place.Place
    desk: clients.Desk
    fault: str
    number: int
    cells: Sequence[Cell]
    figures: Figures
    owner: str
    other: str
    # whether a stopped owner wakes when all is over, or while its successor is at it
    wakes_late: bool
    held: list[place.Started] = field(default_factory=list)
    owned: Sequence[place.Started] = ()
    struck_at: float = 0.0

    @property
    def gate(self) -> str:
        """Where its runs are held."""
        return f"{self.where.folder}/gate-{self.number}"

    async def fire(self) -> None:
        """Start, wait until each stands where it should, strike, see them go on, let them go, wait until all have ended."""
        with self.where.idle(self.other):
            await self._start()
            await self._placed()
        await self._strike()
        await clients.until(lambda: all(one.ended for one in self.held), _ENDS_S)
        self._measure()

    async def _start(self) -> None:
        room = asyncio.Semaphore(_STARTS)

        async def one(at: int, name: str, hold: str) -> None:
            async with room:
                user = self.where.users[at % len(self.where.users)]
                mark = next(mark for mark in iter(user.mark, "") if agents.suits(name, hold, mark))
                started = await self.where.start(self.desk, user, name, mark, hold, self.gate)
                if started is not None:
                    self.held.append(started)

        async with asyncio.TaskGroup() as group:
            for at, (name, hold) in enumerate(self.cells):
                group.create_task(one(at, name, hold))

    async def _placed(self) -> None:
        """Returns when each stands at its place, and the record has what it told."""
        arrived = set[str]()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_ARRIVES_S):
                while True:
                    arrived = await self._arrived()
                    if len(arrived) == len(self.held):
                        break
                    await asyncio.sleep(_LOOK_S)
        self.figures.missed += [f"{one.run.agent} at {one.hold}" for one in self.held if one.run.mark not in arrived]
        self.held = [one for one in self.held if one.run.mark in arrived]
        ids = [one.run.run_id for one in self.held]
        before = await self.where.heads(ids)
        while True:
            await asyncio.sleep(_LOOK_S)
            after = await self.where.heads(ids)
            if before == after:
                break
            before = after
        for one in self.held:
            self.figures.boundaries.setdefault(one.run.agent, set()).add(after.get(one.run.run_id, 0))
            self.figures.struck.add((self.fault, one.run.agent, one.hold))

    async def _arrived(self) -> set[str]:
        mine = {one.run.mark for one in self.held}
        found = {line.of for line in outside.lines(self.where.folder, outside.HELD)} & mine
        waiting = [one for one in self.held if one.hold == agents.ASKED]
        states = await self.where.owners([one.run.run_id for one in waiting])
        return found | {one.run.mark for one in waiting if states[one.run.run_id][0] == "suspended"}

    async def _strike(self) -> None:
        system, pid = self.where.system, self.where.system.pid(self.owner)
        states = await self.where.owners([one.run.run_id for one in self.held])
        owned = self.owned = [one for one in self.held if states[one.run.run_id][1] == pid]
        lost = self.where.sockets_lost
        self.figures.strikes += 1
        self.struck_at = time.time()
        if self.fault == OWNER_STOPPED:
            await self._stop(owned)
        else:
            name = FAULTS[self.fault] or (self.owner if self.fault == OWNER_KILLED else self.other)
            await asyncio.to_thread(system.kill, name)
            if self.fault == OWNER_KILLED:
                await self._resumed(owned)
            self._open()
            await asyncio.to_thread(system.restarted, name)
        self.figures.sockets_lost[self.fault] = self.figures.sockets_lost.get(self.fault, 0) + self.where.sockets_lost - lost

    async def _stop(self, owned: Sequence[place.Started]) -> None:
        self.where.system.tell(self.owner, signal.SIGSTOP)
        try:
            await self._resumed(owned)
            self._open()
            if self.wakes_late:
                await clients.until(lambda: all(one.ended for one in self.held), _ENDS_S)
        finally:
            self.where.system.tell(self.owner, signal.SIGCONT)

    def _open(self) -> None:
        with open(self.gate, "x"):
            pass

    async def _resumed(self, owned: Sequence[place.Started]) -> None:
        """Returns when another process has come as far as the one that died: it stands at the gate, or has told something."""
        if not await clients.until(lambda: len(self._again(owned)) == len(owned), _RESUMES_S):
            there = self._again(owned)
            self.figures.late += [f"{one.run.agent} at {one.hold}: {self.fault}" for one in owned if one.run.mark not in there]

    def _again(self, owned: Sequence[place.Started]) -> dict[str, float]:
        """When the runs were seen to go on, by mark."""
        lines = outside.lines(self.where.folder, outside.HELD)
        at = {line.of: line.at for line in reversed(lines) if line.at > self.struck_at}
        for one in owned:
            for frame in reversed(one.seen):
                if (told := judge.told_at(frame)) < self.struck_at:
                    break
                at[one.run.mark] = min(at.get(one.run.mark, told), told)
        return {one.run.mark: at[one.run.mark] for one in owned if one.run.mark in at}

    def _measure(self) -> None:
        times = self._again(self.held)
        took = {mark: (at - self.struck_at) * 1000 for mark, at in times.items()}
        self.figures.resumed.setdefault(self.fault, []).extend(took.values())
        if self.fault in (OWNER_KILLED, OWNER_STOPPED):
            of_owner = [took[one.run.mark] for one in self.owned if one.run.mark in took]
            self.figures.taken_over.setdefault(self.fault, []).extend(of_owner)


def part(share: float, chance: random.Random) -> list[Cell]:
    """So much of the places of each agent, and one in each at least; all of them for 1."""
    found: list[Cell] = []
    for name, places in agents.PLACES.items():
        found += [(name, at) for at in chance.sample(places, max(1, round(share * len(places))))]
    return found


async def fire(
    where: place.Place, volleys: int, share: float, chance: random.Random, tell: Callable[[str], None], faults: Sequence[str] = ()
) -> tuple[Figures, clients.Desk, int]:
    """So many volleys of each fault, all of them by default, at a share of all places; how many cells that is."""
    figures, desk, number, wanted = Figures(), clients.Desk(where.http), 0, set[tuple[str, str, str]]()
    await clients.until(lambda: all(user.follower.joined.is_set() for user in where.users), _ARRIVES_S)
    for turn in range(volleys):
        for at, fault in enumerate(faults or FAULTS):
            number += 1
            cells = list(CELLS) if share >= 1 else part(share, chance)
            wanted |= {(fault, *cell) for cell in cells}
            began = time.monotonic()
            # the owner is another one in each turn
            owner, other = place.DISPATCHERS[:: 1 if (turn + at) % 2 else -1]
            await Volley(where, desk, fault, number, cells, figures, owner, other, wakes_late=turn % 2 == 1).fire()
            resumed = judge.percentiles(figures.resumed[fault])
            over = f"; taken over after {judge.percentiles(figures.taken_over[fault])} ms" if fault in figures.taken_over else ""
            tell(f"  {fault}: {len(cells)} runs, {time.monotonic() - began:.1f} s; resumed after {resumed.get('p50')} ms (p50){over}")
    return figures, desk, len(wanted)
