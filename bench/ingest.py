"""What does group commit gain? Durable events per second, beside as many connections that commit each row.

python bench/ingest.py [rounds] [seconds per round]

  group   16 streams of appends as the service takes them (checked, judged under the locks of their runs, announced to nobody), each
          with 16 runs of one append of one event on its way
  rows    16 connections, each inserts one ready-made row of the same size after the other, and nothing else

Both write to one PostgreSQL of their own with fsync, and take turns.
"""

from __future__ import annotations

import asyncio
import contextlib
import csv
import json
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import uvloop

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from chassis import lifecycle, log, postgres, settings, telemetry
from netra import ids
from netra.context import UserExecutionContext
from netra.events.v1 import events_pb2
from services.events import commit, heads, intake, store, store_system
from services.events import log as record
from standalone import ports, prepare, processes, supervise

GOAL = 4.0
ROUNDS, SECONDS = 4, 2.0
CLIENTS, RUNS = 16, 16
DATA = json.dumps({"parameters": "x" * 320}).encode()
_ROW = """
INSERT INTO events.events (retention, recorded_at, user_id, cursor, run_id, seq, thread_id, event_id, type, tool_call_id, ends, frame)
VALUES ('free', $1, $2, $3, $4, $3, $5, $6, 'tool_executing', '', false, $7)
"""


class Nobody:
    """Announces to nobody, and knows nobody."""

    def announce(self, events: Sequence[record.Recorded]) -> None:
        """Nothing."""

    async def context(self, token: str) -> UserExecutionContext:
        raise AssertionError("no append here has a token")


class Group:
    """The streams of appends."""

    def __init__(self, taken: intake.Intake, runs: list[list[str]]) -> None:
        self._taken, self._runs = taken, runs
        self._seqs = {run_id: 0 for each in runs for run_id in each}

    async def write(self, seconds: float) -> int:
        """How many events were acknowledged."""
        return sum(await asyncio.gather(*(self._client(runs, time.monotonic() + seconds) for runs in self._runs)))

    async def _client(self, runs: list[str], until: float) -> int:
        free: asyncio.Queue[str | None] = asyncio.Queue()
        for run_id in runs:
            free.put_nowait(run_id)

        async def requests() -> AsyncIterator[events_pb2.AppendRequest]:
            while (run_id := await free.get()) is not None and time.monotonic() < until:
                self._seqs[run_id] += 1
                event = events_pb2.NewEvent(event_id=ids.uuid7(), type="tool_executing", data=DATA)
                yield events_pb2.AppendRequest(
                    append_id=runs.index(run_id), run_id=run_id, epoch=1, first_seq=self._seqs[run_id], events=[event]
                )

        acknowledged = 0
        async for outcome in self._taken.answers(requests()):
            assert outcome.refused is None, outcome.refused
            acknowledged += 1
            free.put_nowait(runs[outcome.append_id])
        return acknowledged


class Rows:
    """The connections that commit each row."""

    def __init__(self, connections: list[postgres.Transaction]) -> None:
        self._connections = connections
        self._cursor = 0

    async def write(self, seconds: float) -> int:
        """How many rows were committed."""
        return sum(await asyncio.gather(*(self._client(one, time.monotonic() + seconds) for one in self._connections)))

    async def _client(self, connection: postgres.Transaction, until: float) -> int:
        user_id, run_id, thread_id, done = ids.uuid7(), ids.uuid7(), ids.uuid7(), 0
        frame = DATA + b" " * 400  # about what the envelope adds
        while time.monotonic() < until:
            self._cursor += 1
            await connection.execute(_ROW, datetime.now(UTC), user_id, self._cursor, run_id, thread_id, ids.uuid7(), frame)
            done += 1
        return done


async def _run(own: store.Record, user_id: str) -> str:
    context = UserExecutionContext.from_request(
        user_id=user_id, tenant_id=ids.uuid7(), session_id=ids.uuid7(), thread_id=ids.uuid7(), run_id=ids.uuid7(), request_id="bench",
        roles=("user",), tier="free",
    )  # fmt: skip
    await own.open(heads.new(context, ids.RunId(context.run_id), "0" * 32), 1)
    return str(context.run_id)


@contextlib.asynccontextmanager
async def _place(stack: supervise.Stack) -> AsyncIterator[dict[str, Any]]:
    admin = prepare.on_database(stack.backend.postgres_admin_url, "netra")
    secrets = stack.place.secrets / "events"

    def dsn(kind: str) -> str:
        return prepare.dsn(admin, f"netra_events{kind}", (secrets / f"postgres{kind}").read_text().strip(), "netra")

    async with contextlib.AsyncExitStack() as opened:
        own = await postgres.open_pool(dsn(""), "bench", options=store.OPTIONS)
        crossing = await postgres.open_pool(dsn("_system"), "bench_system", size=4, options=store_system.OPTIONS)
        opened.push_async_callback(own.close)
        opened.push_async_callback(crossing.close)
        tasks = lifecycle.Tasks()
        opened.push_async_callback(tasks.close)
        committer = commit.Committer(store_system.Writer(crossing), Nobody())
        tasks.spawn(committer.run(), "commit")
        connections = [await opened.enter_async_context(postgres.connection(dsn("_system"))) for _ in range(CLIENTS)]
        runs = [[await _run(store.Record(own), user_id) for _ in range(RUNS)] for user_id in (ids.uuid7() for _ in range(CLIENTS))]
        yield {"group": Group(intake.Intake(committer, Nobody(), tasks), runs), "rows": Rows(connections)}


async def _measured(rounds: int, seconds: float) -> dict[str, list[tuple[float, float]]]:
    """Events per second and microseconds of our CPU per event, by round."""
    found: dict[str, list[tuple[float, float]]] = {"group": [], "rows": []}
    table = tuple(row for row in processes.TABLE if row.name in processes.STORES)
    with tempfile.TemporaryDirectory() as folder:
        stack = supervise.Stack(Path(folder), ports.free(list(processes.STORES)), table=table, backend="embedded")
        async with stack, _place(stack) as ways:
            for number in range(-1, rounds):
                for name, way in ways.items():
                    began, cpu = time.perf_counter(), time.process_time()
                    done = await way.write(seconds)
                    if number >= 0:  # the first one warms up
                        found[name].append((done / (time.perf_counter() - began), (time.process_time() - cpu) / done * 1e6))
    return found


def main(rounds: int = ROUNDS, seconds: float = SECONDS) -> int:
    """Returns the exit code: 1 when group commit gains less than the goal."""
    process = settings.ProcessSettings(log_level="error")
    log.set_up("bench", process)
    telemetry.set_up("bench", process)
    found = uvloop.run(_measured(rounds, seconds))
    table = csv.writer(sys.stdout)
    table.writerow(("writer", "events_per_s_median", "lowest", "highest", "cpu_us_per_event_median"))
    for name, each in found.items():
        rates, cpu = [rate for rate, _ in each], statistics.median(spent for _, spent in each)
        table.writerow((name, *(f"{value:.0f}" for value in (statistics.median(rates), min(rates), max(rates), cpu))))
    ratio = statistics.median(a / b for (a, _), (b, _) in zip(found["group"], found["rows"], strict=True))
    told = {
        "bench": "ingest",
        "ratio": round(ratio, 2),
        "goal": GOAL,
        "ok": ratio >= GOAL,
        "clients": CLIENTS,
        "runs_each": RUNS,
        "rounds": rounds,
    }
    print(json.dumps(told))
    return 0 if ratio >= GOAL else 1


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:2]), *map(float, sys.argv[2:3])))
