"""The record on a real PostgreSQL: as many replicas of its writer as a test wants, over one database."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence
from datetime import UTC, date, datetime, timedelta
from typing import Any

import pytest

from chassis import postgres
from netra import ids
from netra.context import UserExecutionContext
from netra.events.v1 import events_pb2
from services.events import commit, erasure, heads, log, memory, store, store_retention, store_system, sweep
from standalone import prepare
from tests.fixtures.stack import Standalone

TENANT = ids.uuid7()


def context_of(
    user_id: str, *, tier: str = "free", run_id: str = "", tenant_id: str = TENANT, thread_id: str = "", **more: Any
) -> UserExecutionContext:  # fmt: skip
    """An execution context of a user."""
    return UserExecutionContext.from_request(
        user_id=user_id, tenant_id=tenant_id, session_id=ids.uuid7(), thread_id=thread_id or ids.uuid7(), run_id=run_id or ids.uuid7(),
        request_id="m1", roles=("user",), tier=tier, **more,
    )  # fmt: skip


def event(kind: str = "agent_thinking", data: bytes = b'{"a":1}', **more: Any) -> events_pb2.NewEvent:
    """A new event."""
    return events_pb2.NewEvent(event_id=ids.uuid7(), type=kind, data=data, **more)


_SPREAD = (
    """
    UPDATE events.events e SET recorded_at = recorded_at - interval '1 day' * ((c.last - e.cursor) / $2::int)
    FROM events.cursors c WHERE c.user_id = $1 AND e.user_id = $1
    """,
    "DELETE FROM events.days WHERE user_id = $1",
    """
    INSERT INTO events.days SELECT user_id, (recorded_at AT TIME ZONE 'UTC')::date, retention, min(cursor)
    FROM events.events WHERE user_id = $1 GROUP BY 1, 2, 3
    """,
    """
    UPDATE events.heads h SET created_at = e.first, last_at = e.last
    FROM (SELECT run_id, min(recorded_at) AS first, max(recorded_at) AS last FROM events.events WHERE user_id = $1 GROUP BY 1) e
    WHERE h.run_id = e.run_id
    """,
)


class Replica:
    """One writer of the record, with connections of its own."""

    def __init__(self, own: postgres.DatabaseManager, crossing: postgres.DatabaseManager) -> None:
        self.own, self.crossing = own, crossing
        self.memory = memory.Memory()
        self.record = store.Record(own, self.memory)
        self.writer = store_system.Writer(crossing, self.memory, self.record.open)
        self.committer = commit.Committer(self.writer, self)
        self.announced: list[log.Recorded] = []
        self.retention = store_retention.Retention(crossing)
        self.erasures = erasure.Erasures(store_retention.Erasures(own))

    def announce(self, events: Sequence[log.Recorded]) -> None:
        """Take note of what was committed."""
        self.announced += events

    async def submit(
        self, request: events_pb2.AppendRequest, context: UserExecutionContext | None = None, opens: heads.NewHead | None = None
    ) -> log.Outcome:
        """Append, and wait for the answer."""
        answer: asyncio.Future[log.Outcome] = asyncio.get_running_loop().create_future()
        await self.committer.submit(log.checked(request, context, opens), answer.set_result)
        async with asyncio.timeout(20):
            return await answer

    def sweep(self, kept_for: Mapping[str, int], grace_h: float = 0) -> sweep.Sweep:
        """A sweep under a policy."""
        return sweep.Sweep(self.retention, self.erasures, lambda retention: kept_for.get(retention, 0), sorted(kept_for), grace_h)


class Run:
    """A run whose record is open on a replica; appends go on where the last one ended."""

    def __init__(self, replica: Replica, context: UserExecutionContext) -> None:
        self.replica, self.context = replica, context
        self.run_id, self.user_id = str(context.run_id), str(context.user_id)
        self.next_seq = 1
        self.sent: list[events_pb2.AppendRequest] = []

    def request(
        self, *events: events_pb2.NewEvent, steps: Mapping[str, bytes] | None = None, end: bool = False
    ) -> events_pb2.AppendRequest:
        """The next append."""
        made = [events_pb2.Step(key=key, result=result) for key, result in (steps or {}).items()]
        request = events_pb2.AppendRequest(
            append_id=len(self.sent) + 1, run_id=self.run_id, epoch=1, first_seq=self.next_seq, events=events, steps=made, end=end
        )
        self.sent.append(request)
        self.next_seq += len(events)
        return request

    async def append(self, *events: events_pb2.NewEvent, steps: Mapping[str, bytes] | None = None, end: bool = False) -> int:
        """Append and return the user's cursor."""
        outcome = await self.replica.submit(self.request(*events, steps=steps, end=end))
        if outcome.refused is not None:
            raise outcome.refused
        return outcome.last_cursor


class Place:
    """A database of this test's own and the replicas on it."""

    def __init__(self, stores: Standalone, database: str, stack: contextlib.AsyncExitStack) -> None:
        self.admin_dsn = prepare.on_database(stores.postgres_admin_url, database)
        self._secrets, self._stack = stores.secrets / "events", stack

    def dsn(self, kind: str = "") -> str:
        """The address for one of the service's roles."""
        password = (self._secrets / f"postgres{kind}").read_text().strip()
        return prepare.dsn(self.admin_dsn, f"netra_events{kind}", password, self.admin_dsn.rpartition("/")[2])

    async def replica(self) -> Replica:
        """One more writer, with the options of the real one."""
        own, crossing = await asyncio.gather(
            postgres.open_pool(self.dsn(), "test", size=4, options=store.OPTIONS),
            postgres.open_pool(self.dsn("_system"), "test_system", size=3, options=store_system.OPTIONS),
        )
        self._stack.push_async_callback(own.close)
        self._stack.push_async_callback(crossing.close)
        made = Replica(own, crossing)
        await self._stack.enter_async_context(_running(made.committer))
        return made

    async def run(
        self, replica: Replica, user_id: str = "", *, tier: str = "free", tenant_id: str = TENANT, thread_id: str = "", run_id: str = ""
    ) -> Run:
        """Open a new run."""
        context = context_of(user_id or ids.uuid7(), tier=tier, tenant_id=tenant_id, thread_id=thread_id, run_id=run_id)
        await replica.record.open(heads.new(context, ids.RunId(context.run_id), "0" * 32), 1)
        return Run(replica, context)

    @contextlib.asynccontextmanager
    async def admin(self) -> AsyncIterator[postgres.Transaction]:
        """A connection that is under no wall."""
        async with postgres.connection(self.admin_dsn) as opened:
            yield opened

    async def somebody_waits(self) -> None:
        """Until one who works behind the wall of a user waits for a lock."""
        query = (
            "SELECT count(*) FROM pg_stat_activity"
            " WHERE datname = current_database() AND usename = 'netra_events' AND wait_event_type = 'Lock'"
        )
        async with self.admin() as admin:
            for _ in range(1000):
                if await admin.value(query):
                    return
                await asyncio.sleep(0.005)
        raise AssertionError("nobody waits")

    async def prepared(self, replica: Replica, tier: str, today: date, days: int) -> None:
        """Make the partitions of a class for days that have passed."""
        for ago in range(1, days + 1):
            await replica.retention.prepare(tier, today - timedelta(days=ago))

    async def spread(self, user_id: str, per_day: int) -> None:
        """Make the user's record as if so many events had been recorded each day, the last of them today."""
        async with self.admin() as admin:
            for statement in _SPREAD:
                await admin.execute(statement, user_id, *([per_day] if "$2" in statement else []))


@contextlib.asynccontextmanager
async def _running(committer: commit.Committer) -> AsyncIterator[None]:
    async with asyncio.TaskGroup() as group:
        task = group.create_task(committer.run())
        yield
        task.cancel()


@pytest.fixture
async def place(stores: Standalone, database: str) -> AsyncIterator[Place]:
    """The database; replicas are opened by the test."""
    async with contextlib.AsyncExitStack() as stack:
        yield Place(stores, database, stack)


async def whole(replica: Replica, user_id: str, *, after: int = 0, limit: int = 100, run_id: str = "") -> list[log.Recorded]:
    """The user's record, page by page; each page goes on where the one before ended, without a hole."""
    events: list[log.Recorded] = []
    while True:
        page = await replica.record.page(user_id, after, limit=limit, max_bytes=1024 * 1024, run_id=run_id)
        events += page.events
        if page.through >= page.position.last:
            return events
        assert page.through > after
        after = page.through


def now() -> datetime:
    """Now, UTC."""
    return datetime.now(UTC)
