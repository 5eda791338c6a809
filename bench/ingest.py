"""What does group commit gain? Durable appends per second, beside the same appends on 16 connections that commit each by itself.

python bench/ingest.py [rounds] [seconds per round]

  group    16 streams of appends of one event, as the service takes them: checked, judged under the locks of their runs and users,
           written, announced to nobody; 16 runs of each stream have one append on its way
  each     16 connections; each commits one append after the other by itself. Same checks, judgement, statements, rows and indexes:
           the group is all that is missing
  ahead    as `group`, of runs that are ahead of their record, as a busy dispatcher sends them: eight events in an append
  inserts  16 connections; each inserts one ready-made row after the other. Nothing is checked, no seq and no cursor is counted,
           nothing fenced: it keeps none of the record's promises, and shows what they cost

All write to one PostgreSQL of their own with fsync, and take turns. Appends are made before the time runs.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import statistics
import sys
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import uvloop

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.harness import report, stores
from chassis import lifecycle, postgres
from netra import ids
from netra.context import UserExecutionContext
from netra.events.v1 import events_pb2
from services.events import commit, heads, intake, store, store_system
from services.events import log as record
from standalone import supervise

GOAL = 4.0
ROUNDS, SECONDS = 5, 2.0
CLIENTS, RUNS, AHEAD = 16, 16, 8
# so many events are ready when a round begins
READY = 40_000
DATA = json.dumps({"parameters": "x" * 320}).encode()
# about what the envelope adds
FRAME = DATA + b" " * 400
_ROW = """
INSERT INTO events.events (retention, recorded_at, user_id, cursor, run_id, seq, thread_id, event_id, type, tool_call_id, ends, frame)
VALUES ('free', $1, $2, $3, $4, $3, $5, $6, 'tool_executing', '', false, $7)
"""
Client = Callable[[float], Awaitable[int]]


class Nobody:
    """Announces to nobody, and knows nobody."""

    def announce(self, events: Sequence[record.Recorded]) -> None:
        """Nothing."""

    async def context(self, token: str, service: str) -> UserExecutionContext:
        raise AssertionError("no append here has a token")


@dataclass(slots=True)
class Run:
    """A run whose record is open, and the appends it is going to send."""

    run_id: str
    ready: deque[events_pb2.AppendRequest]
    next_seq: int = 1

    def prepare(self, many: int, events: int) -> None:
        """Have so many appends ready."""
        while len(self.ready) < many:
            made = [events_pb2.NewEvent(event_id=ids.uuid7(), type="tool_executing", data=DATA) for _ in range(events)]
            seq = self.next_seq + len(self.ready) * events
            self.ready.append(events_pb2.AppendRequest(run_id=self.run_id, epoch=1, first_seq=seq, events=made))

    def take(self, place: int) -> events_pb2.AppendRequest:
        """The next append, with the place of the run among those of its stream."""
        request = self.ready.popleft()
        request.append_id = place
        self.next_seq += len(request.events)
        return request


async def _stream(taken: intake.Intake, runs: list[Run], until: float) -> int:
    """A stream of appends; how many events were acknowledged."""
    free: asyncio.Queue[int] = asyncio.Queue()
    for place in range(len(runs)):
        free.put_nowait(place)

    async def requests() -> AsyncIterator[events_pb2.AppendRequest]:
        while (place := await free.get()) >= 0 and time.perf_counter() < until and runs[place].ready:
            yield runs[place].take(place)

    before = sum(run.next_seq for run in runs)
    async for outcome in taken.answers(requests()):
        assert outcome.refused is None, outcome.refused
        free.put_nowait(outcome.append_id)
    return sum(run.next_seq for run in runs) - before


async def _one_by_one(writer: store_system.Writer, runs: list[Run], until: float) -> int:
    """A connection that commits each append by itself, of one run after the other."""
    done = 0
    while time.perf_counter() < until and runs[done % len(runs)].ready:
        (outcome,) = (await writer.commit([record.checked(runs[done % len(runs)].take(0))])).outcomes
        assert outcome.refused is None, outcome.refused
        done += 1
    return done


async def _inserts(connection: postgres.Transaction, cursors: list[int], until: float) -> int:
    user_id, run_id, thread_id, done = ids.uuid7(), ids.uuid7(), ids.uuid7(), 0
    while time.perf_counter() < until:
        cursors[0] += 1
        await connection.execute(_ROW, datetime.now(UTC), user_id, cursors[0], run_id, thread_id, ids.uuid7(), FRAME)
        done += 1
    return done


async def _timed(clients: Sequence[Client], seconds: float, prepare: Callable[[], None]) -> tuple[float, float]:
    """Events per second, and microseconds of our CPU per event."""
    prepare()
    began, cpu = time.perf_counter(), time.process_time()
    done = sum(await asyncio.gather(*(client(began + seconds) for client in clients)))
    return done / (time.perf_counter() - began), (time.process_time() - cpu) / done * 1e6


async def _opened(own: store.Record, user_id: str) -> Run:
    context = UserExecutionContext.from_request(
        user_id=user_id, tenant_id=ids.uuid7(), session_id=ids.uuid7(), thread_id=ids.uuid7(), run_id=ids.uuid7(), request_id="bench",
        roles=("user",), tier="free",
    )  # fmt: skip
    await own.open(heads.new(context, ids.RunId(context.run_id), "0" * 32), 1)
    return Run(str(context.run_id), deque())


def _prepare(runs: list[list[Run]], events: int) -> None:
    for run in (run for each in runs for run in each):
        run.prepare(READY // events // (CLIENTS * RUNS), events)


@contextlib.asynccontextmanager
async def _ways(stack: supervise.Stack, seconds: float) -> AsyncIterator[dict[str, Callable[[], Awaitable[tuple[float, float]]]]]:
    async with contextlib.AsyncExitStack() as opened:
        own = await postgres.open_pool(stores.dsn(stack, "events"), "bench", options=store.OPTIONS)
        opened.push_async_callback(own.close)
        system = stores.dsn(stack, "events", "_system")
        pools = [await postgres.open_pool(system, "bench", size=size, options=store_system.OPTIONS) for size in (4, *([1] * CLIENTS))]
        for pool in pools:
            opened.push_async_callback(pool.close)
        tasks = lifecycle.Tasks()
        opened.push_async_callback(tasks.close)
        committer = commit.Committer(store_system.Writer(pools[0]), Nobody())
        tasks.spawn(committer.run(), "commit")
        taken = intake.Intake(committer, Nobody(), tasks)
        writers = [store_system.Writer(pool) for pool in pools[1:]]
        connections = [await opened.enter_async_context(postgres.connection(system)) for _ in range(CLIENTS)]
        people = [ids.uuid7() for _ in range(CLIENTS)]
        group, each, ahead = [[[await _opened(store.Record(own), user) for _ in range(RUNS)] for user in people] for _ in range(3)]
        cursors = [0]
        clients: dict[str, list[Client]] = {
            "group": [functools.partial(_stream, taken, runs) for runs in group],
            "each": [functools.partial(_one_by_one, writer, runs) for writer, runs in zip(writers, each, strict=True)],
            "ahead": [functools.partial(_stream, taken, runs) for runs in ahead],
            "inserts": [functools.partial(_inserts, connection, cursors) for connection in connections],
        }
        made: dict[str, Callable[[], None]] = {
            "group": lambda: _prepare(group, 1), "each": lambda: _prepare(each, 1), "ahead": lambda: _prepare(ahead, AHEAD),
            "inserts": lambda: None,
        }  # fmt: skip
        yield {name: functools.partial(_timed, some, seconds, made[name]) for name, some in clients.items()}


async def _measured(rounds: int, seconds: float) -> dict[str, list[tuple[float, float]]]:
    async with stores.stack() as stack, _ways(stack, seconds) as ways:
        return await report.in_turn(ways, rounds)


def main(rounds: int = ROUNDS, seconds: float = SECONDS) -> int:
    """Returns the exit code: 1 when group commit gains less than the goal."""
    stores.set_up()
    found = uvloop.run(_measured(rounds, seconds))
    rates = {name: [rate for rate, _ in each] for name, each in found.items()}
    cpu = {name: statistics.median(spent for _, spent in each) for name, each in found.items()}
    report.table(
        ("writer", "events_per_s_median", "lowest", "highest", "cpu_us_per_event_median"),
        ((name, *report.spread(each, 0), f"{cpu[name]:.0f}") for name, each in rates.items()),
    )
    ratio = report.ratio(rates["group"], rates["each"])
    beside = {f"{name}_to_inserts": round(report.ratio(rates[name], rates["inserts"]), 2) for name in ("group", "ahead")}
    return report.verdict(
        "ingest",
        ratio >= GOAL,
        f">= {GOAL:g} x",
        f"{ratio:.2f} x ({beside['group_to_inserts']:.2f} x bare inserts)",
        **beside,
        clients=CLIENTS,
        runs_each=RUNS,
        rounds=rounds,
    )


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:2]), *map(float, sys.argv[2:3])))
