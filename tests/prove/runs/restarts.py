"""Rolling restarts: each process is asked to end, gently, one after the other, while many users have runs; nobody is to notice."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from tests.prove.runs import agents, clients, judge, place

ORDER = ("context", "auth", "events", *place.DISPATCHERS, "gateway")
# how long the starts take at least, and what is between two of one user: everything has its turn meanwhile
_ENDS_S, _LEAST_S, _PAUSE_S = 120.0, 12.0, 3.0


async def roll(where: place.Place, users: int, runs: int, chance: random.Random, tell: Callable[[str], None]) -> dict[str, Any]:
    """So many runs of so many users, evenly over the time that it takes to restart everything once at least."""
    desk, over, done = clients.Desk(where.http), asyncio.Event(), Counter[str]()
    pause_s = max(_LEAST_S / runs, _PAUSE_S)
    began, started = time.monotonic(), list[place.Started]()

    async def rolling() -> None:
        while not over.is_set() or len(done) < len(ORDER):
            name = ORDER[done.total() % len(ORDER)]
            await where.restart(name)
            done[name] += 1
            tell(f"  {time.monotonic() - began:5.1f} s  {name} restarted; {len(started)} runs accepted")

    async def act(user: place.User, mine: random.Random) -> None:
        for _ in range(runs):
            run = await where.start(desk, user, mine.choice(agents.FIVE).name, user.mark())
            if run is not None:
                started.append(run)
            await asyncio.sleep(mine.uniform(0, 2 * pause_s))

    async with asyncio.TaskGroup() as group:
        group.create_task(rolling())
        async with asyncio.TaskGroup() as acting:
            for user in where.users[:users]:
                acting.create_task(act(user, random.Random(chance.random())))
        over.set()
    await clients.until(lambda: all(one.ended for one in started), _ENDS_S)
    times = [_ms(one) for one in started if one.ended]
    return {
        "users": users, "runs": users * runs, "accepted": len(started), "ended": sum(one.ended for one in started),
        "refused": desk.refused[:10], "refused_n": len(desk.refused), "not_now": dict(Counter(desk.passing)),
        "unreachable": desk.unreachable, "restarts": dict(done), "run_ms": judge.percentiles(times),
    }  # fmt: skip


def _ms(one: place.Started) -> float:
    """From its first event to its last."""
    return (judge.told_at(one.seen[-1]) - judge.told_at(one.seen[0])) * 1000
