"""A run begins in the transaction that stores it when nobody is before it; never more of a user's than their tier has."""

from __future__ import annotations

import asyncio
import json
import time
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

pytestmark = pytest.mark.multi_user
_ROW = (
    "state, epoch, lease_owner, takeovers, ran_s, agent_version, waits_for,"
    " running_since - started_at BETWEEN interval '0' AND interval '1 s' AS begun,"
    " created_at <= started_at AND started_at <= now() AS timely,"
    " extract(epoch FROM lease_until - started_at)::float8 BETWEEN 59.9 AND 60 AS leased"
)


async def _row(queue: queued.Queue, run_id: str) -> dict[str, Any]:
    (row,) = await queue.admin.fetch(f"SELECT {_ROW} FROM dispatcher.runs WHERE run_id = $1", run_id)  # noqa: S608 - a constant
    return dict(row)


def _user() -> ids.UserId:
    return ids.UserId(ids.uuid7())


async def test_it_is_owned_as_a_claim_leaves_it(queue: queued.Queue) -> None:
    before, received = time.monotonic(), datetime.now(UTC)
    run_id = await queue.start(
        _user(), owner="one", lease_s=60.0, concurrent=1, passed={stages.RECEIVED: received, stages.PERSISTED: received}
    )  # fmt: skip
    assert before <= queue.leased_at <= time.monotonic()
    began = {"begun": True, "timely": True, "leased": True, "takeovers": 0, "ran_s": 0.0, "waits_for": ""}
    assert await _row(queue, run_id) == {"state": "running", "epoch": 1, "lease_owner": "one", "agent_version": "1.0.0", **began}
    passed = stages.read(await queue.value(run_id, "stages"))
    assert [stage for stage, _ in stages.in_order(passed)] == [stages.RECEIVED, stages.PERSISTED, stages.ROUTING]
    assert passed[stages.RECEIVED] == received
    assert await queue.claim("two", 5) == []
    assert (await queue.everyone.renew("one", 60.0, [run_id]))[run_id].epoch == 1


async def test_one_whose_owner_dies_is_taken_over_by_another(queue: queued.Queue) -> None:
    run_id = await queue.start(_user(), owner="one", lease_s=60.0, concurrent=1)
    await queue.admin.execute("UPDATE dispatcher.runs SET running_since = now() - interval '9 s', lease_until = now() - interval '2 s'")
    (claim,) = await queue.claim("two")
    assert (claim.order.run_id, claim.epoch, claim.takeovers, claim.cancelled) == (run_id, 2, 1, "")
    assert claim.ran_s == pytest.approx(7.0, abs=0.5)
    assert await queue.everyone.finishing(run_id, 1, {}) is None


async def test_without_an_owner_it_waits(queue: queued.Queue) -> None:
    run_id = await queue.start(_user(), concurrent=9)
    nothing = {"begun": None, "timely": None, "leased": None, "takeovers": 0, "ran_s": 0.0, "waits_for": ""}
    assert await _row(queue, run_id) == {"state": "queued", "epoch": 0, "lease_owner": None, "agent_version": "1.0.0", **nothing}
    assert (queue.leased_at, json.loads(await queue.value(run_id, "stages"))) == (0.0, {})


async def test_the_same_request_is_not_begun_again(queue: queued.Queue) -> None:
    user, thread = _user(), ids.ThreadId.new()
    first = await queue.start(user, owner="one", lease_s=60.0, concurrent=2, request_id="same", thread_id=thread)
    assert queue.leased_at
    again = await queue.start(user, owner="two", lease_s=60.0, concurrent=2, request_id="same", thread_id=thread)
    assert (again, queue.leased_at, await queue.value(first, "lease_owner")) == (first, 0.0, "one")


@pytest.mark.parametrize("state", ["queued", "running", "suspended"])
@pytest.mark.parametrize("whose", ["mine", "another's"])
async def test_it_waits_while_its_thread_has_a_run_under_way(queue: queued.Queue, state: str, whose: str) -> None:
    user, thread = _user(), ids.ThreadId.new()
    first = await queue.start(user if whose == "mine" else _user(), thread_id=thread)
    if state != "queued":
        (claim,) = await queue.claim()
        assert state == "running" or await queue.everyone.suspended(first, claim.epoch, "message", 60.0)
    assert not await queue.begin(user, thread_id=thread, concurrent=9)


async def test_it_does_not_wait_for_a_run_at_its_end(queue: queued.Queue) -> None:
    user, thread = _user(), ids.ThreadId.new()
    await queue.start(user, thread_id=thread)
    (claim,) = await queue.claim()
    assert await queue.everyone.finishing(claim.order.run_id, claim.epoch, {}) is not None
    assert await queue.begin(user, thread_id=thread, concurrent=1)


@pytest.mark.parametrize("on_busy", [runs.INTERRUPT, runs.ROLLBACK])
async def test_it_waits_for_those_that_it_stops(queue: queued.Queue, on_busy: str) -> None:
    user, thread = _user(), ids.ThreadId.new()
    assert await queue.begin(user, thread_id=thread)
    assert not await queue.begin(user, thread_id=thread, on_busy=on_busy)
    assert len(queue.stopped) == 1


async def test_it_waits_behind_what_the_user_has_waiting(queue: queued.Queue) -> None:
    user, other = _user(), _user()
    (waiting,) = await queue.many(user, 1)
    assert not await queue.begin(user)
    assert await queue.begin(other)
    # one that only ends is nothing to wait behind
    await queue.admin.execute("UPDATE dispatcher.runs SET cancelled_at = now() WHERE user_id = $1", user)
    assert await queue.begin(user)
    assert waiting in [claim.order.run_id for claim in await queue.claim(most=5)]


@pytest.mark.parametrize("state", ["running", "suspended"])
async def test_it_waits_when_the_user_has_as_many_as_the_tier_allows(queue: queued.Queue, state: str) -> None:
    user = _user()
    for _ in range(2):
        assert await queue.begin(user)
    # those of others, and calls of tools, are not counted
    assert await queue.begin(_user())
    await queue.admin.execute("UPDATE dispatcher.runs SET state = $1", state)
    assert not await queue.begin(user)
    await queue.admin.execute("UPDATE dispatcher.runs SET kind = 'tool' WHERE state <> 'queued'")
    await queue.admin.execute("DELETE FROM dispatcher.runs WHERE state = 'queued'")
    assert await queue.begin(user)


@pytest.mark.parametrize("was", ["queued", "woken"])
async def test_a_claim_that_is_not_committed_yet_counts(stores: Standalone, database: str, queue: queued.Queue, was: str) -> None:
    user = _user()
    claimed = await queue.start(user)
    if was == "woken":
        (claim,) = await queue.claim()
        assert await queue.everyone.suspended(claimed, claim.epoch, "timer", 60.0)
        await queue.wake(claimed)
    async with postgres.connection(prepare.on_database(stores.postgres_admin_url, database)) as elsewhere, elsewhere.savepoint():
        await elsewhere.execute("UPDATE dispatcher.runs SET state = 'running'")
        assert not await queue.begin(user, concurrent=1)


async def test_however_starts_and_claims_meet_no_more_of_a_users_execute_than_may(queue: queued.Queue) -> None:
    users, cap = [_user() for _ in range(4)], 3
    caps = {"free": cap}
    for _ in range(12):
        for user in users:
            asleep = [await queue.start(user) for _ in range(2)]
            for claim in await queue.claim(most=9, caps={"free": 9}):
                assert await queue.everyone.suspended(claim.order.run_id, claim.epoch, "timer", 60.0)
            for run_id in asleep:
                await queue.wake(run_id)
        async with asyncio.TaskGroup() as group:
            for number, user in enumerate(users * 4):
                group.create_task(queue.begin(user, f"owner {number % 3}", concurrent=cap, most_queued=99))
                group.create_task(queue.claim(f"owner {number % 3}", 5, caps=caps))
        rows = await queue.admin.fetch("SELECT user_id FROM dispatcher.runs WHERE state = 'running'")
        assert max(Counter(row["user_id"] for row in rows).values()) <= cap
        # nothing is lost: what was not begun at once is there for the next look
        while await queue.claim(most=9, caps=caps):
            pass
        rows = await queue.admin.fetch("SELECT user_id FROM dispatcher.runs WHERE state = 'running'")
        assert Counter(row["user_id"] for row in rows) == dict.fromkeys(users, cap)
        await queue.admin.execute("DELETE FROM dispatcher.runs")


async def test_of_one_thread_one_executes_however_starts_and_claims_meet(queue: queued.Queue) -> None:
    users, thread = [_user() for _ in range(3)], ids.ThreadId.new()
    for _ in range(10):
        async with asyncio.TaskGroup() as group:
            for number, user in enumerate(users * 3):
                group.create_task(queue.begin(user, f"owner {number % 3}", thread_id=thread, concurrent=9))
                group.create_task(queue.claim(f"owner {number % 3}", 5, caps={"free": 9}))
        assert await queue.admin.value("SELECT count(*) FROM dispatcher.runs WHERE state = 'running'") == 1
        await queue.admin.execute("DELETE FROM dispatcher.runs")


async def test_what_nobody_knows_to_have_begun_is_had_by_others_at_once(queue: queued.Queue) -> None:
    user = _user()
    lost = await queue.start(user, owner="one", lease_s=60.0, concurrent=2, request_id="lost")
    kept = await queue.start(user, owner="one", lease_s=60.0, concurrent=2, request_id="kept")
    for owner, request_id in (("two", "lost"), ("one", "kept"), ("one", "never")):
        await queue.everyone.disown(owner, user, request_id, [kept])
    assert await queue.claim("two", 5) == []
    await queue.everyone.disown("one", user, "lost", [kept])
    (claim,) = await queue.claim("two", 5)
    assert (claim.order.run_id, claim.epoch, claim.takeovers) == (lost, 2, 0)


async def test_a_look_says_whether_there_may_be_more_and_whether_something_waits(queue: queued.Queue) -> None:
    user, other = _user(), _user()

    async def look(most: int) -> tuple[int, bool, bool]:
        found = await queue.claim(most=most)
        return len(found), found.more, found.waits

    assert await look(5) == (0, False, False)
    await queue.many(user, 1)
    assert await look(5) == (1, False, False)
    await queue.many(user, 3)
    # the tier has two at a time
    assert await look(5) == (1, False, True)
    assert await look(5) == (0, False, True)
    await queue.many(other, 2)
    assert await look(1) == (1, True, True)
    assert await look(5) == (1, False, True)
