"""How long does a user wait behind one who has a thousand runs queued? In slots: how many of those begin before the user's own first run.

python bench/fairness.py [runs in the queue] [other users]

One user fills all slots of the only dispatcher with runs and has at least 1,000 more waiting. Then others come, one after the other, each
for the first time, each with one run. Between the moment at which such a run is stored and the moment at which it begins (both by the
database's clock, from the rows) runs of the first user begin: they are counted. A fair queue gives the next free slot to whoever has none.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import asyncpg
import orjson
import uvloop

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.harness import agents, report, stores, talk, users
from chassis import channel
from netra import ids
from netra.dispatcher.v1 import dispatcher_pb2, dispatcher_pb2_grpc
from standalone import prepare

GOAL = 1
QUEUED, OTHERS = 1000, 30
SLOTS, AT_ONCE = 4, 32
# of the noisy one while the queue is filled, so that it is not emptied meanwhile; and afterwards
LONG_S, SHORT_S = 15.0, 0.2
# an unfair queue is not waited for to its end
_ENOUGH = 20
_PATIENCE_S = 60.0
_BEGUN = """
SELECT started_at IS NOT NULL AS begun, extract(epoch FROM coalesce(started_at, now()) - created_at) * 1000 AS waited_ms,
    (SELECT count(*) FROM dispatcher.runs AS noisy WHERE noisy.user_id <> mine.user_id AND noisy.started_at > mine.created_at
     AND noisy.started_at < coalesce(mine.started_at, now())) AS before
FROM dispatcher.runs AS mine WHERE run_id = $1
"""
_WAITING = "SELECT count(*) FROM dispatcher.runs WHERE state = 'queued'"


@dataclass(frozen=True, slots=True)
class Place:
    """The dispatcher and its database."""

    stub: dispatcher_pb2_grpc.DispatcherServiceAsyncStub
    database: Any

    async def start(self, person: channel.Metadata, seconds: float) -> str:
        """Start a run in a thread of its own; returns its id."""
        request = dispatcher_pb2.StartRunRequest(
            request_id=ids.uuid7(), agent="bench-short", user_request="Take a slot.", inputs=orjson.dumps({"seconds": seconds})
        )
        return (await self.stub.StartRun(request, metadata=person, timeout=30)).run_id

    async def fill(self, noisy: channel.Metadata, many: int) -> int:
        """Returns how many runs of the noisy user wait, when that are as many as wanted."""
        for _ in range(SLOTS):
            await self.start(noisy, LONG_S)
        numbers = itertools.count()

        async def some() -> None:
            while next(numbers) < many:
                await self.start(noisy, SHORT_S)

        await asyncio.gather(*(some() for _ in range(AT_ONCE)))
        return int(await self.database.fetchval(_WAITING))

    async def begun(self, run_id: str) -> tuple[int, float]:
        """How many of the noisy user's began while a run waited, and for how many milliseconds it did; when that is known, or enough."""
        async with asyncio.timeout(_PATIENCE_S):
            while True:
                row = await self.database.fetchrow(_BEGUN, run_id)
                if row["begun"] or row["before"] >= _ENOUGH:
                    return row["before"], float(row["waited_ms"])
                await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def _place(others: int) -> AsyncIterator[tuple[Place, list[channel.Metadata]]]:
    async with agents.stack(NETRA_SLOTS=str(SLOTS)) as running:
        _, tokens = await users.signed_in(running, others + 1)
        database = await asyncpg.connect(prepare.on_database(running.backend.postgres_admin_url, "netra"))
        async with channel.connect(f"127.0.0.1:{running.ports['dispatcher']}") as to:
            stub: dispatcher_pb2_grpc.DispatcherServiceAsyncStub = dispatcher_pb2_grpc.DispatcherServiceStub(to)
            yield Place(stub, database), [channel.bearer(token) for token in tokens]
        await database.close()


async def _measured(queued: int, others: int) -> tuple[list[tuple[int, float]], int, int]:
    async with _place(others) as (place, (noisy, *people)):
        # some more, for those that begin while the others come
        before = await place.fill(noisy, queued + others * 5)
        assert before >= queued, before
        found = [await place.begun(await place.start(person, SHORT_S)) for person in people]
        return found, before, int(await place.database.fetchval(_WAITING))


def main(queued: int = QUEUED, others: int = OTHERS) -> int:
    """Returns the exit code: 1 when more of the noisy user's runs begin before another's first than the goal."""
    stores.set_up()
    found, before, after = uvloop.run(_measured(queued, others))
    counts, waited = [count for count, _ in found], [ms for _, ms in found]
    report.table(
        ("what", "p50", "p90", "most"),
        (
            ("runs of the noisy user that began before", *(talk.quantile(counts, part) for part in (0.5, 0.9, 1.0))),
            ("ms in the queue", *(f"{talk.quantile(waited, part):.0f}" for part in (0.5, 0.9, 1.0))),
        ),
    )
    return report.verdict(
        "fairness", max(counts) <= GOAL, f"at most {GOAL} begins before", f"at most {max(counts)}", others=len(found),
        queued_before=before, queued_after=after, slots=SLOTS, ms_of_a_run=SHORT_S * 1000,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
