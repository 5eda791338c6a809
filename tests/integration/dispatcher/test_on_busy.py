"""Two messages on one thread: what becomes of the run under way is chosen per request; and the queue has an end."""

from __future__ import annotations

import asyncio

import pytest

from netra import errors, ids
from services.dispatcher import admission, runs
from tests.fixtures import queued

pytestmark = pytest.mark.multi_user


def _user() -> ids.UserId:
    return ids.UserId(ids.uuid7())


async def _under_way(queue: queued.Queue, user: ids.UserId, thread: ids.ThreadId) -> list[ids.RunId]:
    """One run that executes, and one that waits behind it."""
    first = await queue.start(user, thread_id=thread)
    assert [claim.order.run_id for claim in await queue.claim()] == [first]
    return [first, await queue.start(user, thread_id=thread)]


async def test_who_enqueues_waits_for_all_before(queue: queued.Queue) -> None:
    user, thread = _user(), ids.ThreadId.new()
    first, second = await _under_way(queue, user, thread)
    third = await queue.start(user, thread_id=thread, on_busy=runs.ENQUEUE)
    assert queue.stopped == []
    assert [await queue.value(run_id, "cancelled_at") for run_id in (first, second, third)] == [None] * 3


@pytest.mark.parametrize("state", ["queued", "running", "suspended"])
async def test_who_rejects_is_told_that_the_thread_is_busy_and_leaves_nothing(queue: queued.Queue, state: str) -> None:
    user, thread = _user(), ids.ThreadId.new()
    first = await queue.start(user, thread_id=thread)
    if state != "queued":
        (claim,) = await queue.claim()
        assert state == "running" or await queue.everyone.suspended(first, claim.epoch, "message", 60.0)
    for other in (user, _user()):
        with pytest.raises(errors.Busy):
            await queue.start(other, thread_id=thread, on_busy=runs.REJECT)
    assert await queue.admin.value("SELECT count(*) FROM dispatcher.runs") == 1


@pytest.mark.parametrize("how", [runs.INTERRUPT, runs.ROLLBACK])
async def test_who_interrupts_stops_the_users_own_and_is_next(queue: queued.Queue, how: str) -> None:
    user, other, thread = _user(), _user(), ids.ThreadId.new()
    own = await _under_way(queue, user, thread)
    others = await queue.start(other, thread_id=thread)
    elsewhere = await queue.start(user)
    last = await queue.start(user, thread_id=thread, on_busy=how)
    assert sorted(queue.stopped) == sorted(own)
    kept = await queue.everyone.renew("one", 60.0, own[:1])
    assert (kept[own[0]].cancelled, kept[own[0]].rolled_back) == ("user", how == runs.ROLLBACK)
    for run_id in (others, elsewhere, last):
        assert (await queue.value(run_id, "cancelled_at"), await queue.value(run_id, "rolled_back_at")) == (None, None)
    assert [await queue.value(run_id, "rolled_back_at") is not None for run_id in own] == [how == runs.ROLLBACK] * 2
    found = {claim.order.run_id: claim for claim in await queue.claim(most=9, caps={"free": 9})}
    # the one that executes comes to its end where it is; the one that waited is brought to it; the rest of the thread waits for both
    assert set(found) == {own[1], elsewhere}
    assert (found[own[1]].cancelled, found[own[1]].rolled_back) == ("user", how == runs.ROLLBACK)


async def test_the_same_request_interrupts_nothing_a_second_time(queue: queued.Queue) -> None:
    user, thread = _user(), ids.ThreadId.new()
    first = await queue.start(user, thread_id=thread, on_busy=runs.INTERRUPT, request_id="r")
    assert await queue.start(user, thread_id=thread, on_busy=runs.INTERRUPT, request_id="r") == first
    assert (queue.stopped, await queue.value(first, "cancelled_at")) == ([], None)


async def test_of_those_who_interrupt_each_other_at_once_one_remains(queue: queued.Queue) -> None:
    user, thread = _user(), ids.ThreadId.new()
    async with asyncio.TaskGroup() as group:
        for _ in range(8):
            group.create_task(queue.start(user, thread_id=thread, on_busy=runs.INTERRUPT))
    assert await queue.admin.value("SELECT count(*) FROM dispatcher.runs WHERE cancelled_at IS NULL") == 1


async def test_a_run_that_has_ended_is_not_rolled_back(queue: queued.Queue) -> None:
    user, thread = _user(), ids.ThreadId.new()
    first = await queue.start(user, thread_id=thread)
    (claim,) = await queue.claim()
    await queue.end(claim)
    await queue.start(user, thread_id=thread, on_busy=runs.ROLLBACK)
    assert (queue.stopped, await queue.value(first, "rolled_back_at")) == ([], None)


async def test_a_user_has_so_many_runs_waiting_and_no_more(queue: queued.Queue) -> None:
    user = _user()
    await queue.many(user, 3)
    with pytest.raises(errors.RateLimited):
        await queue.start(user, most_queued=3)
    await queue.start(_user(), most_queued=3)


async def test_the_queue_of_all_users_has_an_end(queue: queued.Queue) -> None:
    for _ in range(3):
        await queue.many(_user(), 2)
    assert [await queue.everyone.queued(most) for most in (5, 6, 7)] == [5, 6, 6]
    with pytest.raises(errors.RateLimited) as refused:
        await admission.Room(queue.everyone, 6).require()
    assert refused.value.retry_after_ms
    await admission.Room(queue.everyone, 7).require()
