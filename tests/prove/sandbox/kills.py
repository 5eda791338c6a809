"""Calls that never end by themselves: of each tier, at their deadline, and with one of their processes killed."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from chassis import lifecycle
from netra import errors
from services.dispatcher.tools.sandbox import tiers, workers
from services.dispatcher.tools.sandbox.script import Script
from tests.prove.sandbox.report import Endings
from tests.prove.sandbox.stage import Stage

# time for a call to begin, and far more than any of them takes to end
_WALL_S, _LONG_S, _PATIENCE_S, _LOOK_S = 0.6, 60.0, 20.0, 0.03
_PYTHON = "import ctypes\nctypes.CDLL(None).prctl(15, mark.encode(), 0, 0, 0)\nwhile True:\n    pass"


async def _nothing(_number: int) -> None:
    """It is ready."""


@dataclass(frozen=True, slots=True)
class Endless:
    """How calls of a tier that run for ever are made: the numbered one, for at most so many seconds, and what there is of its processes.

    `ready` is awaited before each: what a call does not need to wait for is there.
    """

    run: Callable[[int, float], Coroutine[Any, Any, object]]
    processes: Callable[[], set[int]]
    ready: Callable[[int], Coroutine[Any, Any, object]] = _nothing
    # the death of each of these many, in the order of their birth, must end the call
    matter: int = 8


def of_python(sandbox: tiers.Sandbox, place: Stage) -> Endless:
    """A loop in Python, by its name in the process table."""
    told = orjson.dumps({"mark": place.facts["mark"]})
    return Endless(
        lambda _number, wall_s: sandbox.run(tiers.Job(place.folder(), _limits(wall_s), code=_PYTHON, arguments=told)),
        lambda: _alive(place.survivors()),
    )  # fmt: skip


def of_command(sandbox: tiers.Sandbox, place: Stage) -> Endless:
    """A loop in a shell, and what bubblewrap takes to run it."""
    argv = ("sh", "-c", "while :; do :; done", str(place.facts["mark"]))
    return Endless(
        lambda _number, wall_s: sandbox.run(tiers.Job(place.folder(), _limits(wall_s), argv=argv)), lambda: _alive(place.survivors())
    )


def of_script(sandbox: Script, place: Stage) -> Endless:
    """A script of a user for each call; the processes below the one that they are forked from are all theirs."""

    def job(number: int, wall_s: float, code: str) -> tiers.Job:
        return tiers.Job(place.folder(), _limits(wall_s), code=code, owner=f"user {number}")

    def processes() -> set[int]:
        template = sandbox._template
        return set() if template is None else _alive(below(template._process.pid))

    return Endless(
        lambda number, wall_s: sandbox.run(job(number, wall_s, "while True: pass")), processes,
        lambda number: sandbox.run(job(number, _LONG_S, "1")),
    )  # fmt: skip


def of_workers(pool: workers.Workers, place: Stage) -> Endless:
    """A plain function, and a process that it started."""

    async def call(name: str, number: int, wall_s: float) -> object:
        mark = str(place.facts["mark"])
        return await pool.run(
            "tests.prove.sandbox.endless", name, {"mark": mark}, user=f"user {number}", timeout_s=wall_s, folder=place.folder()
        )

    return Endless(
        lambda number, wall_s: call("spin", number, wall_s), lambda: _alive(place.survivors()),
        lambda number: call("echo", number, _LONG_S), matter=1,
    )  # fmt: skip


def _limits(wall_s: float) -> tiers.Limits:
    return tiers.Limits(wall_s, cpu_s=_LONG_S, memory=256 << 20, disk=8 << 20)


async def ended(endless: Endless, count: int) -> Endings:
    """So many calls come to their deadline; then one after the other of the processes of a call is killed, in as many calls."""
    found = Endings()
    tasks = lifecycle.Tasks(on_failure=lambda _error: None)  # how a call ends is asked of it
    for number in range(count):
        await _over_its_time(endless, number, tasks, found)
    which: int | None = 0 if count else None
    while which is not None:
        which = await _killed(endless, which, tasks, found)
    await tasks.close()
    return found


async def _over_its_time(endless: Endless, number: int, tasks: lifecycle.Tasks, found: Endings) -> None:
    await endless.ready(number)
    began = time.monotonic()
    running = tasks.spawn(endless.run(number, _WALL_S), name="a call that is late")
    seen = await _all_there(endless, running)
    await asyncio.wait({running})
    if not isinstance(running.exception(), errors.DeadlineExceeded) or not seen:
        found.unseen += 1
        return
    while any(map(_listed, seen)) and time.monotonic() - began < _PATIENCE_S:  # noqa: ASYNC110 - the kernel tells nobody
        await asyncio.sleep(0.001)
    found.late_ms.append(round((time.monotonic() - began - _WALL_S) * 1000, 1))
    found.left_to_init += sum(_state(pid)[0] == "Z" for pid in seen)


async def _killed(endless: Endless, which: int, tasks: lifecycle.Tasks, found: Endings) -> int | None:
    """Kill one process of a call; returns which is next, None when there are no more."""
    number = -1 - which
    await endless.ready(number)
    running = tasks.spawn(endless.run(number, _LONG_S), name="a call that is killed")
    seen = await _all_there(endless, running)
    what = f"process {which} of {len(seen)}"
    try:
        os.kill(sorted(seen)[which], signal.SIGKILL)
        async with asyncio.timeout(_PATIENCE_S):
            await running
        found.wrong.append(f"{what} was killed, and the call gave a result")
    except TimeoutError:
        found.wrong.append(f"{what} was killed, and the call went on")
    except (errors.DeadlineExceeded, IndexError, ProcessLookupError) as error:
        found.wrong.append(f"{what}: {type(error).__name__}")
    except errors.NetraError:
        found.killed += 1
        if left := _alive(seen):
            found.wrong.append(f"{what} was killed, and {len(left)} lived on")
    return which + 1 if which + 1 < min(len(seen), endless.matter) else None


async def _all_there(endless: Endless, running: asyncio.Task[object]) -> set[int]:
    """The processes of a call, when there are some and they do not become more; to look for them takes a while, so it is not gone on."""
    seen, before = endless.processes(), set[int]()
    while (not seen or seen != before) and not running.done():
        await asyncio.wait({running}, timeout=_LOOK_S)
        before, seen = seen, endless.processes()
    return seen | before


def below(pid: int) -> set[int]:
    """The processes that a process started, and that they started."""
    found, left = set[int](), [pid]
    while left:
        for task in Path(f"/proc/{left.pop()}/task").glob("*/children"):
            try:
                new = set(map(int, task.read_text().split())) - found
            except OSError:
                continue
            found |= new
            left += new
    return found


def _state(pid: int) -> tuple[str, int]:
    """The letter that the kernel has for what a process does, and its parent; nothing and 0 where it is not listed."""
    try:
        state, parent = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]
    except OSError:
        return "", 0
    return state, int(parent)


def _alive(pids: Iterable[int]) -> set[int]:
    return {pid for pid in pids if _state(pid)[0] not in ("", "Z", "X")}


def _listed(pid: int) -> bool:
    """Whether it is in the process table; not one that has ended, whose parent has, too: when init takes it off is not ours."""
    state, parent = _state(pid)
    return state not in ("", "X") and not (state == "Z" and parent != os.getpid() and parent not in below(os.getpid()))
