"""Dispatchers take only agents in versions that they have; what nobody has had for long is brought to its end by anybody."""

from __future__ import annotations

import pytest

from netra import ids
from tests.fixtures import queued

OLD, NEW = ("echo", "1.0.0"), ("echo", "2.0.0")
LONG_S = 600.0


async def test_a_dispatcher_claims_the_versions_that_it_has_and_no_other(queue: queued.Queue) -> None:
    user = ids.UserId(ids.uuid7())
    old, new = await queue.start(user, version=OLD[1]), await queue.start(user, version=NEW[1])
    assert [claim.order.run_id for claim in await queue.claim(most=5, agents=[NEW])] == [new]
    assert await queue.claim(most=5, agents=[NEW]) == []
    found = await queue.claim(most=5, agents=[OLD, NEW])
    assert [(claim.order.run_id, claim.order.agent_version, claim.orphaned) for claim in found] == [(old, OLD[1], False)]


async def test_a_run_from_before_there_were_versions_is_claimed_by_any(queue: queued.Queue) -> None:
    run_id = await queue.start(ids.UserId(ids.uuid7()), version="")
    assert await queue.claim(agents=[("other", "1.0.0")]) == []
    found = await queue.claim(agents=[NEW], missing_s=LONG_S)
    assert [(claim.order.run_id, claim.orphaned) for claim in found] == [(run_id, False)]


async def test_a_run_whose_owner_died_waits_for_one_who_has_its_version(queue: queued.Queue) -> None:
    run_id = await queue.start(ids.UserId(ids.uuid7()))
    await queue.claim("dead")
    await queue.let_die(run_id)
    assert await queue.claim(agents=[NEW]) == []
    assert [claim.order.run_id for claim in await queue.claim(agents=[OLD])] == [run_id]


@pytest.mark.parametrize("state", ["queued", "woken", "dead"])
async def test_what_nobody_has_had_for_long_is_orphaned(queue: queued.Queue, state: str) -> None:
    run_id = await queue.start(ids.UserId(ids.uuid7()))
    await queue.everyone.seen([OLD, NEW])
    if state != "queued":
        (claim,) = await queue.claim("dead")
        if state == "woken":
            assert await queue.everyone.suspended(run_id, claim.epoch, "message", 60.0)
            await queue.wake(run_id)
        else:
            await queue.let_die(run_id)
    assert await queue.claim(agents=[NEW], missing_s=LONG_S) == []
    await queue.admin.execute("UPDATE dispatcher.agents_seen SET seen_at = now() - interval '601 seconds' WHERE version = $1", OLD[1])
    # who does not look for such leaves them alone
    assert await queue.claim(agents=[NEW]) == []
    (claim,) = await queue.claim(agents=[NEW], missing_s=LONG_S)
    assert (claim.order.run_id, claim.orphaned, claim.order.agent_version) == (run_id, True, OLD[1])
    assert claim.missing_s == pytest.approx(601, abs=5)


async def test_a_version_that_nobody_ever_had_counts_from_the_start_of_its_first_run(queue: queued.Queue) -> None:
    run_id = await queue.start(ids.UserId(ids.uuid7()), version="9.9.9")
    assert await queue.claim(agents=[NEW], missing_s=LONG_S) == []
    await queue.admin.execute("UPDATE dispatcher.runs SET created_at = now() - interval '700 seconds'")
    assert [claim.order.run_id for claim in await queue.claim(agents=[NEW], missing_s=LONG_S)] == [run_id]


async def test_who_has_a_version_again_takes_its_runs_as_they_are(queue: queued.Queue) -> None:
    run_id = await queue.start(ids.UserId(ids.uuid7()))
    await queue.everyone.seen([OLD])
    await queue.admin.execute("UPDATE dispatcher.agents_seen SET seen_at = now() - interval '1 hour'")
    await queue.everyone.seen([OLD])
    assert await queue.claim(agents=[NEW], missing_s=LONG_S) == []
    found = await queue.claim(agents=[OLD], missing_s=LONG_S)
    assert [(claim.order.run_id, claim.orphaned) for claim in found] == [(run_id, False)]


async def test_what_waited_too_long_in_the_queue_is_overdue_and_waits_for_no_cap_and_no_thread(queue: queued.Queue) -> None:
    user, thread = ids.UserId(ids.uuid7()), ids.uuid7()
    first, second = await queue.many(user, 2, thread_id=thread)
    assert [claim.order.run_id for claim in await queue.claim(most=5)] == [first]
    await queue.admin.execute("UPDATE dispatcher.runs SET created_at = created_at - interval '2 days'")
    assert await queue.claim(most=5) == []
    found = await queue.claim(most=5, queued_s=86_400.0)
    assert [(claim.order.run_id, claim.overdue) for claim in found] == [(second, True)]


async def test_what_is_begun_late_in_its_time_is_not_overdue(queue: queued.Queue) -> None:
    await queue.start(ids.UserId(ids.uuid7()))
    assert [claim.overdue for claim in await queue.claim(queued_s=86_400.0)] == [False]
