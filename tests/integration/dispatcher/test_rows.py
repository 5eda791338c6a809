"""The rows of runs, as processes write them at the same time."""

from __future__ import annotations

import asyncio
import random
from datetime import UTC, datetime, timedelta

from chassis import postgres
from netra import ids
from services.dispatcher import runs, store, store_system
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


_ONCE = """
CREATE SEQUENCE public.tries;
CREATE FUNCTION public.once() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$
BEGIN
    IF nextval('public.tries') = 1 THEN
        RAISE deadlock_detected;
    END IF;
    RETURN NEW;
END $$;
CREATE TRIGGER once BEFORE INSERT ON dispatcher.runs FOR EACH ROW EXECUTE FUNCTION public.once();
"""


async def test_a_start_that_has_to_give_way_is_done_again(services: Services, stores: Standalone, database: str) -> None:
    settings = DispatcherSettings(**services.settings("dispatcher"))
    pool = await postgres.open_pool(settings.postgres_dsn("netra_dispatcher", "postgres"), "test")
    services.stack.push_async_callback(pool.close)
    run_id, user_id, thread_id = ids.RunId.new(), ids.UserId(ids.uuid7()), ids.ThreadId.new()
    order = runs.Order(run_id, "agent", "any", "What now?", b"{}", 1.0, "", b"", "token", "")
    async with postgres.connection(prepare.on_database(stores.postgres_admin_url, database)) as admin:
        # a sequence counts on when its transaction was undone
        await admin.execute(_ONCE)
        added = await store.Store(pool).add(
            user_id, order, session_id=ids.uuid7(), tier="free", thread_id=thread_id, request_id="r", digest=b"", correlation_id="c",
            most_queued=10, on_busy=runs.REJECT, passed={},
        )  # fmt: skip
        assert await admin.value("SELECT last_value FROM public.tries") == 2
        assert await admin.value("SELECT count(*) FROM dispatcher.runs") == 1
    assert (added.run.run_id, added.run.state) == (run_id, runs.RunState.QUEUED)


async def test_contexts_are_to_be_closed_for_as_long_as_their_token_lasts(services: Services, stores: Standalone, database: str) -> None:
    settings = DispatcherSettings(**services.settings("dispatcher"))
    pool = await postgres.open_pool(settings.postgres_dsn("netra_dispatcher_system", "postgres_system"), "test")
    services.stack.push_async_callback(pool.close)
    rows = store_system.SystemStore(pool)
    async with postgres.connection(prepare.on_database(stores.postgres_admin_url, database)) as admin:
        run_ids = [str(row["run_id"]) for row in await admin.fetch(_RUNS, ids.uuid7(), ids.uuid7(), OWNER)]
        left, late, closed, *_ = sorted(run_ids)
        await admin.execute("UPDATE dispatcher.runs SET context_open = true WHERE run_id = ANY($1::uuid[])", [left, late, closed])
        await admin.execute("UPDATE dispatcher.runs SET token_renewed_at = now() - interval '61 minutes' WHERE run_id = $1", late)
    assert await rows.open_contexts(1) == [(left, "")]
    assert await rows.open_contexts(9) == [(left, ""), (closed, "")]
    await rows.context_closed(ids.RunId(closed))
    assert await rows.open_contexts(9) == [(left, "")]
