"""Claims are fair: users have their turns in a circle, whatever one of them has waiting, with caps and many dispatchers."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence

import pytest

from netra import ids
from services.dispatcher import runs
from tests.fixtures import queued

pytestmark = pytest.mark.multi_user


def _users(count: int) -> list[ids.UserId]:
    return sorted(ids.UserId(ids.uuid7()) for _ in range(count))


async def _owners(queue: queued.Queue, claims: Sequence[runs.Claim]) -> list[str]:
    return [await queue.value(claim.order.run_id, "user_id") for claim in claims]


@pytest.mark.parametrize("tier", ["free", "internal"])
@pytest.mark.parametrize("noisy_first", [True, False])
async def test_a_thousand_queued_runs_delay_anothers_first_by_at_most_one_slot(queue: queued.Queue, tier: str, noisy_first: bool) -> None:
    first, second = _users(2)
    noisy, quiet = (first, second) if noisy_first else (second, first)
    await queue.many(noisy, 1000, tier=tier)
    after = (await queue.claim(most=2)).after
    await queue.many(quiet, 1)
    # one slot becomes free at a time
    served = [await queue.claim(most=1, after_user=after)]
    if await _owners(queue, served[0]) != [quiet]:
        served.append(await queue.claim(most=1, after_user=served[0].after))
    assert quiet in [owner for claims in served for owner in await _owners(queue, claims)]


async def test_the_first_run_of_each_comes_before_the_second_of_any(queue: queued.Queue) -> None:
    noisy, *others = _users(5)
    await queue.many(noisy, 1000, tier="internal")
    for other in others:
        await queue.many(other, 3)
    owners = await _owners(queue, await queue.claim(most=5))
    assert sorted(owners) == sorted([noisy, *others])


@pytest.mark.parametrize("turn", [0, 1])
async def test_of_those_at_hand_who_has_less_running_goes_first_whosever_turn_it_is(queue: queued.Queue, turn: int) -> None:
    users = _users(2)
    noisy, quiet = users[turn], users[1 - turn]
    await queue.many(noisy, 9, tier="internal")
    assert len(await queue.claim(most=5)) == 5
    await queue.many(quiet, 1)
    assert await _owners(queue, await queue.claim(after_user=quiet)) == [quiet]


async def test_users_have_their_turns_in_a_circle_when_one_slot_is_free_at_a_time(queue: queued.Queue) -> None:
    users = _users(7)
    for user in users:
        await queue.many(user, 20, tier="internal")
    after, served = "", list[str]()
    for _ in range(21):
        claims = await queue.claim(after_user=after)
        served += await _owners(queue, claims)
        after = claims.after
        await queue.end(claims[0])
    assert served == users * 3


async def test_no_user_executes_more_than_their_tier_allows_however_many_dispatchers_claim_at_once(queue: queued.Queue) -> None:
    users = _users(6)
    for user in users:
        await queue.many(user, 50)

    async with asyncio.TaskGroup() as group:
        looks = [group.create_task(_looks(queue, f"dispatcher {number}")) for number in range(4)]
    found = [claim.order.run_id for look in looks for claim in look.result()]
    assert len(found) == len(set(found)) == 12
    assert Counter([await queue.value(run_id, "user_id") for run_id in found]) == dict.fromkeys(users, 2)


async def test_who_claims_waits_for_who_claims_already_and_counts_what_they_took(queue: queued.Queue) -> None:
    (user,) = _users(1)
    runs_ = await queue.many(user, 5)
    claim = "hashtext('dispatcher.claim')"
    waits = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event = 'advisory'"
    took = (
        "UPDATE dispatcher.runs SET state = 'running', epoch = 1, lease_owner = 'one', lease_until = now() + interval '1 minute'"
        " WHERE run_id = ANY($1::text[]::uuid[])"
    )
    async with asyncio.timeout(20), asyncio.TaskGroup() as group:
        await queue.admin.execute(f"SELECT pg_advisory_lock({claim})")
        claims = group.create_task(queue.claim("two", 5))
        while not await queue.admin.value(waits):
            pass
        await queue.admin.execute(took, runs_[: queued.CAPS["free"]])
        await queue.admin.execute(f"SELECT pg_advisory_unlock({claim})")
    assert claims.result() == []


async def _looks(queue: queued.Queue, owner: str) -> list[runs.Claim]:
    after, found = "", list[runs.Claim]()
    for _ in range(5):
        claims = await queue.claim(owner, 3, after_user=after)
        found += claims
        after = claims.after
    return found


async def test_a_quiet_user_is_next_at_whichever_dispatcher_has_the_next_slot(queue: queued.Queue) -> None:
    noisy, quiet = _users(2)
    await queue.many(noisy, 1000, tier="internal")
    after = {}
    for owner in ("one", "two", "three"):
        after[owner] = (await queue.claim(owner, 5)).after
    await queue.many(quiet, 1)
    async with asyncio.TaskGroup() as group:
        looks = [group.create_task(queue.claim(owner, 1, after_user=after[owner])) for owner in after]
    owners = [await queue.value(look.result()[0].order.run_id, "user_id") for look in looks]
    assert sorted(owners) == sorted([noisy, noisy, quiet])


async def test_of_one_thread_one_run_executes_at_a_time_in_the_order_of_their_start(queue: queued.Queue) -> None:
    (user,) = _users(1)
    thread = ids.uuid7()
    waiting = await queue.many(user, 3, thread_id=thread)
    for expected in waiting:
        claims = await queue.claim(most=5)
        assert [claim.order.run_id for claim in claims] == [expected]
        assert await queue.claim(most=5) == []
        await queue.end(claims[0])


async def test_users_who_may_not_begin_anything_hold_up_nobody_behind_them(queue: queued.Queue) -> None:
    *blocked, last = _users(301)
    for user in blocked:
        await queue.many(user, 3, thread_id=ids.uuid7())
    assert len(await queue.claim(most=300, caps={"free": 1})) == 300
    await queue.many(last, 1)
    # each of the three hundred has runs waiting behind the one that executes
    assert await _owners(queue, await queue.claim(caps={"free": 1})) == [last]


async def test_a_thousand_runs_that_were_cancelled_while_they_waited_hold_up_nobodys_first(queue: queued.Queue) -> None:
    noisy, quiet = _users(2)
    await queue.many(noisy, 1000)
    await queue.admin.execute("UPDATE dispatcher.runs SET cancelled_at = now()")
    await queue.many(quiet, 1)
    assert sorted(await _owners(queue, await queue.claim(most=2))) == sorted([noisy, quiet])


async def test_a_turn_is_lost_by_nobody_while_others_come_and_go(queue: queued.Queue) -> None:
    users = _users(40)
    for user in users:
        await queue.many(user, 5, tier="internal")
    after, served = "", Counter[str]()
    for _ in range(80):
        claims = await queue.claim(after_user=after)
        after = claims.after
        served.update(await _owners(queue, claims))
        await queue.end(claims[0])
        # somebody new at each step
        await queue.many(ids.UserId(ids.uuid7()), 1)
    assert min(served[user] for user in users) >= 1
