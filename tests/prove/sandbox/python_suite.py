"""Attacks on the tier `python`, through it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence

import orjson

from netra import errors
from services.dispatcher.tools.sandbox.python import Python
from services.dispatcher.tools.sandbox.tiers import Job, Limits
from tests.prove.sandbox import kills, python_attacks, trial
from tests.prove.sandbox.attack import ALLOWED, ESCAPED, Attack, says
from tests.prove.sandbox.report import Report
from tests.prove.sandbox.stage import Stage

LIMITS = Limits(wall_s=20.0, cpu_s=1.0, memory=256 << 20, disk=32 << 20)
_AT_ONCE = 8
_MODULE = "netra.tool"
ATTACKS = tuple(python_attacks.ATTACKS)


async def attacked(attacks: Sequence[Attack] = ATTACKS, endings: int = 0, *, namespaces: bool | None = None) -> Report:
    """Start the tier and attack it."""
    report = Report("python", os.getuid())
    with Stage() as stage:
        tier = Python(stage.folders, modules=["netra", _MODULE], namespaces=namespaces, concurrency=_AT_ONCE)
        try:
            if await trial.available(tier, report):
                await _all(tier, attacks, stage, report)
                report.endings = await kills.ended(kills.of_python(tier, stage), endings)
        finally:
            await tier.close()
        report.survivors, report.untouched = len(stage.survivors()), stage.untouched()
    return report


async def _all(tier: Python, attacks: Sequence[Attack], stage: Stage, report: Report) -> None:
    report.attacks, report.families = len(attacks), len({attack.family for attack in attacks})
    await asyncio.to_thread(_outside, stage, attacks, report)
    turns = asyncio.Semaphore(_AT_ONCE)
    # many attacks have the same control
    controls = list({attack.control for attack in attacks if attack.control})
    codes = [*(attack.code for attack in attacks), *controls]
    # every other one where modules of tools are there already: whichever these are, both ways are among the suites
    first = bool(report.enforcement.get("namespaces"))
    modules = [_MODULE if (number % 2 == 0) is first else "" for number in range(len(codes))]
    asked = (_said(tier, stage, code, turns, module) for code, module in zip(codes, modules, strict=True))
    said = dict(zip(codes, await asyncio.gather(*asked), strict=True))
    report.escaped = [attack.name for attack in attacks if says(said[attack.code], ESCAPED)]
    silent = [attack for attack in attacks if attack.control and not says(said[attack.control], ALLOWED)]
    report.controls_failed += [f"{attack.name}: {said[attack.control][-200:]}" for attack in silent]


def _outside(stage: Stage, attacks: Sequence[Attack], report: Report) -> None:
    free = [attack for attack in attacks if attack.outside]
    for attack, said in zip(free, stage.outside([attack.code for attack in free]), strict=True):
        if not says(said, ESCAPED):
            report.controls_failed.append(f"{attack.name} (outside): {said[-200:]}")


async def _said(tier: Python, stage: Stage, code: str, turns: asyncio.Semaphore, module: str) -> str:
    """What the code printed, and what became of it."""
    job = Job(stage.folder(), LIMITS, code=code, arguments=orjson.dumps(stage.facts), environment={"GIVEN": "yes"}, module=module)
    try:
        async with turns:
            return (await tier.run(job)).output
    except errors.NetraError as error:
        return f"{error.details.get('output', '')}\n{error.code}: {error.message}"
