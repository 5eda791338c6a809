"""What does a run cost that survives the death of whatever executes it, beside one that a hand-rolled service executes and may lose?

python bench/runs.py [rounds] [runs one at a time] [seconds at 32 clients]

  netra        a run of one thought and two tools, from START_AGENT to `agent_completed` on the socket, through all of Netra as `make run`
               starts it: nine events, every step in the record, claimed under a lease
  handrolled   the same nine events from `bench/peers/handrolled.py`: one process of Starlette and asyncpg with one commit per event, and
               nothing that would carry on a run whose process died

Each has a PostgreSQL of its own, with fsync. First one client, one run at a time: what a run takes. Then 32 clients with a socket and a
user each, the next run as soon as one has ended: runs a second, and the processor time of all processes of that side (its stores too) for
a run. The clients are this process, the same for both, and take their part of the two sides' processors.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import statistics
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import asyncpg
import uvloop

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.harness import agents, child, report, stores, talk, users
from bench.peers import handrolled
from standalone import prepare, processes

TIMES = 3.0
ROUNDS, RUNS, SECONDS, CLIENTS = 5, 40, 2.5, 32
REQUEST = "How much did we spend in May?"
KINDS = (
    "agent_started", "message_created", "agent_thinking", "tool_executing", "tool_completed", "tool_executing", "tool_completed",
    "message_created", "agent_completed",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Side:
    """One way of executing runs: the sockets of its users, and the processes it consists of."""

    talks: Sequence[talk.Talk]
    pids: Sequence[int]

    async def run(self, place: int) -> float:
        """The milliseconds of one run of a user."""
        run = await self.talks[place].run("bench-two-tools", REQUEST)
        run.completed(KINDS)
        return run.ms

    async def one_at_a_time(self, many: int) -> float:
        """The milliseconds of the middle one of so many."""
        return statistics.median([await self.run(0) for _ in range(many)])

    async def at_once(self, seconds: float) -> tuple[float, float]:
        """Runs a second with all users busy, and milliseconds of processor time per run."""
        cpu, began = child.all_cpu_s(*self.pids), time.perf_counter()

        async def busy(place: int) -> int:
            done = 0
            while time.perf_counter() < began + seconds:
                await self.run(place)
                done += 1
            return done

        done = sum(await asyncio.gather(*map(busy, range(len(self.talks)))))
        took = time.perf_counter() - began
        return done / took, (child.all_cpu_s(*self.pids) - cpu) / done * 1000


@contextlib.asynccontextmanager
async def _netra() -> AsyncIterator[Side]:
    async with agents.stack() as running:
        _, tokens = await users.signed_in(running, CLIENTS)
        pids = [running.pid(name) for name in (*processes.STORES, *agents.SERVICES)]
        async with talk.sockets(running.ports["gateway"], tokens) as talks:
            yield Side(talks, pids)


@contextlib.asynccontextmanager
async def _handrolled() -> AsyncIterator[Side]:
    async with stores.stack() as running:
        admin = running.backend.postgres_admin_url
        connection = await asyncpg.connect(admin)
        await connection.execute("CREATE DATABASE handrolled")
        await connection.close()
        peer = await asyncio.to_thread(child.Child, handrolled.__file__, prepare.on_database(admin, "handrolled"))
        try:
            async with talk.sockets(peer.told["port"], handrolled.tokens(CLIENTS)) as talks:
                yield Side(talks, [peer.pid, running.pid("postgres")])
        finally:
            await asyncio.to_thread(peer.close)


async def _measured(rounds: int, many: int, seconds: float) -> tuple[dict[str, list[float]], dict[str, list[tuple[float, float]]]]:
    async with _netra() as netra, _handrolled() as peer:
        sides = {"netra": netra, "handrolled": peer}
        alone: dict[str, Callable[[], Awaitable[float]]] = {
            name: functools.partial(side.one_at_a_time, many) for name, side in sides.items()
        }
        clock = await report.in_turn(alone, rounds)
        return clock, await report.in_turn({name: functools.partial(side.at_once, seconds) for name, side in sides.items()}, rounds)


def main(rounds: int = ROUNDS, many: int = RUNS, seconds: float = SECONDS) -> int:
    """Returns the exit code: 1 when a run takes more than so many times the time, the turns or the processor of the other's."""
    stores.set_up()
    clock, busy = uvloop.run(_measured(rounds, many, seconds))
    rates = {name: [rate for rate, _ in each] for name, each in busy.items()}
    cpu = {name: [spent for _, spent in each] for name, each in busy.items()}
    report.table(
        ("side", "ms_per_run_p50_alone", "lowest", "highest", f"runs_per_s_at_{CLIENTS}", "lowest", "highest", "cpu_ms_per_run_at_32"),
        (
            (name, *report.spread(clock[name]), *report.spread(rates[name]), f"{statistics.median(cpu[name]):.1f}")
            for name in clock
        ),
    )  # fmt: skip
    times = report.ratio(clock["netra"], clock["handrolled"])
    fewer = report.ratio(rates["handrolled"], rates["netra"])
    dearer = report.ratio(cpu["netra"], cpu["handrolled"])
    told = {
        f"{name}_{what}": round(statistics.median(of[name]), 1)
        for what, of in (("ms", clock), ("per_s", rates), ("cpu_ms", cpu))
        for name in of
    }
    return report.verdict(
        "runs", max(times, fewer, dearer) <= TIMES, f"<= {TIMES:g} times in time, runs/s and CPU",
        f"{times:.1f} times, {fewer:.1f} in runs/s, {dearer:.1f} in CPU", **told, clients=CLIENTS, rounds=rounds,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:3]), *map(float, sys.argv[3:4])))
