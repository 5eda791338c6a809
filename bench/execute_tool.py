"""What does a durable tool call cost beside a bare call over gRPC? One user, one call at a time; and the processor at 64 at once.

python bench/execute_tool.py [rounds] [calls]

  hop      a unary call of the dispatcher that is verified and refused before it does anything
  plain    ExecuteTool of a tool without effects: its outcome is in the record when it is answered
  effects  ExecuteTool of a tool with effects: that it begins is in the record before it is called, and its outcome when it is answered
  store    one row into a table with one index, committed with fsync: what one word of the record costs at least on this disk

The services and PostgreSQL (with fsync) are processes of their own, as `make run` starts them. The time of a call is what its caller waits,
the middle one of a round; processor time is that of all four services for a call, with 64 calls of 16 users under way, beside the same for
`hop`.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import statistics
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import grpc
import uvloop

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.harness import child, report, stores, users
from chassis import channel, lifecycle, postgres
from netra import ids
from netra.dispatcher.v1 import dispatcher_pb2, dispatcher_pb2_grpc
from netra.tool import tool
from services.dispatcher import settings, wiring
from standalone import prepare

PLAIN_TIMES, EFFECTS_TIMES, CPU_TIMES = 3.0, 5.0, 2.5
ROUNDS, CALLS = 7, 60
USERS, AT_ONCE = 16, 64
SERVICES = ("auth", "context", "events", "dispatcher")
ARGUMENTS = b'{"text":"How much did we spend in May?"}'


@dataclass(frozen=True, slots=True)
class Caller:
    """Users of the dispatcher."""

    stub: dispatcher_pb2_grpc.DispatcherServiceAsyncStub
    people: list[channel.Metadata]
    pids: list[int]
    database: postgres.DatabaseManager

    async def hop(self, place: int) -> None:
        """Be refused."""
        with contextlib.suppress(grpc.aio.AioRpcError):
            await self.stub.GetRun(dispatcher_pb2.GetRunRequest(run_id="none"), metadata=self.people[place])

    async def call(self, tool: str, place: int) -> None:
        """Call a tool."""
        request = dispatcher_pb2.ExecuteToolRequest(request_id=ids.uuid7(), tool_name=tool, arguments=ARGUMENTS)
        answer = await self.stub.ExecuteTool(request, metadata=self.people[place], timeout=60)
        assert answer.status == "success", answer

    async def store(self, _place: int) -> None:
        """Commit a row."""
        async with self.database.transaction() as transaction:
            await transaction.execute("INSERT INTO bench_rows (id, word) VALUES ($1, $2)", ids.uuid7(), ARGUMENTS)

    async def cpu_us(self, call: Callable[[int], Awaitable[None]], many: int) -> float:
        """Microseconds of the services' processors for one of `many` calls, of which 64 are under way."""
        numbers, before = itertools.count(), sum(map(child.cpu_s, self.pids))

        async def some() -> None:
            while (number := next(numbers)) < many:
                await call(number % USERS)

        await asyncio.gather(*(some() for _ in range(AT_ONCE)))
        return (sum(map(child.cpu_s, self.pids)) - before) / many * 1e6


async def _timed(call: Callable[[int], Awaitable[None]], many: int) -> float:
    """Milliseconds that the middle one of the calls takes, one after the other."""
    took = []
    for _ in range(many):
        began = time.perf_counter()
        await call(0)
        took.append((time.perf_counter() - began) * 1000)
    return statistics.median(took)


@contextlib.asynccontextmanager
async def _caller() -> AsyncIterator[Caller]:
    # no sandboxes: the tools are coroutines of the dispatcher's
    alone, mine = {"NETRA_SANDBOX_TIERS": "", "NETRA_TOOL_WORKERS": "2"}, (sys.executable, __file__, "dispatcher")
    async with stores.stack(*SERVICES, commands={"dispatcher": mine}, environment=alone) as running:
        _, tokens = await users.signed_in(running, USERS)
        database = await postgres.open_pool(prepare.on_database(running.backend.postgres_admin_url, "netra"), "bench")
        async with channel.connect(f"127.0.0.1:{running.ports['dispatcher']}") as to:
            stub: dispatcher_pb2_grpc.DispatcherServiceAsyncStub = dispatcher_pb2_grpc.DispatcherServiceStub(to)
            pids = [running.pid(name) for name in SERVICES]
            async with database.transaction() as transaction:
                await transaction.execute("CREATE TABLE bench_rows (id uuid PRIMARY KEY, word bytea NOT NULL)")
            yield Caller(stub, [channel.bearer(token) for token in tokens], pids, database)
        await database.close()


async def _measured(rounds: int, many: int) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    async with _caller() as caller:
        calls: dict[str, Callable[[int], Awaitable[None]]] = {
            "hop": caller.hop,
            "plain": functools.partial(caller.call, "bench_plain"),
            "effects": functools.partial(caller.call, "bench_effects"),
            "store": caller.store,
        }
        clock = await report.in_turn({name: functools.partial(_timed, call, many) for name, call in calls.items()}, rounds)
        del calls["store"]
        cpu = {name: functools.partial(caller.cpu_us, call, AT_ONCE * 3) for name, call in calls.items()}
        return clock, await report.in_turn(cpu, max(1, rounds // 2))


def main(rounds: int = ROUNDS, many: int = CALLS) -> int:
    """Returns the exit code: 1 when a durable call takes more of a bare one's time or processor than the goals say."""
    stores.set_up()
    clock, cpu = uvloop.run(_measured(rounds, many))
    spent = {name: f"{statistics.median(each):.0f}" for name, each in cpu.items()}
    report.table(
        ("way", "ms_per_call_median", "lowest", "highest", "services_cpu_us_per_call_at_64"),
        ((name, *report.spread(each, 2), spent.get(name, "")) for name, each in clock.items()),
    )
    plain, effects = (report.ratio(clock[name], clock["hop"]) for name in ("plain", "effects"))
    times = max(report.ratio(cpu[name], cpu["hop"]) for name in ("plain", "effects"))
    good = plain <= PLAIN_TIMES and effects <= EFFECTS_TIMES and times <= CPU_TIMES
    goal = f"<= {PLAIN_TIMES:g} times a hop, {EFFECTS_TIMES:g} with effects, {CPU_TIMES:g} times its CPU"
    return report.verdict(
        "execute_tool", good, goal, f"{plain:.1f} times, {effects:.1f} with effects, {times:.1f} times the CPU",
        **{f"{name}_ms": round(statistics.median(each), 2) for name, each in clock.items()}, at_once=AT_ONCE, rounds=rounds,
    )  # fmt: skip


@tool(name="bench_plain", idempotent=True)
async def plain(text: str) -> str:
    """Changes nothing."""
    return text


@tool(name="bench_effects", side_effects=True)
async def effects(text: str) -> str:
    """Says that it changes something."""
    return text


def serve() -> None:
    """The dispatcher, with these tools."""
    lifecycle.run("dispatcher", settings.DispatcherSettings.load, functools.partial(wiring.build, tools=[plain, effects]))


if __name__ == "__main__":
    if sys.argv[1:] == ["dispatcher"]:
        serve()
    else:
        sys.exit(main(*map(int, sys.argv[1:])))
