"""How long is it from a cancel to its proof? From CANCEL to `agent_cancelled` on the socket, which comes when all that the run did is gone.

python bench/cancels.py [rounds]

  sleep     an agent that sleeps
  tool      an agent in a tool that is awaited
  process   an agent in a plain function, in a process of its own that only a kill ends
  parallel  an agent in a tool, a child in a tool, and a sleep at the same time
  child     an agent whose child is in a tool
  waiting   a run that waits for its turn behind another one of its thread

Eight users do all of them in turn, so up to eight cancels are under way. All of Netra runs as `make run` starts it; the clients are this
process.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections import defaultdict
from pathlib import Path

import uvloop

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.harness import agents, report, stores, talk, users

GOAL_MS = 250.0
USERS, ROUNDS = 8, 6
REQUEST = "Wait until I have had enough."
# how often each way tells that it has come to where it is cancelled
WAYS = {"sleep": 0, "tool": 1, "process": 1, "parallel": 2, "child": 1}


async def _cancelled(one: talk.Talk, run: talk.Run) -> float:
    """The milliseconds from the cancel to the proof."""
    asked = time.perf_counter()
    await one.cancel(run)
    await one.until(run, "agent_cancelled")
    unproven = [call for call in run.end["data"]["tools_stopped"] if not call["confirmed"]]
    if unproven:
        raise talk.Broken(str(run.end["data"]))
    return (run.ended_at - asked) * 1000


async def _way(one: talk.Talk, way: str) -> float:
    run = await one.start("bench-held", REQUEST, way=way)
    await one.until(run, "agent_thinking")
    if calls := WAYS[way]:
        await one.until(run, "tool_executing", many=calls)
    return await _cancelled(one, run)


async def _waiting(one: talk.Talk) -> float:
    first = await one.until(await one.start("bench-held", REQUEST, way="sleep"), "agent_thinking")
    second = await one.start("bench-held", REQUEST, thread_id=first.thread_id, way="sleep")
    took = await _cancelled(one, await one.until(second))
    await _cancelled(one, first)
    return took


async def _user(one: talk.Talk, rounds: int, found: dict[str, list[float]]) -> None:
    for number in range(-1, rounds):
        for way in (*WAYS, "waiting"):
            took = await (_waiting(one) if way == "waiting" else _way(one, way))
            if number >= 0:
                found[way].append(took)


async def _measured(rounds: int) -> dict[str, list[float]]:
    found: dict[str, list[float]] = defaultdict(list)
    async with agents.stack() as running:
        _, tokens = await users.signed_in(running, USERS)
        async with talk.sockets(running.ports["gateway"], tokens) as talks:
            await asyncio.gather(*(_user(one, rounds, found) for one in talks))
    return found


def main(rounds: int = ROUNDS) -> int:
    """Returns the exit code: 1 when one cancel in a hundred takes longer than the goal."""
    stores.set_up()
    found = uvloop.run(_measured(rounds))
    figures = {way: [talk.quantile(took, part) for part in (0.5, 0.99, 1.0)] for way, took in found.items()}
    report.table(("way", "ms_p50", "p99", "most"), ((way, *(f"{one:.1f}" for one in each)) for way, each in figures.items()))
    every = [took for each in found.values() for took in each]
    p50, p99 = talk.quantile(every, 0.5), talk.quantile(every, 0.99)
    return report.verdict(
        "cancels", p99 <= GOAL_MS, f"p99 <= {GOAL_MS:g} ms", f"p99 {p99:.1f} ms, p50 {p50:.1f}",
        most=round(max(every), 1), cancels=len(every), users=USERS,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
