"""Faults: chosen by chance from a seed, one after the other, each over before the next one of its kind."""

from __future__ import annotations

import asyncio
import random
import signal
from collections import Counter
from collections.abc import Awaitable, Callable

from tests.prove.record import place

Fault = Callable[[place.Place, random.Random], Awaitable[None]]
_SHORT_S, _LONG_S = 0.5, 3.0
# one in so many lasts longer than `replicas.SILENCE_S`, so that others must take over
_ONE_IN, _LONGER_S, _LONGEST_S = 3, 6.0, 9.0


def _lasts(chance: random.Random) -> float:
    return chance.uniform(_LONGER_S, _LONGEST_S) if chance.randrange(_ONE_IN) == 0 else chance.uniform(_SHORT_S, _LONG_S)


async def _kill(where: place.Place, name: str) -> None:
    await asyncio.to_thread(where.system.kill, name)
    await asyncio.to_thread(where.system.restarted, name)


async def _stop(where: place.Place, name: str, seconds: float) -> None:
    where.system.tell(name, signal.SIGSTOP)
    try:
        await asyncio.sleep(seconds)
    finally:
        where.system.tell(name, signal.SIGCONT)


def _of(names: tuple[str, ...], *, stops: bool) -> Fault:
    async def strike(where: place.Place, chance: random.Random) -> None:
        name = chance.choice(names)
        await (_stop(where, name, _lasts(chance)) if stops else _kill(where, name))

    return strike


async def _wipe(where: place.Place, _: random.Random) -> None:
    await asyncio.to_thread(where.system.wipe_valkey)


def _lines(which: str, how: str) -> Fault:
    async def strike(where: place.Place, chance: random.Random) -> None:
        line = chance.choice(where.fronts if which == "clients" else where.behind)
        if how == "cut":
            line.cut()
        elif how == "stall":
            async with line.stalled():
                await asyncio.sleep(_lasts(chance))
        else:
            async with line.delayed(chance.uniform(0.05, 0.3)):
                await asyncio.sleep(chance.uniform(_SHORT_S, _LONG_S))

    return strike


FAULTS: dict[str, Fault] = {
    "kill -9 events": _of(place.EVENTS, stops=False),
    "kill -9 gateway": _of(place.GATEWAYS, stops=False),
    "kill -9 dispatcher": _of(("dispatcher",), stops=False),
    "kill -9 valkey": _of(("valkey",), stops=False),
    "kill -9 postgres": _of(("postgres",), stops=False),
    "SIGSTOP events": _of(place.EVENTS, stops=True),
    "SIGSTOP gateway": _of(place.GATEWAYS, stops=True),
    "wipe valkey": _wipe,
    "cut clients": _lines("clients", "cut"),
    "stall clients": _lines("clients", "stall"),
    "delay clients": _lines("clients", "delay"),
    "cut events": _lines("events", "cut"),
    "stall events": _lines("events", "stall"),
    "delay events": _lines("events", "delay"),
}


async def strike(where: place.Place, many: int, within_s: float, chance: random.Random, told: Callable[[str], None]) -> Counter[str]:
    """So many faults, evenly over the time, each kind as often as the others; two may overlap when they are of different kinds."""
    loop, done = asyncio.get_running_loop(), Counter[str]()
    locks = {name: asyncio.Lock() for name in FAULTS}
    begin = loop.time()

    async def one(name: str) -> None:
        async with locks[name]:
            told(name)
            await FAULTS[name](where, random.Random(chance.random()))
            done[name] += 1

    order = [name for _ in range(many // len(FAULTS) + 1) for name in chance.sample(sorted(FAULTS), len(FAULTS))][:many]
    async with asyncio.TaskGroup() as group:
        for place_, name in enumerate(order):
            await asyncio.sleep(max(0.0, begin + within_s * place_ / many - loop.time()))
            group.create_task(one(name))
    return done
