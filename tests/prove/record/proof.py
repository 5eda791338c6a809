"""One proof: a system, its load, its faults, and the verdict."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.prove import pages
from tests.prove.record import book, checker, clients, nemesis, place, writers

# what can be made up, one or both: a hole in what one client saw, an event that another saw twice
HOLE, DOUBLE = "1", "2"
_STALLED = 6
_STARTING = 3
# what a gateway or a replica of events may take on top of what it had before the load
_ROOM_MIB = 96


@dataclass(frozen=True, slots=True)
class Wanted:
    """How long, how many faults, from which seed, how many users; `forged` is what is made up and must be found."""

    minutes: float
    faults: int
    seed: int
    users: int = 20
    forged: str = ""


async def prove(wanted: Wanted, tell: Callable[[str], None]) -> dict[str, Any]:
    """The report; `ok` says whether nothing was off."""
    tell("starting two replicas of events and of the gateway ...")
    async with place.running(wanted.users) as where:
        found, chance = book.Book(), random.Random(wanted.seed)
        before = _rss(where)
        tell(f"{wanted.faults} faults in {wanted.minutes:g} minutes, seed {wanted.seed}")
        done = await _load(where, found, wanted, chance, tell)
        await _forge(wanted.forged, where, *found.clients[:2])
        verdict = await checker.judged(where, found)
        return _report(found, verdict, dict(done), {name: after - before[name] for name, after in _rss(where).items()})


async def _forge(what: str, where: place.Place, seen: book.Seen, other: book.Seen) -> None:
    if HOLE in what:
        seen.events.pop(max(seen.events))
    if DOUBLE in what:
        (user,) = (one for one in where.users if one.user_id == other.user_id)
        other.take((await pages.whole(where.target("events"), user))[-1])


async def _load(where: place.Place, found: book.Book, wanted: Wanted, chance: random.Random, tell: Callable[[str], None]) -> Any:
    quiet, over = asyncio.Event(), asyncio.Event()
    began = time.monotonic()

    def told(name: str) -> None:
        tell(f"{time.monotonic() - began:5.1f} s  {name}")

    async with asyncio.TaskGroup() as group:
        _follow(group, where, found, over, chance)
        async with writers.writing(where, found) as pen, asyncio.TaskGroup() as load:
            for user in where.users:
                load.create_task(pen.write(user, quiet, random.Random(chance.random())))
            for user in where.users[:_STARTING]:
                load.create_task(clients.start_runs(where, user, found, quiet, random.Random(chance.random())))
            done = await nemesis.strike(where, wanted.faults, wanted.minutes * 60, chance, told)
            quiet.set()
        tell("the load is over; waiting for runs to end and clients to have all of it ...")
        await checker.ended(where, found)
        await checker.owed(where, found)
        over.set()
    return done


def _follow(group: asyncio.TaskGroup, where: place.Place, found: book.Book, over: asyncio.Event, chance: random.Random) -> None:
    for at, user in enumerate(where.users):
        for stays_s in (None, 3.0):
            found.clients.append(seen := book.Seen(user.user_id, 0, 0))
            group.create_task(clients.follow(where, user, seen, over, random.Random(chance.random()), stays_s))
        if at < _STALLED:
            group.create_task(clients.stall(where, user, over, random.Random(chance.random())))


def _rss(where: place.Place) -> dict[str, int]:
    """Resident memory in MiB of the processes that hold what clients have not taken."""
    names = (*place.EVENTS, *place.GATEWAYS)
    return {name: _mib(where.system.pid(name)) for name in names}


def _mib(pid: int) -> int:
    line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) // 1024


def _report(found: book.Book, verdict: checker.Verdict, faults: dict[str, int], grown: dict[str, int]) -> dict[str, Any]:
    acknowledged = sum(map(len, found.acknowledged.values()))
    bounded = all(mib < _ROOM_MIB for mib in grown.values())
    return {
        "ok": verdict.ok and bounded and acknowledged > 0,
        "appended": found.appended,
        "acknowledged": acknowledged,
        "recorded": verdict.recorded,
        "delivered": verdict.delivered,
        "repeated_on_resume": sum(seen.doubles for seen in found.clients),
        "reconnects": sum(seen.reconnects for seen in found.clients),
        "runs_accepted": sum(map(len, found.accepted_runs.values())),
        "duplicates": verdict.duplicates,
        "gaps": verdict.gaps,
        "leaks": verdict.leaks,
        "lost": verdict.lost,
        "unfinished": verdict.unfinished,
        "wrong": verdict.wrong[:20],
        "refused": found.refusals,
        "grown_mib": grown,
        "faults": faults,
    }
