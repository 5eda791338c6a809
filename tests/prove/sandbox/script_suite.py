"""Attacks on the tier `script`, through the tier itself."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import orjson

from services.dispatcher.tools.sandbox import tiers
from services.dispatcher.tools.sandbox.guardian import Guardian
from services.dispatcher.tools.sandbox.script import Script
from tests.prove.sandbox import kills, script_attacks, trial
from tests.prove.sandbox.attack import Attack
from tests.prove.sandbox.report import Report
from tests.prove.sandbox.stage import Stage

LIMITS = tiers.Limits(wall_s=4.0, cpu_s=0.2, memory=64 << 20, output=1 << 16)
ATTACKS = tuple(script_attacks.ATTACKS)
# what looks for what it left comes to the same interpreter again, where nobody else does
_OWNERS = {attack.code: attack.name for attack in script_attacks.ATTACKS if attack.family == "leftovers"}


def job(code: str, place: Stage, folder: Path) -> tiers.Job:
    """One call of an attacker."""
    return tiers.Job(folder, LIMITS, code=code, arguments=orjson.dumps(place.facts), owner=_OWNERS.get(code, "attacker"))


async def attacked(attacks: Sequence[Attack] = ATTACKS, endings: int = 0) -> Report:
    """Start the tier and attack it."""
    guardian = Guardian(30.0)
    sandbox, bare = Script(guardian, most=4), Script(guardian, most=4, spares=0)
    report = Report("script", os.getuid())
    with Stage() as place:
        try:
            if await trial.available(sandbox, report):
                trial.told(report, await trial.all_tried(sandbox, attacks, place, job))
                await bare.start()
                report.endings = await kills.ended(kills.of_script(bare, place), endings)
        finally:
            await bare.close()
            await sandbox.close()
            await guardian.close()
        report.survivors, report.untouched = len(place.survivors()), place.untouched()
    return report
