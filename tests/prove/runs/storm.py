"""Runs that are held nowhere, while everything dies at any moment."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable

from tests.prove import faults
from tests.prove.runs import agents, clients, place

FAULTS: dict[str, faults.Fault[place.Place]] = {
    "kill -9 dispatcher": faults.killed(*place.DISPATCHERS),
    "SIGSTOP dispatcher": faults.stopped(*place.DISPATCHERS),
    **{f"kill -9 {name}": faults.killed(name) for name in ("events", "context", "auth", "gateway", "valkey", "postgres")},
    "SIGSTOP events": faults.stopped("events"),
    "wipe valkey": faults.wiped,
}
_ENDS_S, _PAUSE_S = 120.0, 0.5


async def blow(where: place.Place, minutes: float, many: int, chance: random.Random, tell: Callable[[str], None]) -> Counter[str]:
    """So many faults, evenly over the time; returns when all runs have ended, or late."""
    over, desk = asyncio.Event(), clients.Desk(where.http)

    async def act(user: place.User, mine: random.Random) -> None:
        while not over.is_set():
            await where.start(desk, user, mine.choice(agents.FIVE).name, user.mark())
            await asyncio.sleep(mine.uniform(0, _PAUSE_S))

    async with asyncio.TaskGroup() as group:
        for user in where.users:
            group.create_task(act(user, random.Random(chance.random())))
        struck = await faults.strike(FAULTS, where, many, minutes * 60, chance, lambda name: tell(f"  {name}"))
        over.set()
    await where.ended(_ENDS_S)
    return struck
