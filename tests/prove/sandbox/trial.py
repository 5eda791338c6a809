"""Attacks made on a tier through its `run`, their controls with them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from netra import errors
from services.dispatcher.tools.sandbox import sandboxes, tiers
from tests.prove.sandbox import stage
from tests.prove.sandbox.attack import ALLOWED, ESCAPED, Attack, says
from tests.prove.sandbox.report import Report

# what a user may make of a piece of attacking code: the job of one call
Make = Callable[[str, stage.Stage, Path], tiers.Job]
# the same of many pieces, each of which is kept from the others: the result is a list of what they printed
Together = Callable[[Sequence[str]], Callable[[stage.Stage, Path], tiers.Job]]
# attacks of these families take so much, or look so closely, that each is made alone
_ALONE = frozenset("fork threads memory cpu disk inodes output leftovers daemons descriptors signals".split())


@dataclass(frozen=True, slots=True)
class Trial:
    """What became of one attack: whether it got through, and which of its controls did not show what they must; `told` is what was said."""

    attack: Attack
    escaped: bool
    missing: tuple[str, ...]
    told: str


async def available(sandbox: tiers.Sandbox, report: Report) -> bool:
    """Start and probe it as a dispatcher does; whether it is there. It must not be handed out before, nor when it is not."""
    parts = sandboxes.Sandboxes({report.tier: sandbox})  # type: ignore[dict-item]
    await parts.start()
    unprobed = parts.availability(report.tier).available  # type: ignore[arg-type]
    await parts.probe(_nobody_is_told)
    found = parts.availability(report.tier)  # type: ignore[arg-type]
    report.available, report.reason, report.enforcement = found.available, found.reason, found.enforcement()
    report.probed = not unprobed
    try:
        await parts.tier(report.tier)  # type: ignore[arg-type]
    except errors.SandboxUnavailable as error:
        report.refused = bool(error.details.get("remedy"))
    return found.available


async def _nobody_is_told(_found: tiers.Availability) -> None:
    """Nothing is done."""


async def printed(sandbox: tiers.Sandbox, job: tiers.Job) -> str:
    """What the code printed, or the error it ended with."""
    try:
        ended = await sandbox.run(job)
    except errors.NetraError as error:
        return f"{type(error).__name__}: {error.message}"
    result = json.loads(ended.result)
    return f"{ended.output}\n{result if isinstance(result, str) else json.dumps(result)}"


async def all_tried(
    sandbox: tiers.Sandbox, attacks: Sequence[Attack], place: stage.Stage, make: Make, *, together: Together | None = None, at_once: int = 4
) -> list[Trial]:
    """Make them all, some at a time. Those of families that disturb nobody are made in one call where `together` tells how."""
    codes = {attack.name: attack.code for attack in attacks if attack.outside}
    outside = dict(zip(codes, await asyncio.to_thread(place.outside, list(codes.values())), strict=True))
    mild = [attack for attack in attacks if together is not None and attack.family not in _ALONE]
    slots = asyncio.Semaphore(at_once)

    async def alone(code: str) -> str:
        async with slots:
            return await printed(sandbox, make(code, place, place.folder())) if code else ""

    async def in_turns(attack: Attack) -> tuple[str, str]:
        said = await alone(attack.code)
        if attack.family == "leftovers":  # the second looks for what the first left
            said += await alone(attack.code)
        return said, await alone(attack.control)

    found: dict[str, tuple[str, str]] = {}
    if together is not None and mild:
        ways = [together([attack.code for attack in mild]), together([attack.control for attack in mild])]
        said, controls = [json.loads((await sandbox.run(way(place, place.folder()))).result) for way in ways]
        found |= {attack.name: (one, control) for attack, one, control in zip(mild, said, controls, strict=True)}
    rest = [attack for attack in attacks if attack.name not in found]
    found |= {attack.name: both for attack, both in zip(rest, await asyncio.gather(*map(in_turns, rest)), strict=True)}
    return [_judged(attack, *found[attack.name], outside.get(attack.name, "")) for attack in attacks]


def _judged(attack: Attack, said: str, control: str, outside: str) -> Trial:
    missing = []
    if attack.control and not says(control, ALLOWED):
        missing.append(f"control: {control[-500:]}")
    if attack.outside and not says(outside, ESCAPED):
        missing.append(f"outside: {outside[-500:]}")
    return Trial(attack, says(said, ESCAPED), tuple(missing), said[-500:])


def told(report: Report, trials: Sequence[Trial]) -> None:
    """Add what became of the attacks to the report."""
    report.attacks = len(trials)
    report.families = len({found.attack.family for found in trials})
    report.escaped += [found.attack.name for found in trials if found.escaped]
    report.controls_failed += [f"{found.attack.name} {what}" for found in trials for what in found.missing]


def one_of_each(attacks: Sequence[Attack]) -> list[Attack]:
    """The first of each family."""
    return list({attack.family: attack for attack in reversed(attacks)}.values())
