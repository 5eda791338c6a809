"""Fairness: somebody has very many runs waiting, and others come with their first one."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Any

from chassis import postgres
from tests.prove.runs import clients, judge, place

# in each of two dispatchers
SLOTS = 4
_PACE_S, _STARTS, _ARRIVALS, _WAITS_S = 1.0, 32, 20, 60.0
# so many runs of the noisy user for each of another's: some of them wait to the end
_A_TIME = 30
_OWN = "SELECT created_at, started_at FROM dispatcher.runs WHERE run_id = $1::uuid"
_BEFORE = "SELECT count(*) FROM dispatcher.runs WHERE user_id = $1::uuid AND started_at > $2 AND started_at < $3"
_WAITING = "SELECT count(*) FROM dispatcher.runs WHERE user_id = $1::uuid AND state = 'queued'"


async def measure(where: place.Place, noise: int, chance: random.Random, tell: Callable[[str], None]) -> dict[str, Any]:
    """The first user is noisy; the others come one after the other while runs of theirs wait, as long as any do."""
    desk = clients.Desk(where.http)
    noisy, others = where.users[0], where.users[1:]
    alone = [(await _first(where, desk, user, noisy))[0] for user in others[: _ARRIVALS // 4]]
    room = asyncio.Semaphore(_STARTS)

    async def one() -> None:
        async with room:
            await desk.start(noisy.person, "slot", {"pace_s": _PACE_S})

    async with asyncio.TaskGroup() as group:
        for _ in range(noise):
            group.create_task(one())
    waits, overtaken, waiting = list[float](), list[int](), list[int]()
    for at in range(min(_ARRIVALS, noise // _A_TIME)):
        # somewhere within the time that a slot is taken for
        await asyncio.sleep(chance.uniform(0, _PACE_S))
        waiting.append(await _waiting(where, noisy))
        wait_ms, before = await _first(where, desk, others[at % len(others)], noisy)
        waits.append(wait_ms)
        overtaken.append(before)
    times, passed = judge.percentiles(waits), max(overtaken)
    tell(f"  {waiting[-1]} of {noise} runs of one user still wait; others waited {times} ms, passed by {passed}")
    return {
        "noise": noise, "slots": SLOTS * len(place.DISPATCHERS), "slot_ms": _PACE_S * 1000, "arrivals": len(waits), "wait_ms": times,
        "alone_ms": judge.percentiles(alone), "passed_by": passed, "still_waiting": waiting[-1], "refused": desk.refused[:5],
    }  # fmt: skip


async def _waiting(where: place.Place, noisy: place.User) -> int:
    async with postgres.connection(where.system.database_url) as database:
        return int(await database.value(_WAITING, noisy.person.user_id))


async def _first(where: place.Place, desk: clients.Desk, user: place.User, noisy: place.User) -> tuple[float, int]:
    """How many milliseconds a run of a user waited for its slot, and how many runs of the noisy user got one meanwhile."""
    run_id = await desk.start(user.person, "slot", {"pace_s": 0.01})
    if not run_id or not await clients.until(lambda: run_id in user.follower.ended, _WAITS_S):
        return _WAITS_S * 1000, 0
    async with postgres.connection(where.system.database_url) as database:
        row = await database.row(_OWN, run_id)
        if row is None:
            return _WAITS_S * 1000, 0
        before = await database.value(_BEFORE, noisy.person.user_id, row["created_at"], row["started_at"])
    return (row["started_at"] - row["created_at"]).total_seconds() * 1000, int(before)
