"""Who owns a run: takeovers are counted exactly, running time goes on counting, and what waits is woken once, and surely."""

from __future__ import annotations

import asyncio

import pytest

from netra import ids
from services.dispatcher import runs
from tests.fixtures import queued


async def _claimed(queue: queued.Queue, owner: str = "one") -> runs.Claim:
    """The one run there is."""
    (claim,) = await queue.claim(owner)
    return claim


async def test_only_a_lease_that_ran_out_counts_as_a_takeover(queue: queued.Queue) -> None:
    run_id = await queue.start(ids.UserId(ids.uuid7()))
    first = await _claimed(queue)
    assert await queue.claim("two") == []
    await queue.let_die(run_id)
    second = await _claimed(queue, "two")
    # planned: the owner lets go of it
    await queue.everyone.release("two")
    third = await _claimed(queue, "three")
    assert await queue.everyone.suspended(run_id, third.epoch, "message", 60.0)
    await queue.wake(run_id)
    fourth = await _claimed(queue, "four")
    await queue.let_die(run_id)
    fifth = await _claimed(queue, "five")
    found = [(claim.epoch, claim.takeovers) for claim in (first, second, third, fourth, fifth)]
    assert found == [(1, 0), (2, 1), (3, 1), (4, 1), (5, 2)]


async def test_an_owner_that_brought_the_run_further_starts_the_count_anew(queue: queued.Queue) -> None:
    run_id, other_id = await queue.start(ids.UserId(ids.uuid7())), await queue.start(ids.UserId(ids.uuid7()))
    await queue.claim("one", 5)
    for run in (run_id, other_id):
        await queue.let_die(run)
    assert [claim.takeovers for claim in await queue.claim("two", 5)] == [1, 1]
    await queue.everyone.renew("two", 60.0, [run_id, other_id], [run_id])
    for run in (run_id, other_id):
        await queue.let_die(run)
    assert {claim.order.run_id: claim.takeovers for claim in await queue.claim("three", 5)} == {run_id: 1, other_id: 2}


async def test_a_run_that_is_at_its_end_is_taken_over_as_that_and_counts(queue: queued.Queue) -> None:
    run_id = await queue.start(ids.UserId(ids.uuid7()))
    claim = await _claimed(queue)
    assert await queue.everyone.finishing(run_id, claim.epoch, {}) is not None
    await queue.let_die(run_id)
    taken = await _claimed(queue, "two")
    assert (taken.finishing, taken.takeovers, await queue.value(run_id, "state")) == (True, 1, "finishing")


async def test_what_was_let_go_of_is_renewed_by_its_old_owner_no_more(queue: queued.Queue) -> None:
    run_id = await queue.start(ids.UserId(ids.uuid7()))
    await _claimed(queue)
    assert list(await queue.everyone.renew("one", 60.0, [run_id])) == [run_id]
    await queue.everyone.release("one")
    assert await queue.everyone.renew("one", 60.0, [run_id]) == {}


async def test_a_run_is_taken_over_by_one_of_those_who_look_at_the_same_time(queue: queued.Queue) -> None:
    for _ in range(5):
        await queue.start(ids.UserId(ids.uuid7()))
    taken = await queue.claim("dead", 5)
    for claim in taken:
        await queue.let_die(claim.order.run_id)
    async with asyncio.TaskGroup() as group:
        looks = [group.create_task(queue.claim(f"dispatcher {number}", 5)) for number in range(4)]
    found = [(claim.order.run_id, claim.takeovers) for look in looks for claim in look.result()]
    assert sorted(found) == sorted((claim.order.run_id, 1) for claim in taken)


async def test_takeovers_need_no_leave_of_the_cap_that_their_users_have(queue: queued.Queue) -> None:
    user = ids.UserId(ids.uuid7())
    waiting = await queue.many(user, 3)
    for claim in await queue.claim("dead", 5):
        await queue.let_die(claim.order.run_id)
    assert sorted(claim.order.run_id for claim in await queue.claim("two", 5)) == sorted(waiting[:2])


async def test_running_time_leaves_out_what_a_run_was_queued_suspended_or_dead(queue: queued.Queue) -> None:
    run_id = await queue.start(ids.UserId(ids.uuid7()))
    await queue.admin.execute("UPDATE dispatcher.runs SET created_at = now() - interval '1 hour'")
    first = await _claimed(queue)
    # ran for 10 s
    await queue.admin.execute("UPDATE dispatcher.runs SET running_since = now() - interval '10 seconds'")
    assert await queue.everyone.suspended(run_id, first.epoch, "approval", 60.0)
    await queue.wake(run_id)
    second = await _claimed(queue)
    # ran for 5 s, has been dead for 95
    await queue.admin.execute(
        "UPDATE dispatcher.runs SET running_since = now() - interval '100 seconds', lease_until = now() - interval '95 seconds'"
    )
    third = await _claimed(queue)
    assert first.ran_s == 0
    assert second.ran_s == pytest.approx(10, abs=3)
    assert third.ran_s == pytest.approx(second.ran_s + 5, abs=0.1)


async def test_a_run_that_waits_is_nobodys_until_its_time_is_over(queue: queued.Queue) -> None:
    run_id = await queue.start(ids.UserId(ids.uuid7()))
    claim = await _claimed(queue)
    assert await queue.everyone.suspended(run_id, claim.epoch, "timer", 60.0)
    assert await queue.claim() == []
    assert await queue.everyone.renew("one", 60.0, [run_id]) == {}
    await queue.admin.execute("UPDATE dispatcher.runs SET wakes_at = now() - interval '1 second'")
    assert (await _claimed(queue)).epoch == claim.epoch + 1
    assert (await queue.value(run_id, "state"), await queue.value(run_id, "waits_for"), await queue.value(run_id, "woken_at")) == (
        "running", "", None,
    )  # fmt: skip


async def test_who_does_not_own_a_run_any_more_cannot_suspend_it(queue: queued.Queue) -> None:
    run_id = await queue.start(ids.UserId(ids.uuid7()))
    claim = await _claimed(queue)
    await queue.let_die(run_id)
    await _claimed(queue, "two")
    assert not await queue.everyone.suspended(run_id, claim.epoch, "message", 60.0)
    assert await queue.value(run_id, "state") == "running"


async def test_what_came_before_a_run_was_suspended_wakes_it(queue: queued.Queue) -> None:
    run_id = await queue.start(ids.UserId(ids.uuid7()))
    claim = await _claimed(queue)
    await queue.wake(run_id)
    assert (await queue.everyone.renew("one", 60.0, [run_id]))[run_id].woken
    assert await queue.everyone.suspended(run_id, claim.epoch, "message", 60.0)
    assert (await _claimed(queue)).epoch == claim.epoch + 1


async def test_a_message_that_the_run_has_read_does_not_wake_it_again_and_a_later_one_does(queue: queued.Queue) -> None:
    user = ids.UserId(ids.uuid7())
    run_id = await queue.start(user)
    claim = await _claimed(queue)
    await queue.mine.send(user, runs.Sent(run_id, "m1", ids.uuid7(), "One."))
    assert await queue.everyone.suspended(run_id, claim.epoch, "message", 60.0, mail_after=1)
    assert await queue.claim() == []
    await queue.mine.send(user, runs.Sent(run_id, "m2", ids.uuid7(), "Two."))
    claim = await _claimed(queue)
    # only the first was read
    assert await queue.everyone.suspended(run_id, claim.epoch, "message", 60.0, mail_after=1)
    assert len(await queue.claim()) == 1


async def test_no_message_is_missed_that_comes_while_the_run_is_being_suspended(queue: queued.Queue) -> None:
    user = ids.UserId(ids.uuid7())
    run_id = await queue.start(user)
    claim = await _claimed(queue)
    for number in range(40):
        async with asyncio.TaskGroup() as group:
            group.create_task(queue.mine.send(user, runs.Sent(run_id, f"m{number}", ids.uuid7(), "Now.")))
            group.create_task(queue.everyone.suspended(run_id, claim.epoch, "message", 60.0, mail_after=number))
        # the message came before or after, and it woke the run either way
        claim = await _claimed(queue)
    assert claim.epoch == 41


async def test_a_run_is_woken_within_its_users_cap(queue: queued.Queue) -> None:
    user = ids.UserId(ids.uuid7())
    run_id = await queue.start(user)
    claim = await _claimed(queue)
    assert await queue.everyone.suspended(run_id, claim.epoch, "message", 60.0)
    await queue.many(user, 2)
    busy = await queue.claim(most=5)
    await queue.wake(run_id)
    assert len(busy) == 2
    assert await queue.claim(most=5) == []
    await queue.end(busy[0])
    assert [claim.order.run_id for claim in await queue.claim(most=5)] == [run_id]


async def test_a_run_that_waits_can_be_cancelled_and_takes_no_cap_for_that(queue: queued.Queue) -> None:
    user = ids.UserId(ids.uuid7())
    run_id = await queue.start(user)
    claim = await _claimed(queue)
    assert await queue.everyone.suspended(run_id, claim.epoch, "message", 60.0)
    await queue.many(user, 2)
    assert len(await queue.claim(most=5)) == 2
    await queue.mine.cancel(user, run_id)
    taken = await _claimed(queue)
    assert (taken.order.run_id, taken.cancelled) == (run_id, "user")


async def test_tokens_of_runs_that_wait_for_days_are_renewed_by_somebody(queue: queued.Queue) -> None:
    run_id = await queue.start(ids.UserId(ids.uuid7()))
    claim = await _claimed(queue)
    assert await queue.everyone.suspended(run_id, claim.epoch, "message", 60.0)
    await queue.admin.execute("UPDATE dispatcher.runs SET token_renewed_at = now() - interval '30 minutes'")
    assert await queue.everyone.old_tokens(10) == [(run_id, claim.epoch, "token")]
    assert await queue.everyone.old_tokens(10, 1) == []
    # one that has run out is renewed by nobody, and held against nobody
    await queue.admin.execute("UPDATE dispatcher.runs SET token_renewed_at = now() - interval '61 minutes'")
    assert await queue.everyone.old_tokens(10) == []
