"""How many execution contexts does the service open a second, over gRPC: verified, stored with their threads and audit trail, signed?

python bench/contexts_grpc.py [rounds] [seconds per round]

  open    64 calls of OpenContext at once, for 16 users with agent context and audit metadata of usual size, each in a thread of its own
  again   the same, in a thread that the user has: the next message of a conversation
  hop     as many calls of grpc.health.v1, which answers at once: what gRPC and the caller cost on this machine

The service, auth and PostgreSQL (with fsync) are processes of their own, as `make run` starts them; the caller is this process, and takes
its part of the processor. The CPU of the service alone is told beside, and how many hops of the same run that is: the machine is in both.
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
from typing import Any

import grpc
import uvloop
from grpc_health.v1 import health_pb2, health_pb2_grpc

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.harness import child, report, stores, users
from chassis import channel
from netra import ids
from netra.context.v1 import context_pb2, context_pb2_grpc

GOAL = 1000
ROUNDS, SECONDS = 5, 2.0
USERS, AT_ONCE = 16, 64
_TIMEOUT_S = 10.0
AGENT_CONTEXT = b'{"digest":"%s","kind":"agent","name":"triage"}' % (b"0" * 64)
AUDIT_METADATA = b'{"client":"192.0.2.7","method":"POST","path":"/v1/runs","user_agent":"%s"}' % (b"x" * 120)


@dataclass(frozen=True, slots=True)
class Caller:
    """The dispatcher, which opens contexts for users."""

    stub: context_pb2_grpc.ContextServiceAsyncStub
    health: Any
    metadata: channel.Metadata
    tokens: list[str]
    # one of each user
    threads: list[str]
    pid: int

    async def open(self, place: int, thread_id: str = "") -> context_pb2.OpenContextResponse:
        """Open one, for the user at a place."""
        request = context_pb2.OpenContextRequest(
            request_id=ids.uuid7(), run_id=ids.uuid7(), access_token=self.tokens[place], thread_id=thread_id,
            correlation_id=ids.CorrelationId.new(), agent_context=AGENT_CONTEXT, audit_metadata=AUDIT_METADATA,
        )  # fmt: skip
        return await self.stub.OpenContext(request, metadata=self.metadata, timeout=_TIMEOUT_S)

    async def hop(self, _place: int) -> None:
        """Be answered at once; with a token beside it, as every call has."""
        await self.health.Check(health_pb2.HealthCheckRequest(), metadata=self.metadata, timeout=_TIMEOUT_S)


async def _timed(caller: Caller, seconds: float, call: Callable[[int], Awaitable[Any]]) -> tuple[float, float]:
    """Calls per second, and microseconds of the service's CPU per call."""
    numbers = itertools.count()
    until, began, cpu, done = time.perf_counter() + seconds, time.perf_counter(), child.cpu_s(caller.pid), 0

    async def some() -> int:
        many = 0
        while time.perf_counter() < until:
            await call(next(numbers) % USERS)
            many += 1
        return many

    done = sum(await asyncio.gather(*(some() for _ in range(AT_ONCE))))
    return done / (time.perf_counter() - began), (child.cpu_s(caller.pid) - cpu) / done * 1e6


@contextlib.asynccontextmanager
async def _ways(seconds: float) -> AsyncIterator[dict[str, Callable[[], Awaitable[tuple[float, float]]]]]:
    async with stores.stack("auth", "context") as running:
        metadata, tokens = await users.signed_in(running, USERS)
        # without the interceptors of our own channels: what a caller does before its call leaves is not asked here
        async with grpc.aio.insecure_channel(f"127.0.0.1:{running.ports['context']}") as to:
            stub, health = context_pb2_grpc.ContextServiceStub(to), health_pb2_grpc.HealthStub(to)
            caller = Caller(stub, health, metadata, tokens, [], running.pid("context"))
            caller.threads.extend([(await caller.open(place)).context.thread_id for place in range(USERS)])
            yield {
                "open": functools.partial(_timed, caller, seconds, caller.open),
                "again": functools.partial(_timed, caller, seconds, lambda place: caller.open(place, caller.threads[place])),
                "hop": functools.partial(_timed, caller, seconds, caller.hop),
            }


async def _measured(rounds: int, seconds: float) -> dict[str, list[tuple[float, float]]]:
    async with _ways(seconds) as ways:
        return await report.in_turn(ways, rounds)


def main(rounds: int = ROUNDS, seconds: float = SECONDS) -> int:
    """Returns the exit code: 1 when fewer are opened than the goal."""
    stores.set_up()
    found = uvloop.run(_measured(rounds, seconds))
    rates = {name: [rate for rate, _ in each] for name, each in found.items()}
    cpu = {name: [spent for _, spent in each] for name, each in found.items()}
    report.table(
        ("way", "calls_per_s_median", "lowest", "highest", "service_cpu_us_per_call_median"),
        ((name, *report.spread(each, 0), f"{statistics.median(cpu[name]):.0f}") for name, each in rates.items()),
    )
    hops = report.ratio(cpu["open"], cpu["hop"])
    median = statistics.median(rates["open"])
    return report.verdict(
        "contexts_grpc", median >= GOAL, f">= {GOAL}/s", f"{median:.0f}/s", best=round(max(rates["open"])),
        again=round(statistics.median(rates["again"])), hop=round(statistics.median(rates["hop"])),
        service_cpu_us=round(statistics.median(cpu["open"])), hop_cpu_us=round(statistics.median(cpu["hop"])), cpu_in_hops=round(hops, 1),
        at_once=AT_ONCE, rounds=rounds,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:2]), *map(float, sys.argv[2:3])))
