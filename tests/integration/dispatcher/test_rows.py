"""The rows of runs, as processes write them at the same time."""

from __future__ import annotations

import asyncio
import random
from datetime import UTC, datetime, timedelta

from chassis import postgres
from netra import ids
from services.dispatcher import runs, store_system
from services.dispatcher.settings import DispatcherSettings
from standalone import prepare
from tests.fixtures.stack import Standalone
from tests.fixtures.storage import Services

OWNER = "somebody"
_RUNS = """
INSERT INTO dispatcher.runs (run_id, user_id, thread_id, request_id, digest, kind, agent, request, inputs, deadline_s, context,
    context_token, correlation_id, traceparent, state, session_id, lease_owner, lease_until)
SELECT gen_random_uuid(), $1, gen_random_uuid(), number::text, '', 'agent', 'any', '', '', 1, '', '', '', '', 'running', $2, $3,
    now() + interval '1 hour'
FROM generate_series(1, 30) AS number RETURNING run_id
"""


async def test_who_writes_to_many_runs_at_once_waits_for_others_and_never_crosswise(
    services: Services, stores: Standalone, database: str
) -> None:
    settings = DispatcherSettings(**services.settings("dispatcher"))
    pool = await postgres.open_pool(settings.postgres_dsn("netra_dispatcher_system", "postgres_system"), "test")
    services.stack.push_async_callback(pool.close)
    rows, user_id, session_id, now = store_system.SystemStore(pool), ids.uuid7(), ids.uuid7(), datetime.now(UTC)
    async with postgres.connection(prepare.on_database(stores.postgres_admin_url, database)) as admin:
        run_ids = [str(row["run_id"]) for row in await admin.fetch(_RUNS, user_id, session_id, OWNER)]

    async def renewed(seed: int) -> None:
        chance = random.Random(seed)
        for _ in range(80):
            assert len(await rows.renew(OWNER, 60.0, chance.sample(run_ids, len(run_ids)))) == len(run_ids)

    async def narrowed(seed: int) -> None:
        for number in range(80):
            since = now + timedelta(seconds=10 * number + seed)
            await rows.narrow(user_id, runs.Rights(("user",), "free", since))

    async with asyncio.timeout(120), asyncio.TaskGroup() as group:
        for seed in range(3):
            group.create_task(renewed(seed))
            group.create_task(narrowed(seed))
        await rows.revoke(session_id, "", now)
    held = await rows.renew(OWNER, 60.0, run_ids)
    assert {(each.cancelled, each.rights) for each in held.values()} == {
        ("security", runs.Rights(("user",), "free", now + timedelta(seconds=792)))
    }  # fmt: skip
