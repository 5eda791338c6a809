"""Ends of runs that come at the same moment are stored together: each by its own owner, and none waits for another."""

from __future__ import annotations

import asyncio
from collections import Counter
from datetime import UTC, datetime
from typing import Any

import pytest

from chassis import postgres
from netra import ids
from services.dispatcher import runs, stages
from standalone import prepare
from tests.fixtures import queued
from tests.fixtures.stack import Standalone


async def _at_their_end(queue: queued.Queue, many: int) -> list[runs.Claim]:
    await queue.many(ids.UserId(ids.uuid7()), many)
    claims = await queue.claim(most=many, caps={"free": many})
    assert len(claims) == many
    for claim in claims:
        assert await queue.everyone.finishing(claim.order.run_id, claim.epoch, {}) is not None
    return claims


async def _end(queue: queued.Queue, claim: runs.Claim, *, epoch: int = 0, state: runs.RunState = runs.RunState.COMPLETED) -> None:
    run_id, passed = claim.order.run_id, {stages.RESPONDED: datetime.now(UTC)}
    outcome = run_id.encode()
    await queue.everyone.ended(run_id, epoch or claim.epoch, state, outcome, passed, context_open=state == runs.RunState.FAILED)


async def _rows(queue: queued.Queue) -> dict[str, Any]:
    query = (
        "SELECT run_id, state, outcome = run_id::text::bytea AS own, lease_owner IS NULL AND lease_until IS NULL AS free, context_open,"
        " ended_at IS NOT NULL AS over, (SELECT count(*) FROM jsonb_object_keys(stages)) AS stages FROM dispatcher.runs"
    )
    return {row["run_id"]: tuple(row.values())[1:] for row in await queue.admin.fetch(query)}


async def test_many_end_in_one_statement_each_as_it_ended(queue: queued.Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    claims, asked = await _at_their_end(queue, 20), list[str]()
    alone = postgres.DatabaseManager.alone

    async def counted(database: postgres.DatabaseManager, query: str, *arguments: Any, **more: Any) -> Any:
        asked.append(query)
        return await alone(database, query, *arguments, **more)

    monkeypatch.setattr(postgres.DatabaseManager, "alone", counted)
    async with asyncio.TaskGroup() as group:
        for number, claim in enumerate(claims):
            group.create_task(_end(queue, claim, state=runs.RunState.FAILED if number % 2 else runs.RunState.COMPLETED))
    assert len(asked) == 1
    ended = Counter((await _rows(queue)).values())
    assert ended == {("completed", True, True, False, True, 2): 10, ("failed", True, True, True, True, 2): 10}


async def test_each_is_fenced_by_itself(queue: queued.Queue) -> None:
    claims = await _at_their_end(queue, 6)
    async with asyncio.TaskGroup() as group:
        for number, claim in enumerate(claims):
            # the word of an older owner, also beside that of the newest
            group.create_task(_end(queue, claim, epoch=claim.epoch + 1 if number < 3 else 0))
            group.create_task(_end(queue, claim, epoch=7, state=runs.RunState.FAILED))
    rows = await _rows(queue)
    assert [rows[claim.order.run_id][0] for claim in claims] == ["finishing"] * 3 + ["completed"] * 3
    # and none ends twice
    await _end(queue, claims[5], state=runs.RunState.FAILED)
    assert (await _rows(queue))[claims[5].order.run_id][0] == "completed"


async def test_none_waits_for_the_row_of_another(stores: Standalone, database: str, queue: queued.Queue) -> None:
    claims = await _at_their_end(queue, 5)
    held, *others = claims
    async with asyncio.timeout(20), asyncio.TaskGroup() as group:
        async with postgres.connection(prepare.on_database(stores.postgres_admin_url, database)) as elsewhere, elsewhere.savepoint():
            await elsewhere.execute("SELECT FROM dispatcher.runs WHERE run_id = $1 FOR UPDATE", str(held.order.run_id))
            waiting = group.create_task(_end(queue, held))
            for claim in others[:2]:
                group.create_task(_end(queue, claim))
            for claim in others[2:]:
                await _end(queue, claim)
            async with asyncio.timeout(10):
                while Counter(row[0] for row in (await _rows(queue)).values())["completed"] < 4:  # noqa: ASYNC110 - in the database
                    await asyncio.sleep(0.01)
            assert not waiting.done()
    assert {row[0] for row in (await _rows(queue)).values()} == {"completed"}


async def test_what_they_asked_people_for_has_expired(queue: queued.Queue) -> None:
    claims = await _at_their_end(queue, 3)
    await queue.admin.execute(
        "INSERT INTO dispatcher.approvals (approval_id, run_id, user_id, thread_id, step_key, message, tool_name, parameters, quorum,"
        " expires_at, outcome) SELECT gen_random_uuid(), run_id, user_id, thread_id, 's', '', '', '{}', 1, now() + interval '1 day',"
        " given.outcome FROM dispatcher.runs CROSS JOIN unnest(ARRAY['approved', NULL]) AS given (outcome)"
    )
    async with asyncio.TaskGroup() as group:
        for claim in claims[:2]:
            group.create_task(_end(queue, claim))
    rows = await queue.admin.fetch("SELECT run_id, outcome FROM dispatcher.approvals")
    asked = Counter((row["run_id"] == claims[2].order.run_id, row["outcome"]) for row in rows)
    assert asked == {(False, "approved"): 2, (False, "expired"): 2, (True, "approved"): 1, (True, None): 1}


async def test_those_that_wait_are_stored_before_all_is_closed(queue: queued.Queue) -> None:
    claims = await _at_their_end(queue, 10)
    async with asyncio.TaskGroup() as group:
        for claim in claims:
            group.create_task(_end(queue, claim))
        await asyncio.sleep(0)
        await queue.everyone.close()
        assert {row[0] for row in (await _rows(queue)).values()} == {"completed"}
