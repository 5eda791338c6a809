"""Faults: chosen by chance from a seed, one after the other, each over before the next one of its kind."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable

from tests.prove import faults
from tests.prove.record import place

Fault = faults.Fault[place.Place]


def _lines(which: str, how: str) -> Fault:
    async def strike(where: place.Place, chance: random.Random) -> None:
        line = chance.choice(where.fronts if which == "clients" else where.behind)
        if how == "cut":
            line.cut()
        elif how == "stall":
            async with line.stalled():
                await asyncio.sleep(faults.lasts(chance))
        else:
            async with line.delayed(chance.uniform(0.05, 0.3)):
                await asyncio.sleep(faults.briefly(chance))

    return strike


FAULTS: dict[str, Fault] = {
    "kill -9 events": faults.killed(*place.EVENTS),
    "kill -9 gateway": faults.killed(*place.GATEWAYS),
    "kill -9 dispatcher": faults.killed("dispatcher"),
    "kill -9 valkey": faults.killed("valkey"),
    "kill -9 postgres": faults.killed("postgres"),
    "SIGSTOP events": faults.stopped(*place.EVENTS),
    "SIGSTOP gateway": faults.stopped(*place.GATEWAYS),
    "wipe valkey": faults.wiped,
    "cut clients": _lines("clients", "cut"),
    "stall clients": _lines("clients", "stall"),
    "delay clients": _lines("clients", "delay"),
    "cut events": _lines("events", "cut"),
    "stall events": _lines("events", "stall"),
    "delay events": _lines("events", "delay"),
}


async def strike(where: place.Place, many: int, within_s: float, chance: random.Random, told: Callable[[str], None]) -> Counter[str]:
    """So many of them, evenly over the time."""
    return await faults.strike(FAULTS, where, many, within_s, chance, told)
