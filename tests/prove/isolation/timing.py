"""Whether it takes as long to be told that something is not yours as that it does not exist."""

from __future__ import annotations

import bisect
import math
import random
import statistics
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tests.prove.isolation import leaves
from tests.prove.isolation.answers import AWAY
from tests.prove.isolation.asking import Asked, Way
from tests.prove.isolation.example import ADMIN, OPERATOR, Example
from tests.prove.isolation.people import Party, twin
from tests.prove.isolation.world import World

PAIRS = 200
# so unlikely must it be that chance alone does it, and so much later must the one answer be: less than that nobody sees over a network
_LIKELY, _FLOOR_MS = 1e-4, 0.15
# of so many in a row the quickest counts: what else the machine does only makes one later
_OF = 4
# what must be seen at least, if it were there, and how many times as many pairs are asked on a busy machine until it would be;
# but not for longer, as there are many to ask
SEEN_MS, _ROUNDS, _LONGEST_S = 1.0, 4, 15.0
# one question, asked twice, differs by something, too: what is to be told from it differs by so many times as much
_TIMES = 2.0
KINDS = ("foreign", "again", "unknown")
# what was answered in another way says nothing of the time
_OTHERWISE = AWAY | {"RATE_LIMITED", "QUOTA_EXCEEDED"}


@dataclass(frozen=True, slots=True)
class Times:
    """How long it took, in ms, in turns: what is foreign, the same once more, and what does not exist."""

    foreign: Sequence[float]
    again: Sequence[float]
    unknown: Sequence[float]

    @classmethod
    def of(cls, asked: Mapping[str, Sequence[float]]) -> Times:
        """The quickest of every few, in the order in which they were asked."""
        return cls(*([min(asked[kind][at : at + _OF]) for at in range(0, len(asked[kind]), _OF)] for kind in KINDS))

    @property
    def blind(self) -> bool:
        """Whether too much else goes on here to see even what anybody could."""
        later = [one + SEEN_MS for one in self.again]
        return unlike(later, self.foreign) >= _LIKELY or _shift(later, self.foreign) <= self.floor_ms

    @property
    def shift_ms(self) -> float:
        """By how much what is foreign takes longer; less than nothing when it is quicker."""
        return _shift(self.foreign, self.unknown)

    @property
    def floor_ms(self) -> float:
        """What is less is no difference on this machine, as busy as it is just now."""
        return max(_FLOOR_MS, _TIMES * abs(_shift(self.foreign, self.again)))

    @property
    def chance(self) -> float:
        """How likely it is that nothing but chance tells the two apart."""
        return unlike(self.foreign, self.unknown)

    @property
    def tells(self) -> bool:
        """Whether they can be told apart. What could not be measured is not alike."""
        if not (self.foreign and self.again and self.unknown):
            return True
        return self.chance < _LIKELY and abs(self.shift_ms) > self.floor_ms


def unlike(first: Sequence[float], second: Sequence[float]) -> float:
    """The test of Mann and Whitney, from both sides: how likely ranks as uneven as these are when both come from the same.

    By the normal distribution, which is close enough from ten of each on; alike values share their rank.
    """
    both = sorted((*first, *second))
    many, of_one = len(both), len(first)
    ranks = sum(bisect.bisect_left(both, one) + bisect.bisect_right(both, one) + 1 for one in first) / 2
    uneven = abs(ranks - of_one * (of_one + 1) / 2 - of_one * len(second) / 2)
    ties = sum(count**3 - count for count in Counter(both).values())
    spread = of_one * len(second) / 12 * (many + 1 - ties / (many * (many - 1))) if many > 1 else 0.0
    if spread <= 0:
        return 1.0
    return math.erfc(max(uneven - 0.5, 0.0) / math.sqrt(2 * spread))


def _shift(first: Sequence[float], second: Sequence[float]) -> float:
    """By how much the first are more: the middle of all differences (Hodges and Lehmann), which a few late ones do not move."""
    return statistics.median(one - other for one in first for other in second)


async def measured(world: World, way: Way, example: Example, pairs: int, oracle_ms: float = 0.0) -> dict[str, Any]:
    """How long reading something foreign and something unknown takes, by each attacker; `oracle_ms` is made up on top, and must be found.

    What seems to tell is measured once more: it counts when it is there again, in the same direction.
    """
    found: dict[str, Any] = {}
    for name in ("F",) if example.by in (ADMIN, OPERATOR) else ("B", "C"):
        if not world[name].things.ids:
            continue
        # the others of them only when it is about their tenant: half as often
        times = await _times(world, way, example, world[name], pairs if name != "C" else math.ceil(pairs / 2), oracle_ms)
        differs = times.tells
        if differs:
            first, times = times, await _times(world, way, example, world[name], pairs, oracle_ms)
            differs = times.tells and not _opposed(first, times)
        found[name] = _said(times) | {"tells": differs}
    return found


def _opposed(one: Times, other: Times) -> bool:
    return bool(one.foreign and other.foreign) and (one.shift_ms > 0) != (other.shift_ms > 0)


async def _times(world: World, way: Way, example: Example, attacker: Party, pairs: int, oracle_ms: float) -> Times:
    base = await way.ready(example, attacker)
    place = next((place for place in way.places(base) if example.reads in place), None)
    if place is None:
        raise LookupError(f"{example.name} has no place for {example.reads}")
    # of A, services have told while they were tried that they are of the administrator's own tenant: what is read of that is not foreign
    there = world["B" if attacker is world["F"] else "A"].things[example.reads]
    found: dict[str, list[float]] = {kind: [] for kind in KINDS}
    order, chance, began = list(KINDS), random.Random(pairs), time.monotonic()
    for at in range(pairs * _ROUNDS):
        # whether it is enough, only the same with the same says
        if at and at % pairs == 0 and (not Times.of(found).blind or time.monotonic() - began > _LONGEST_S):
            break
        # in any order: whatever one question does to the next one, it does to all
        chance.shuffle(order)
        took = {kind: await _once(way, base, place, twin(example.reads, "") if kind == "unknown" else there) for kind in order}
        if None not in took.values():
            for kind, one in took.items():
                found[kind].append((one or 0.0) + (oracle_ms if kind != "unknown" else 0.0))
    return Times.of(found if len(found["foreign"]) > pairs / 2 else dict.fromkeys(KINDS, ()))


async def _once(way: Way, base: Asked, place: leaves.Path, value: str) -> float | None:
    asked = way.written(base, place, value)
    began = time.perf_counter()
    answer = await way.ask(asked)
    return None if answer.code in _OTHERWISE else (time.perf_counter() - began) * 1000


def _said(times: Times) -> dict[str, Any]:
    """For the report."""
    if not times.foreign:
        return {}
    middle: dict[str, Any] = {f"{kind}_ms": round(statistics.median(getattr(times, kind)), 2) for kind in ("foreign", "unknown")}
    middle |= {"of": len(times.foreign), "blind": times.blind}
    return middle | {"shift_ms": round(times.shift_ms, 3), "floor_ms": round(times.floor_ms, 3), "chance": float(f"{times.chance:.1e}")}


def tells(found: dict[str, Any]) -> bool:
    """Whether the difference is one that somebody could see."""
    return any(one["tells"] for one in found.values())


def blind(found: dict[str, Any]) -> bool:
    """Whether too much else went on to see a difference that anybody could."""
    return any(one.get("blind", True) for one in found.values())
