"""One proof: a system and its people, everything asked in the wrong names, quiet and not, and the verdict."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tests.prove.isolation import asking, nemesis, place, probes, pulse, sharing, tables, timing, universe
from tests.prove.isolation.asking import Way
from tests.prove.isolation.example import ANY, OPERATOR, Example
from tests.prove.isolation.judge import Findings, Judge
from tests.prove.isolation.world import World

# what can be made up: a leak, an answer that tells, a control that fails, an example that is missing, an answer that takes longer
FORGERIES = ("leak", "difference", "control", "missing", "oracle")
_AT_ONCE = 64
_QUIET = 8
_PROGRESS_S = 15
# what was broken may need a moment
_AFTERWARDS = 4
# of what is asked when it is quiet, the part that is asked once more when it is not
_SHARE, _VALUES = 0.4, 2
Tell = Callable[[str], None]
All = Mapping[str, tuple[Way, Example]]


@dataclass(frozen=True, slots=True)
class Wanted:
    """How long others act, and faults strike, each; how many of them; from which seed; what is made up and must be found."""

    seconds: float = 30.0
    faults: int = 11
    seed: int = 1
    pairs: int = timing.PAIRS
    # the part of the places that is tried; less is a quick look and no proof
    share: float = 1.0
    forged: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Floor:
    """What must have been done at least, so that nothing found means something."""

    probes: int = 3_000
    pairs: int = 1
    faults: int = 1
    share: float = 1.0
    # streams that were listened to until their owner's had heard something
    held: int = 1

    def short(self, found: Findings, wanted: Wanted, report: Mapping[str, Any]) -> list[str]:
        """Why it is no proof."""
        struck = sum(report.get("faults", {}).values())
        done = {
            "probes": (found.probes, self.probes), "pairs": (wanted.pairs, self.pairs), "faults": (struck, max(wanted.faults, self.faults)),
            "share": (wanted.share, self.share), "held": (found.held, self.held),
        }  # fmt: skip
        return [f"{name}: {much}, {least} are a proof" for name, (much, least) in done.items() if much < least]


# of all that is asked
WHOLE = Floor()


async def prove(wanted: Wanted, tell: Tell) -> dict[str, Any]:
    """The report; `ok` says whether nothing is off."""
    began, chance = time.monotonic(), random.Random(wanted.seed)
    tell("starting a system, and its people ...")
    async with place.running() as where:
        world, report = where.world, dict[str, Any](share=wanted.share)
        findings = Findings(forged=set(wanted.forged))
        judge = Judge(findings, [world[name] for name in ("A", "B", "C")])
        known, missing, figures = await coverage(world, wanted.forged)
        tell(f"controls of {len(known)} examples ...")
        await controls(world, judge, known)
        live = pulse.Pulse(world, world["A"], judge)
        await live.open()
        before = await tables.still(world, world["A"].user_id)
        report["changed"] = await _quietly(world, judge, known, wanted, chance, before, live, tell)
        tell(f"{findings.probes} probes, {len(findings.leaks)} leaks; the tables, in the names of others ...")
        report["tables"] = await tables.probe(world, where.system, judge)
        tell("a thread, and everybody who may stand to it in some way ...")
        shared = await sharing.probe(world, judge)
        # meanwhile its tokens end
        report["timing"] = await _timed(world, known, wanted, tell)
        report["sharing"] = await sharing.over(shared)
        async with live.beating(quiet=False):
            report["faults"] = await _meanwhile(where, judge, known, wanted, chance, tell)
        report["marks"] = live.recorded
        await nemesis.recovered(world)
        tell("controls once more ...")
        await controls(world, judge, known, _AFTERWARDS)
        lost = tables.changed(before, await tables.digests(world, world["A"].user_id), more=True)
        report["changed"] += [one for one in lost if one not in report["changed"]]
    report["seconds"] = round(time.monotonic() - began, 1)
    return verdict(findings, missing, figures, report, wanted)


async def _quietly(
    world: World,
    judge: Judge,
    known: All,
    wanted: Wanted,
    chance: random.Random,
    before: dict[str, set[str]],
    live: pulse.Pulse,
    tell: Tell,
) -> list[str]:
    """Everything by everybody while nothing but the owner's run goes on; what of the owner's has changed that should not."""
    recorded = live.recorded
    tell("everything asked in the names of others ...")
    prober = probes.Prober(world, judge, chance, wanted.share, room=asyncio.Semaphore(_QUIET))
    async with live.beating(), asyncio.TaskGroup() as group:
        telling = group.create_task(_progress(judge.findings, tell))
        await asked(prober, known)
        telling.cancel()
    if wanted.share >= 1:
        judge.shallow(name for name, (_, example) in known.items() if ANY not in example.legit)
    return pulse.changed(before, await tables.digests(world, world["A"].user_id), live.recorded - recorded)


async def coverage(world: World, forged: frozenset[str] = frozenset()) -> tuple[All, list[str], dict[str, list[int]]]:
    """The examples; what has none; of each kind how many have one and how many there are."""
    there, known = await universe.seen(world), universe.examples(world)
    if "missing" in forged:
        known.pop("context.GetThread")
    covered = universe.covered(there, set(known))
    missing = [f"{kind}: {name}" for kind, names in there.kinds().items() for name in sorted(names - covered[kind])]
    return known, missing, {kind: [len(covered[kind]), len(names)] for kind, names in there.kinds().items()}


async def controls(world: World, judge: Judge, known: All, tries: int = 1) -> None:
    """Every owner's own call; those that change what all go by one after the other."""
    room = asyncio.Semaphore(_QUIET)

    async def one(name: str, way: Way, example: Example) -> None:
        for who in probes.controls_of(world, example):
            async with room:
                await probes.control(world, judge, way, example, name, who, tries)

    async with asyncio.TaskGroup() as group:
        for name, (way, example) in known.items():
            if example.by != OPERATOR:
                group.create_task(one(name, way, example))
    for name, (way, example) in known.items():
        if example.by == OPERATOR:
            await one(name, way, example)


async def asked(prober: probes.Prober, known: All) -> None:
    """Every example, in the names of others."""
    async with asyncio.TaskGroup() as group:
        for name, (way, example) in known.items():
            group.create_task(prober.course(way, example, name))


async def _progress(findings: Findings, tell: Tell) -> None:
    """Tell of what is found when it is found."""
    told = dict[str, int]()
    while True:
        await asyncio.sleep(_PROGRESS_S)
        for kind in ("leaks", "differences", "wrong"):
            found: list[str] = getattr(findings, kind)
            for one in found[told.get(kind, 0) :]:
                tell(f"  {kind}: {one}")
            told[kind] = len(found)
        tell(f"  {findings.probes} probes, {len(findings.leaks)} leaks, {len(findings.differences)} differences")


async def _timed(world: World, known: All, wanted: Wanted, tell: Tell) -> dict[str, Any]:
    pairs, found = wanted.pairs, dict[str, dict[str, Any]]()
    # an RPC over /rpc takes as long as over gRPC, and what the gateway does beside
    reading = {name: one for name, one in known.items() if one[1].reads and pairs and not isinstance(one[0], asking.Edge)}
    tell(f"the time that {len(reading)} answers take ...")
    for name, (way, example) in reading.items():
        oracle_ms = timing.SEEN_MS if "oracle" in wanted.forged and not found else 0.0
        found[name] = await timing.measured(world, way, example, pairs if isinstance(way, asking.Rpc) else max(pairs // 4, 1), oracle_ms)
    told, blind = ([name for name, one in found.items() if is_so(one)] for is_so in (timing.tells, timing.blind))
    return {"pairs": pairs, "told": told, "blind": blind, "medians": found}


async def _meanwhile(where: place.Place, judge: Judge, known: All, wanted: Wanted, chance: random.Random, tell: Tell) -> dict[str, int]:
    """The same by many at once while everybody acts, and while processes die."""
    over, struck = asyncio.Event(), dict[str, int]()
    names = sorted(known)

    def told(name: str) -> None:
        tell(f"  {name}")

    async def again(stop: asyncio.Event) -> None:
        prober = probes.Prober(where.world, judge, chance, _SHARE, quiet=False, values=_VALUES, room=asyncio.Semaphore(_AT_ONCE))
        while not stop.is_set():
            some = chance.sample(names, min(_AT_ONCE, len(names)))
            await asked(prober, {name: known[name] for name in some})

    async with asyncio.TaskGroup() as group:
        for name in ("A", "B", "C"):
            for work in (nemesis.act, nemesis.watch):
                group.create_task(work(where.world, where.world[name], judge, over, random.Random(chance.random())))
        for begins, many in (("while everybody acts ...", 0), ("while processes die, stop and forget ...", wanted.faults)):
            tell(begins)
            stop = asyncio.Event()
            asking = group.create_task(again(stop))
            if many:
                struck = await nemesis.strike(where, many, wanted.seconds, chance, told)
            else:
                await asyncio.sleep(wanted.seconds)
            stop.set()
            await asking
        over.set()
    return struck


def verdict(
    findings: Findings, missing: list[str], figures: dict[str, list[int]], report: dict[str, Any], wanted: Wanted, floor: Floor = WHOLE
) -> dict[str, Any]:
    """The report, with what was found out; too little is no proof."""
    told, short = report.get("timing", {}).get("told", []), floor.short(findings, wanted, report)
    return {
        "proof": "isolation",
        "ok": findings.ok and not (missing or told or short or report.get("changed")),
        "probes": findings.probes,
        "leaks": len(findings.leaks),
        **figures,
        "controls": findings.controls,
        "controls_failed": findings.told("controls_failed"),
        "missing": missing,
        "differences": len(findings.differences),
        "first": findings.told("off"),
        "wrong": len(findings.wrong),
        "short": short,
        "held": findings.held,
        "heard": findings.heard,
        "outcomes": dict(findings.outcomes.most_common()),
        **report,
    }
