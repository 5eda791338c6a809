"""Whether it takes as long to be told that something is not yours as that it does not exist."""

from __future__ import annotations

import statistics
import time
from typing import Any

from tests.prove.isolation import leaves
from tests.prove.isolation.asking import Way
from tests.prove.isolation.example import Example
from tests.prove.isolation.people import twin
from tests.prove.isolation.world import World

PAIRS = 200
# this is a shared machine: what is less than both says nothing
_TIMES, _MS = 1.5, 1.0


async def measured(world: World, way: Way, example: Example, pairs: int) -> dict[str, Any]:
    """The medians of reading something foreign and something unknown, one after the other, so many times."""
    attacker, victim = world["F" if example.by == "admin" else "B"], world["A"]
    base = await way.ready(example, attacker)
    place = next((place for place in way.places(base) if example.reads in place), None)
    if place is None:
        raise LookupError(f"{example.name} has no place for {example.reads}")
    foreign: list[float] = []
    unknown: list[float] = []
    for at in range(pairs):
        values = [(foreign, victim.things[example.reads]), (unknown, twin(example.reads, ""))]
        for into, value in values if at % 2 else reversed(values):
            into.append(await _once(way, base, place, value))
    first, second = statistics.median(foreign), statistics.median(unknown)
    return {"foreign_ms": round(first, 2), "unknown_ms": round(second, 2), "ratio": round(max(first, second) / min(first, second), 2)}


async def _once(way: Way, base: Any, place: leaves.Path, value: str) -> float:
    asked = way.written(base, place, value)
    began = time.perf_counter()
    await way.ask(asked)
    return (time.perf_counter() - began) * 1000


def tells(found: dict[str, Any]) -> bool:
    """Whether the difference is one that somebody could see."""
    return bool(found["ratio"] > _TIMES and abs(found["foreign_ms"] - found["unknown_ms"]) > _MS)
