"""Faults of a running system: what can be done to its processes, and the order in which it is done."""

from __future__ import annotations

import asyncio
import random
import signal
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from typing import Protocol, TypeVar

from tests.fixtures import own

_SHORT_S, _LONG_S = 0.5, 3.0
# one in so many lasts longer than others wait before they take over (`replicas.SILENCE_S`)
_ONE_IN, _LONGER_S, _LONGEST_S = 3, 6.0, 9.0


class Place(Protocol):
    """Where it happens."""

    @property
    def system(self) -> own.Own:
        """The running system."""
        ...


P = TypeVar("P", bound=Place)
Fault = Callable[[P, random.Random], Awaitable[None]]


def lasts(chance: random.Random) -> float:
    """How long a fault lasts."""
    return chance.uniform(_LONGER_S, _LONGEST_S) if chance.randrange(_ONE_IN) == 0 else chance.uniform(_SHORT_S, _LONG_S)


def briefly(chance: random.Random) -> float:
    """How long a fault lasts that nobody needs to take over for."""
    return chance.uniform(_SHORT_S, _LONG_S)


def killed(*names: str) -> Fault[Place]:
    """kill -9 of one of the processes; over when it serves again."""

    async def strike(where: Place, chance: random.Random) -> None:
        name = chance.choice(names)
        await asyncio.to_thread(where.system.kill, name)
        await asyncio.to_thread(where.system.restarted, name)

    return strike


def stopped(*names: str) -> Fault[Place]:
    """SIGSTOP of one of the processes, for a while."""

    async def strike(where: Place, chance: random.Random) -> None:
        name = chance.choice(names)
        where.system.tell(name, signal.SIGSTOP)
        try:
            await asyncio.sleep(lasts(chance))
        finally:
            where.system.tell(name, signal.SIGCONT)

    return strike


async def wiped(where: Place, _: random.Random) -> None:
    """Valkey holds nothing any more."""
    await asyncio.to_thread(where.system.wipe_valkey)


async def strike(
    faults: Mapping[str, Fault[P]], where: P, many: int, within_s: float, chance: random.Random, told: Callable[[str], None]
) -> Counter[str]:
    """So many faults, evenly over the time, each kind as often as the others; two may overlap when they are of different kinds."""
    loop, done = asyncio.get_running_loop(), Counter[str]()
    locks = {name: asyncio.Lock() for name in faults}
    begin = loop.time()

    async def one(name: str) -> None:
        async with locks[name]:
            told(name)
            await faults[name](where, random.Random(chance.random()))
            done[name] += 1

    order = [name for _ in range(many // len(faults) + 1) for name in chance.sample(sorted(faults), len(faults))][:many]
    async with asyncio.TaskGroup() as group:
        for place_, name in enumerate(order):
            await asyncio.sleep(max(0.0, begin + within_s * place_ / many - loop.time()))
            group.create_task(one(name))
    return done
