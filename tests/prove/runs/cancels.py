"""Cancels: how long it takes from the wish to the proof, and whether anything of the run is left then."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.fixtures import sockets
from tests.prove.runs import agents, clients, judge, outside, place

_AT_ONCE, _BEGINS_S, _ENDS_S = 4, 20.0, 30.0
# asked for before anything of the run is known
RACING = "at once"
_BY_WAY = {"sleep": 1, "approval": 1, RACING: 0}
_SHOWN = {"agent_started", "tool_executing", "agent_suspended"}
# a run that does not hear of it is ended with its lease, and sees that it is to stop with the next renewal
BOUND = judge.Bound(promised_ms=250.0, gross_ms=10_000.0)


async def measure(where: place.Place, many: int, tell: Callable[[str], None], *, alone: bool = True) -> dict[str, Any]:
    """So many cancels, in turn of runs that do each of several things. `alone`: nothing else works on this machine."""
    found: dict[str, list[float]] = {way: [] for way in (*agents.WAYS_TO_WAIT, RACING)}
    wrong: list[str] = []
    room = asyncio.Semaphore(_AT_ONCE)
    desk = clients.Desk(where.http)

    async def one(number: int) -> None:
        way = list(found)[number % len(found)]
        async with room:
            ms, problems = await _cancel(where, desk, where.users[number % len(where.users)], way)
        # what did not come to its place was not cancelled: it took no time, and not none
        found[way] += [] if ms is None else [ms]
        wrong.extend(problems)

    async with asyncio.TaskGroup() as group:
        for number in range(many):
            group.create_task(one(number))
    every = [ms for times in found.values() for ms in times]
    wrong += BOUND.exceeded("from the wish to the proof of a cancel", every, alone=alone)
    tell(f"  {len(every)} cancels: {judge.percentiles(every)} ms, {len(wrong)} wrong")
    return {
        "cancelled": len(every), "ms": judge.percentiles(every), "by_way": {way: judge.percentiles(times) for way, times in found.items()},
        "wrong": wrong[:10], "wrong_n": len(wrong),
    }  # fmt: skip


async def _cancel(where: place.Place, desk: clients.Desk, user: place.User, way: str) -> tuple[float | None, list[str]]:
    """Milliseconds from the wish to the event at the client, None for a run that could not be cancelled; and what was wrong with it."""
    mark = user.mark()
    inputs = {"folder": str(where.folder), "mark": mark, "way": "process" if way == RACING else way}
    async with sockets.opened(where.system, user.person.token, proxy=None) as socket:
        run_id = await desk.start(user.person, "asleep", inputs)
        if not run_id:
            return None, [f"{way}: its start was refused"]
        where.started[run_id] = place.Started(user, judge.Accepted(run_id, user.person.user_id, "asleep", mark, end="agent_cancelled"))
        if way != RACING and not await clients.until(lambda: _under_way(where, way, mark, run_id), _BEGINS_S):
            return None, [f"{way}: {run_id} did not come to what is cancelled"]
        asked = time.monotonic()
        await socket.send("CANCEL", {"run_id": run_id})
        events: list[judge.Frame] = []
        try:
            async with asyncio.timeout(_ENDS_S):
                events = await socket.ended(run_id)
        except TimeoutError:
            return _ENDS_S * 1000, [f"{way}: {run_id} was not cancelled"]
        ms, told = (time.monotonic() - asked) * 1000, time.time()
    return ms, await _left(where, way, mark, events[-1], told)


def _under_way(where: place.Place, way: str, mark: str, run_id: str) -> bool:
    kinds = {frame["type"] for frame in where.started[run_id].seen}
    if way in ("sleep", "approval"):
        return ("agent_suspended" if way == "approval" else "agent_started") in kinds
    beating = {line.name for line in outside.lines(where.folder, outside.BEATS) if line.of == mark}
    return beating == {"tool": {"linger"}, "child": {"linger"}, "process": {"toil"}, "gather": {"linger", "toil"}}[way]


async def _left(where: place.Place, way: str, mark: str, end: judge.Frame, told: float) -> list[str]:
    """What is wrong after the proof: another end, a process that lives, a call that goes on."""
    wrong = [] if end["type"] == "agent_cancelled" else [f"{way}: ends with {end['type']}"]
    pids = {line.pid for line in outside.lines(where.folder, outside.BEATS) if line.of == mark and line.name == "toil"}
    wrong += [f"{way}: process {pid} of its tool lives" for pid in pids if _lives(pid)]
    await asyncio.sleep(0.1)
    late = [line for line in outside.lines(where.folder, outside.BEATS) if line.of == mark and line.at > told]
    return wrong + [f"{way}: {line.name} goes on {line.at - told:.3f} s after the proof" for line in late[:1]]


def _lives(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"
