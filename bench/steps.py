"""What does a durable step of a run cost beside a bare commit? One run, one step after the other.

python bench/steps.py [rounds] [steps per round]

  commit    one row into a table with one index, in a transaction of one statement, on one connection of the driver's; with fsync
  think     a thought: the run goes on while it is on its way to the record, as long as it is not far ahead
  look      a tool without effects: told as begun and over
  change    a tool with effects: that it begins is in the record before it is called

The time of a step is by the database's clock, as the record has it: from the first step that is committed to the last one, by the number of
steps between. PostgreSQL is the same for all, and all of Netra runs beside it as `make run` starts it.
"""

from __future__ import annotations

import contextlib
import functools
import statistics
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import asyncpg
import uvloop

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.harness import agents, report, stores, talk, users
from netra import ids
from standalone import prepare

TIMES = 3.0
ROUNDS, STEPS = 7, 100
REQUEST = "How much did we spend in May?"
# what each kind of step is told by, once
WAYS = {"think": ("think", "agent_thinking"), "look": ("bench_look", "tool_completed"), "change": ("bench_change", "tool_completed")}


async def _commit(connection: Any, many: int) -> float:
    """Milliseconds of one commit."""
    began = time.perf_counter()
    for _ in range(many):
        await connection.execute("INSERT INTO bench_rows (id, word) VALUES ($1, $2)", ids.uuid7(), REQUEST)
    return (time.perf_counter() - began) / many * 1000


async def _step(one: talk.Talk, way: str, many: int) -> float:
    """Milliseconds of one step."""
    kind, told_by = WAYS[way]
    run = await one.run("bench-steps", REQUEST, kind=kind, many=many)
    run.completed()
    times = [datetime.fromisoformat(event["timestamp"]) for event in run.events if event["type"] == told_by]
    assert len(times) == many, run.end
    return (times[-1] - times[0]).total_seconds() / (many - 1) * 1000


@contextlib.asynccontextmanager
async def _ways(many: int) -> AsyncIterator[dict[str, Callable[[], Awaitable[float]]]]:
    async with agents.stack() as running:
        _, tokens = await users.signed_in(running, 1)
        connection = await asyncpg.connect(prepare.on_database(running.backend.postgres_admin_url, "netra"))
        await connection.execute("CREATE TABLE bench_rows (id uuid PRIMARY KEY, word text NOT NULL)")
        async with talk.sockets(running.ports["gateway"], tokens) as (one,):
            yield {
                "commit": functools.partial(_commit, connection, many),
                **{way: functools.partial(_step, one, way, many) for way in WAYS},
            }
        await connection.close()


async def _measured(rounds: int, many: int) -> dict[str, list[float]]:
    async with _ways(many) as ways:
        return await report.in_turn(ways, rounds)


def main(rounds: int = ROUNDS, many: int = STEPS) -> int:
    """Returns the exit code: 1 when a step takes more than so many times a commit."""
    stores.set_up()
    found = uvloop.run(_measured(rounds, many))
    report.table(("way", "ms_median", "lowest", "highest"), ((name, *report.spread(each, 3)) for name, each in found.items()))
    times = {way: report.ratio(found[way], found["commit"]) for way in WAYS}
    return report.verdict(
        "steps", max(times.values()) <= TIMES, f"<= {TIMES:g} times a commit, also with an effect",
        f"{times['think']:.2f} times, {times['look']:.2f} a tool, {times['change']:.2f} with an effect",
        commit_ms=round(statistics.median(found["commit"]), 2), change_ms=round(statistics.median(found["change"]), 2),
        rounds=rounds, steps_per_round=many,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
