"""What every measurement says at its end: a table as CSV, then one line of JSON; and how its ways take turns."""

from __future__ import annotations

import csv
import json
import os
import statistics
import sys
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import TypeVar

T = TypeVar("T")


async def in_turn(ways: Mapping[str, Callable[[], Awaitable[T]]], rounds: int) -> dict[str, list[T]]:
    """What each way comes to, by round. Whatever else the machine does falls on all alike; a round before the first warms up."""
    found: dict[str, list[T]] = {name: [] for name in ways}
    names = list(ways)
    for number in range(-1, rounds):
        first = number % len(names)
        for name in (*names[first:], *names[:first]):
            measured = await ways[name]()
            if number >= 0:
                found[name].append(measured)
    return found


def ratios(ones: Iterable[float], others: Iterable[float]) -> list[float]:
    """Of each round, smallest first."""
    return sorted(one / other for one, other in zip(ones, others, strict=True))


def ratio(ones: Iterable[float], others: Iterable[float]) -> float:
    """The middle one of the rounds'."""
    return statistics.median(ratios(ones, others))


def spread(values: Sequence[float], digits: int = 1) -> tuple[str, str, str]:
    """Median, lowest and highest, as cells of the table."""
    return tuple(f"{value:.{digits}f}" for value in (statistics.median(values), min(values), max(values)))  # type: ignore[return-value]


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """The figures."""
    written = csv.writer(sys.stdout)
    written.writerow(header)
    written.writerows(rows)


def verdict(bench: str, ok: bool, goal: str, figure: str, **told: object) -> int:
    """The line at the end, with the load of the machine; returns the exit code: 1 when a goal is missed."""
    print(json.dumps({"bench": bench, "ok": ok, "goal": goal, "figure": figure, **told, "load": round(os.getloadavg()[0], 1)}), flush=True)
    return 0 if ok else 1
