"""Attacks on the tier `command`, through the tier itself."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import orjson

from netra import errors
from services.dispatcher.tools.sandbox import tiers
from services.dispatcher.tools.sandbox.command import Command
from services.dispatcher.tools.sandbox.guardian import Guardian
from tests.prove.sandbox import command_attacks, kills, trial
from tests.prove.sandbox.attack import Attack
from tests.prove.sandbox.report import Report
from tests.prove.sandbox.stage import Stage

_MIB = 1 << 20
ATTACKS = tuple(command_attacks.ATTACKS)
LIMITS = tiers.Limits(
    wall_s=15.0, cpu_s=1.0, memory=256 * _MIB, processes=40, file_size=8 * _MIB, disk=24 * _MIB, files=200, output=_MIB
)  # fmt: skip


def job(code: str, place: Stage, folder: Path) -> tiers.Job:
    """One call."""
    told = orjson.dumps({**place.facts, "code": code})
    return tiers.Job(folder, LIMITS, argv=("python3", "-c", command_attacks.PROGRAM), arguments=told)


def jobs(codes: Sequence[str]) -> Callable[[Stage, Path], tiers.Job]:
    """One call that makes many, each in a process of its own."""

    def way(place: Stage, folder: Path) -> tiers.Job:
        told = orjson.dumps({**place.facts, "codes": codes})
        limits = dataclasses.replace(LIMITS, cpu_s=20.0, wall_s=60.0)
        return tiers.Job(folder, limits, argv=("python3", "-c", command_attacks.PROGRAM_OF_MANY), arguments=told)

    return way


async def attacked(attacks: Sequence[Attack] = ATTACKS, endings: int = 0) -> Report:
    """Start the tier and attack it. Where it is not available, all calls must be refused."""
    guardian = Guardian(30.0)
    sandbox = Command(guardian, most=4)
    report = Report("command", os.getuid())
    with Stage() as place:
        try:
            if await trial.available(sandbox, report):
                trial.told(report, await trial.all_tried(sandbox, attacks, place, job, together=jobs))
                report.endings = await kills.ended(kills.of_command(sandbox, place), endings)
            else:
                report.refused &= all([await _refused(sandbox, attack, place) for attack in attacks])
        finally:
            await sandbox.close()
            await guardian.close()
        report.survivors, report.untouched = len(place.survivors()), place.untouched()
    return report


async def _refused(sandbox: Command, attack: Attack, place: Stage) -> bool:
    try:
        await sandbox.run(job(attack.code, place, place.folder()))
    except errors.SandboxUnavailable as error:
        return bool(error.details.get("remedy"))
    return False
