"""Fairness: somebody has very many runs waiting, and others come with their first one."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
# one of the slots becomes free within the time that a run of the noisy user takes; then a dispatcher must look (every 0.5 s when nobody
# tells it), claim, and begin
BOUND = judge.Bound(promised_ms=1000 * (_PACE_S + 1.0), gross_ms=10_000.0)
_WAITING = "SELECT count(*) FROM dispatcher.runs WHERE user_id = $1::uuid AND state = 'queued'"


@dataclass(frozen=True, slots=True)
class First:
    """The first run of a user: milliseconds that it waited for its slot, and how many runs of the noisy user got one meanwhile."""

    wait_ms: float
    passed_by: int


async def measure(
    where: place.Place, noise: int, chance: random.Random, tell: Callable[[str], None], *, alone: bool = True
) -> dict[str, Any]:
    """The first user is noisy; the others come one after the other while runs of theirs wait, as long as any do. `alone`: nothing else
    works on this machine."""
    desk = clients.Desk(where.http)
    noisy, others = where.users[0], where.users[1:]
    before = [await _first(where, desk, user, noisy) for user in others[: _ARRIVALS // 4]]
    room = asyncio.Semaphore(_STARTS)

    async def one() -> None:
        async with room:
            await desk.start(noisy.person, "slot", {"pace_s": _PACE_S})

    async with asyncio.TaskGroup() as group:
        for _ in range(noise):
            group.create_task(one())
    firsts, waiting = list[First | str](), list[int]()
    for at in range(min(_ARRIVALS, noise // _A_TIME)):
        # somewhere within the time that a slot is taken for
        await asyncio.sleep(chance.uniform(0, _PACE_S))
        waiting.append(await _waiting(where, noisy))
        firsts.append(await _first(where, desk, others[at % len(others)], noisy))
    found = report(before, firsts, waiting, alone=alone)
    found["wrong"] += [f"a start was refused: {one}" for one in desk.refused[:5]]
    others_waited = f"others waited {found['wait_ms']} ms, passed by {found['passed_by']}"
    tell(f"  {found['still_waiting']} of {noise} runs of one user still wait; {others_waited}")
    return {"noise": noise, "slots": SLOTS * len(place.DISPATCHERS), "slot_ms": _PACE_S * 1000, **found}


def report(before: Sequence[First | str], firsts: Sequence[First | str], waiting: Sequence[int], *, alone: bool) -> dict[str, Any]:
    """What was found, and what is `wrong` with it: `before` there was any noise, and then. In words what never came to a slot."""
    never = [one for one in (*before, *firsts) if isinstance(one, str)]
    quiet, noisy = ([one for one in some if isinstance(one, First)] for some in (before, firsts))
    waits, passed = [one.wait_ms for one in noisy], max((one.passed_by for one in noisy), default=0)
    wrong = [*never, *BOUND.exceeded("another's first run waited for its slot", waits, alone=alone)]
    if passed > 1:
        wrong.append(f"{passed} runs of a noisy user went before another's first one")
    if not waiting or not waiting[-1]:
        wrong.append("nothing of the noisy user was waiting any more: fairness shows nothing")
    return {
        "arrivals": len(firsts), "wait_ms": judge.percentiles(waits), "alone_ms": judge.percentiles(one.wait_ms for one in quiet),
        "passed_by": passed, "still_waiting": waiting[-1] if waiting else 0, "wrong": wrong,
    }  # fmt: skip


async def _waiting(where: place.Place, noisy: place.User) -> int:
    async with postgres.connection(where.system.database_url) as database:
        return int(await database.value(_WAITING, noisy.person.user_id))


async def _first(where: place.Place, desk: clients.Desk, user: place.User, noisy: place.User) -> First | str:
    """How it went with a run of a user; in words when it was refused, or did not begin or end in time."""
    try:
        async with asyncio.timeout(_WAITS_S):
            run_id = await desk.start(user.person, "slot", {"pace_s": 0.01})
    except TimeoutError:
        return f"another's first run was not accepted within {_WAITS_S:g} s"
    if not run_id:
        return "another's first run was refused"
    ended = await clients.until(lambda: run_id in user.follower.ended, _WAITS_S)
    async with postgres.connection(where.system.database_url) as database:
        row = await database.row(_OWN, run_id)
        if row is None or row["started_at"] is None:
            return f"another's first run {run_id} did not begin"
        if not ended:
            return f"another's first run {run_id} did not end within {_WAITS_S:g} s"
        before = await database.value(_BEFORE, noisy.person.user_id, row["created_at"], row["started_at"])
    return First((row["started_at"] - row["created_at"]).total_seconds() * 1000, int(before))
