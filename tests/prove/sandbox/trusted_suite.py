"""The processes of plain functions of the tier `trusted`: they are the operator's, no walls are around them, and they end when told."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from netra.tool import tool
from services.dispatcher.tools.sandbox import guardian, sandboxes, workers
from tests.fixtures.dispatchers import house
from tests.prove.sandbox import kills
from tests.prove.sandbox.attack import Attack
from tests.prove.sandbox.report import Endings, Report
from tests.prove.sandbox.stage import Stage

ATTACKS: tuple[Attack, ...] = ()


@tool(name="dies.twice", side_effects=True, timeout_s=60)
def with_effects(book: str) -> None:
    """Does something, and is killed in the midst of it, always."""
    _written_and_killed(book)


@tool(name="dies.once", idempotent=True, retries=2, timeout_s=60)
def idempotent(book: str) -> str:
    """Does something, and is killed in the midst of it, the first time."""
    if not Path(book).exists():
        _written_and_killed(book)
    return "done"


def _written_and_killed(book: str) -> None:
    with open(book, "a", encoding="ascii") as file:
        file.write("done\n")
    os.kill(os.getpid(), 9)


async def attacked(_attacks: Sequence[Attack] = ATTACKS, endings: int = 0) -> Report:
    """End its calls; a tool that has effects is never run again, one that may be, is."""
    report = Report("trusted", os.getuid(), available=True, probed=True, enforcement={"tier": "trusted", "backend": "worker"})
    guard = guardian.Guardian(30.0)
    pool = workers.Workers(4, guard)
    contained = sandboxes.Sandboxes({}, guard=guard, warm=pool)
    await contained.start()
    with Stage() as place:
        try:
            if endings:
                report.endings = await kills.ended(kills.of_workers(pool, place), endings)
                await _by_policy(place, contained, report.endings)
        finally:
            await contained.close()
        report.survivors, report.untouched = len(place.survivors()), place.untouched()
    return report


async def _by_policy(place: Stage, contained: sandboxes.Sandboxes, found: Endings) -> None:
    async with house(place.folder(), [with_effects, idempotent], contained=contained) as made:
        who = made.person()
        async with made.open(who) as tools:
            for spec, wanted in ((with_effects, ("error", 1, 1)), (idempotent, ("success", 2, 1))):
                book = place.folder() / "book"
                outcome = await tools.execute(spec.name, {"book": str(book)})
                got = (outcome.status, outcome.attempts, len(book.read_text().splitlines()))
                found.killed += 1
                if got != wanted:
                    found.wrong.append(f"{spec.name}: status, attempts, effects are {got}, not {wanted}")
