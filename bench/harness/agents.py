"""A dispatcher with the agents and tools of measurements, and how one is started."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import sys
import time
from collections.abc import AsyncIterator, Mapping

from bench.harness import stores
from chassis import lifecycle
from netra.agent import AgentSpec, Turn, agent
from netra.tool import tool
from services.dispatcher import settings, wiring
from standalone import processes, supervise

SERVICES = (*processes.SERVICES, "gateway")
# longer than any measurement
LONG_S = 60.0
_DEADLINE_S = 300.0


@tool(name="bench_look", idempotent=True)
async def look(text: str) -> str:
    """Changes nothing."""
    return text


@tool(name="bench_change", side_effects=True)
async def change(text: str) -> str:
    """Says that it changes something."""
    return text


@tool(name="bench_wait", idempotent=True, timeout_s=_DEADLINE_S)
async def wait(seconds: float) -> float:
    """Waits, and tells how long it was under way by its own clock."""
    began = time.perf_counter()
    await asyncio.sleep(seconds)
    return time.perf_counter() - began


@tool(name="bench_work", idempotent=True, timeout_s=_DEADLINE_S)
def work(seconds: float) -> float:
    """Holds a process of its own; only a kill ends it before its time."""
    time.sleep(seconds)
    return seconds


@agent("bench-two-tools", deadline_s=_DEADLINE_S)
async def two_tools(turn: Turn) -> dict[str, object]:
    """Thinks, and calls two tools."""
    await turn.think("First how much it was, then where it went.", progress=0)
    first = await turn.tool("bench_look", text=turn.request)
    second = await turn.tool("bench_look", text=turn.request)
    return {"message": "Both have answered.", "answers": [first, second]}


@agent("bench-steps", deadline_s=_DEADLINE_S)
async def steps(turn: Turn) -> str:
    """Takes `many` steps of one `kind`, one after the other."""
    kind, many = turn.inputs["kind"], turn.inputs["many"]
    for _ in range(many):
        if kind == "think":
            await turn.think(turn.request)
        else:
            await turn.tool(kind, text=turn.request)
    return "That was all."


@agent("bench-own-time", deadline_s=_DEADLINE_S)
async def own_time(turn: Turn) -> dict[str, float]:
    """Thinks, and calls two tools that take their time; tells how long these were under way by their own clocks."""
    await turn.think("It will take a while.")
    took = [await turn.tool("bench_wait", seconds=turn.inputs["seconds"]) for _ in range(2)]
    return {"own_s": sum(took)}


@agent("bench-held", deadline_s=_DEADLINE_S)
async def held(turn: Turn) -> None:
    """Is in something that takes long: a sleep, a tool, several, or an agent that is in one."""
    await turn.think("It begins.")
    match turn.inputs["way"]:
        case "sleep":
            await turn.sleep(LONG_S)
        case "tool":
            await turn.tool("bench_wait", seconds=LONG_S)
        case "process":
            await turn.tool("bench_work", seconds=LONG_S)
        case "parallel":
            await turn.gather(turn.tool("bench_wait", seconds=LONG_S), turn.child("bench-held", way="tool"), turn.sleep(LONG_S))
        case "child":
            await turn.child("bench-held", way="tool")


@agent("bench-short", deadline_s=_DEADLINE_S)
async def short(turn: Turn) -> None:
    """Takes its slot for a while; in a tool, as a run that sleeps for long gives its slot back."""
    await turn.tool("bench_wait", seconds=turn.inputs["seconds"])


AGENTS: tuple[AgentSpec, ...] = (two_tools, steps, own_time, held, short)


@contextlib.asynccontextmanager
async def stack(**environment: str) -> AsyncIterator[supervise.Stack]:
    """All of Netra as `make run` starts it, with a dispatcher that has these; no sandboxes but the warm processes of plain functions."""
    alone = {"NETRA_SANDBOX_TIERS": "", "NETRA_TOOL_WORKERS": "4", **environment}
    # by its name, not as a script: the process of a plain function looks for it in this module
    mine: Mapping[str, tuple[str, ...]] = {"dispatcher": (sys.executable, "-c", "from bench.harness import agents; agents.serve()")}
    async with stores.stack(*SERVICES, commands=mine, environment=alone) as running:
        yield running


def serve() -> None:
    """Be the dispatcher."""
    tools = [look, change, wait, work]
    lifecycle.run("dispatcher", settings.DispatcherSettings.load, functools.partial(wiring.build, agents=AGENTS, tools=tools))
