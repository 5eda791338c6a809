"""One proof: a system, runs, faults, and the verdict."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tests.prove.runs import answers, cancels, fairness, judge, matrix, place, restarts, storm

Tell = Callable[[str], None]
PARTS = ("matrix", "storm", "cancels", "restarts", "fairness")


@dataclass(frozen=True, slots=True)
class Wanted:
    """How much of each, from which seed. `cells` is the share of the places that each volley strikes; `faults` empty means all.

    What is promised of times is judged where the proof is `alone` on its machine; else it is told, and fails when it is grossly off.
    """

    volleys: int = 2
    cells: float = 1.0
    faults: Sequence[str] = ()
    minutes: float = 1.0
    storms: int = 20
    cancels: int = 210
    users: int = 50
    runs: int = 20
    noise: int = 1000
    seed: int = 1
    parts: Sequence[str] = PARTS
    alone: bool = True


async def prove(wanted: Wanted, tell: Tell) -> dict[str, Any]:
    """The report; `ok` says whether nothing is wrong."""
    began, chance = time.monotonic(), random.Random(wanted.seed)
    report: dict[str, Any] = {"proof": "runs", "ok": False}
    wrong: list[str] = []
    async with _answering(max(wanted.users if "restarts" in wanted.parts else 0, 8), tell) as where:
        if "matrix" in wanted.parts:
            await _matrix(where, wanted, chance, tell, report, wrong)
        if "cancels" in wanted.parts and wanted.cancels:
            tell("cancels ...")
            report["cancels"] = await cancels.measure(where, wanted.cancels, tell, alone=wanted.alone)
            wrong += report["cancels"]["wrong"]
        if "storm" in wanted.parts and wanted.minutes:
            tell(f"{wanted.storms} faults at any moment, in {wanted.minutes:g} minutes ...")
            report["storm"] = dict(await storm.blow(where, wanted.minutes, wanted.storms, chance, tell))
        if "restarts" in wanted.parts and wanted.runs:
            tell(f"{wanted.users} users with {wanted.runs} runs each, and rolling restarts ...")
            report["restarts"] = await restarts.roll(where, wanted.users, wanted.runs, chance, tell)
            wrong += [f"a start was refused: {one}" for one in report["restarts"]["refused"]]
        tell(f"{len(where.started)} runs; the verdict ...")
        await where.ended(60.0)
        verdict = judge.judged(await where.evidence())
        wrong += [one for user in where.users for one in user.follower.wrong]
        if wrong or not verdict.ok:
            tell(f"something is wrong; logs, stores and effects are left in {where.keep()}")
        report["sockets"] = {"clients": len(where.users), **report.get("sockets", {}), "lost": where.sockets_lost}
    if "fairness" in wanted.parts and wanted.noise:
        tell(f"fairness: {wanted.noise} runs of one user ...")
        report["fairness"] = await _fairness(wanted, chance, tell, wrong)
    return _whole(report, verdict, wrong, len(where.started), time.monotonic() - began)


@contextlib.asynccontextmanager
async def _answering(many: int, tell: Tell, **settings: str) -> AsyncIterator[place.Place]:
    tell("starting two dispatchers over one database ...")
    async with place.running(many, **settings) as where, asyncio.TaskGroup() as group:
        people = group.create_task(answers.give(where))
        try:
            yield where
        finally:
            people.cancel()


async def _matrix(where: place.Place, wanted: Wanted, chance: random.Random, tell: Tell, report: dict[str, Any], wrong: list[str]) -> None:
    tell(f"the crash matrix: {len(matrix.CELLS)} places, {len(wanted.faults or matrix.FAULTS)} faults, {wanted.volleys} times ...")
    figures, desk, cells = await matrix.fire(where, wanted.volleys, wanted.cells, chance, tell, wanted.faults)
    report |= figures.report(cells)
    outlived = dict(figures.sockets_lost)
    report["sockets"] = {"resumed_after_the_gateway": outlived.pop(matrix.GATEWAY, 0), "lost_by_fault": outlived}
    wrong += [f"a run did not come to its place: {one}" for one in figures.missed]
    wrong += [f"a run was not taken over in time: {one}" for one in figures.late]
    wrong += figures.exceeded(alone=wanted.alone)
    wrong += [f"{many} sockets did not outlive: {fault}" for fault, many in outlived.items() if many]
    wrong += [f"a start was refused: {one}" for one in desk.refused]


async def _fairness(wanted: Wanted, chance: random.Random, tell: Tell, wrong: list[str]) -> dict[str, Any]:
    async with _answering(8, tell, NETRA_SLOTS=str(fairness.SLOTS)) as where:
        found = await fairness.measure(where, wanted.noise, chance, tell, alone=wanted.alone)
    wrong += found["wrong"]
    return found


def _whole(report: dict[str, Any], verdict: judge.Verdict, wrong: list[str], runs: int, seconds: float) -> dict[str, Any]:
    counted = {kind: verdict.found[kind] for kind in judge.KINDS}
    figures = {"runs": runs, "events": verdict.events, "effects": verdict.effects, "repeated_uncommitted": verdict.repeated}
    ended = {"wrong": wrong[:20], "first": verdict.first, "seconds": round(seconds, 1)}
    shown = runs > 0 or report.get("fairness", {}).get("arrivals", 0) > 0
    return {**report, "ok": verdict.ok and not wrong and shown, **figures, **counted, **ended}
