"""Several replicas append for the same users: no deadlock, no hole, and nobody waits for one that stands still."""

from __future__ import annotations

import asyncio

import pytest

from chassis import postgres
from netra import errors, ids
from tests.integration.events.conftest import Place, Run, event, whole


async def _write(run: Run, appends: int) -> None:
    for _ in range(appends):
        await run.append(event(), event())


async def test_a_hot_user_on_two_replicas_has_one_contiguous_record(place: Place) -> None:
    replicas = [await place.replica() for _ in range(2)]
    hot = ids.uuid7()
    runs = [await place.run(replicas[number % 2], hot) for number in range(16)]
    # users that are written by both replicas in different orders
    others = [ids.uuid7() for _ in range(4)]
    runs += [await place.run(replica, user) for user in others for replica in replicas]
    await asyncio.gather(*(_write(run, 40) for run in runs))
    for user, count in [(hot, 16 * 80), *((user, 160) for user in others)]:
        recorded = await whole(replicas[0], user, limit=500)
        assert [each.cursor for each in recorded] == list(range(1, count + 1))
        assert [each.frame for each in await whole(replicas[1], user)] == [each.frame for each in recorded]
    for run in runs[:16]:
        seqs = [each.seq for each in await whole(replicas[0], hot, run_id=run.run_id)]
        assert seqs == list(range(1, 81))


async def test_a_lock_held_elsewhere_holds_up_only_its_own_user(place: Place) -> None:
    replica = await place.replica()
    runs = [await place.run(replica) for _ in range(8)]
    async with place.admin() as admin:
        await admin.execute("BEGIN")
        await admin.execute("SELECT last FROM events.cursors WHERE user_id = $1 FOR UPDATE", runs[5].user_id)
        outcomes = await asyncio.gather(*(replica.submit(run.request(event())) for run in runs))
        assert {number: outcome.refused.code for number, outcome in enumerate(outcomes) if outcome.refused} == {5: "UNAVAILABLE"}
        await admin.execute("ROLLBACK")
    assert (await replica.submit(runs[5].sent[0])).last_cursor == 1


@pytest.mark.parametrize("kind", ["writer", "opener"])
async def test_the_database_ends_a_transaction_of_a_replica_that_stands_still(place: Place, kind: str) -> None:
    replica, stopped = await place.replica(), await place.replica()
    run = await place.run(replica)
    pool, user = (stopped.crossing, None) if kind == "writer" else (stopped.own, run.user_id)
    with pytest.raises(errors.Unavailable):
        await _holding(pool, user, run)


async def _holding(pool: postgres.DatabaseManager, user: str | None, run: Run) -> None:
    """Append to a run while a transaction that holds its head stands still; the transaction raises at its end."""
    async with pool.transaction(user) as transaction:
        await transaction.fetch("SELECT run_id FROM events.heads WHERE run_id = $1 FOR UPDATE", run.run_id)
        request, tries = run.request(event()), 1
        # each try waits half a second: the transaction lives two
        while (await run.replica.submit(request)).refused is not None:
            tries += 1
            assert tries < 10
        assert tries > 1
