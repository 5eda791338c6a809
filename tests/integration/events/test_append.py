"""Appends on a real PostgreSQL: fenced, idempotent, refused one by one."""

from __future__ import annotations

import asyncio

import orjson
import pytest

from chassis import postgres
from netra import errors, ids
from netra.events.v1 import events_pb2
from services.events import heads
from tests.integration.events.conftest import Place, Replica, context_of, event, whole


async def test_events_and_steps_are_there_once_acknowledged(place: Place) -> None:
    replica = await place.replica()
    run = await place.run(replica)
    assert await run.append(event("agent_started"), event("tool_executing", tool_call_id="c1"), steps={"s1": b"1"}) == 2
    assert await run.append(steps={"s2": b"2"}) == 2
    recorded = await whole(replica, run.user_id)
    assert [(each.cursor, each.seq, each.kind) for each in recorded] == [(1, 1, "agent_started"), (2, 2, "tool_executing")]
    assert [orjson.loads(each.frame)["cursor"] for each in recorded] == [1, 2]
    head = heads.new(run.context, ids.RunId(run.run_id), "")
    opened = await replica.record.open(head, 2)
    assert (opened.next_seq, opened.ended, opened.open_tool_calls) == (3, False, ["c1"])
    # the answer was lost: the same owner asks again
    assert await replica.record.open(head, 2) == opened
    assert [each.cursor for each in replica.announced] == [1, 2]


async def test_one_of_many_owners_wins_and_the_others_are_fenced(place: Place) -> None:
    replicas = [await place.replica() for _ in range(2)]
    run = await place.run(replicas[0])
    await run.append(event())
    head = heads.new(run.context, ids.RunId(run.run_id), "")
    tries = {epoch: replicas[epoch % 2].record.open(head, epoch) for epoch in range(2, 10)}
    outcomes = dict(zip(tries, await asyncio.gather(*tries.values(), return_exceptions=True), strict=True))
    assert not isinstance(outcomes[9], BaseException)
    assert all(isinstance(outcome, errors.Fenced | heads.Opened) for outcome in outcomes.values())
    for epoch in (2, 8):
        with pytest.raises(errors.Fenced):
            await replicas[0].record.open(head, epoch)
    with pytest.raises(errors.Fenced):
        await run.append(event())


async def test_any_append_again_is_acknowledged_again_and_other_content_is_not(place: Place) -> None:
    replica = await place.replica()
    run = await place.run(replica)
    for number in range(5):
        await run.append(event(data=b'{"n":%d}' % number), event(), steps={f"s{number}": b"%d" % number})
    await run.append(steps={"alone": b"x"})
    for again, cursor in zip(run.sent, (2, 4, 6, 8, 10, 10), strict=True):
        assert (await replica.submit(again)).last_cursor == cursor
    changed = events_pb2.AppendRequest()
    changed.CopyFrom(run.sent[1])
    changed.events[0].data = b'{"n":7}'
    other_step = events_pb2.AppendRequest()
    other_step.CopyFrom(run.sent[2])
    other_step.steps[0].result = b"7"
    for request in (changed, other_step):
        outcome = await replica.submit(request)
        assert outcome.refused is not None
        assert outcome.refused.code == "FAILED_PRECONDITION"
    assert len(await whole(replica, run.user_id)) == 10


async def test_a_poisonous_append_is_refused_alone(place: Place) -> None:
    replica = await place.replica()
    runs = [await place.run(replica) for _ in range(12)]
    requests = [run.request(event(), steps={"s": b"1"}) for run in runs]
    requests[3].events[0].tool_call_id = "\0"
    await replica.submit(requests[7])
    requests[7] = runs[7].request(event(), steps={"s": b"2"})
    outcomes = await asyncio.gather(*(replica.submit(request) for request in requests))
    refused = {number: outcome.refused.code for number, outcome in enumerate(outcomes) if outcome.refused is not None}
    assert refused == {3: "INVALID_PAYLOAD", 7: "ALREADY_EXISTS"}


async def test_a_run_is_of_the_user_who_opened_it(place: Place) -> None:
    replica = await place.replica()
    run = await place.run(replica)
    stranger = context_of(ids.uuid7(), run_id=run.run_id)
    with pytest.raises(errors.NotFound):
        await replica.record.open(heads.new(stranger, ids.RunId(run.run_id), ""), 5)
    await run.append(event())


async def test_what_a_writer_remembers_is_of_one_generation_of_the_record(place: Place) -> None:
    replica = await place.replica()
    run = await place.run(replica)
    await run.append(event())
    async with place.admin() as admin:
        # as if a backup had been put in its place
        await admin.execute("DELETE FROM events.days")
        await admin.execute("UPDATE events.generation SET id = gen_random_uuid()")
        assert await run.append(event()) == 2
        assert await admin.value("SELECT first_cursor FROM events.days") == 2


async def test_an_append_in_a_lost_connection_is_to_be_sent_again(place: Place) -> None:
    replica = await place.replica()
    run = await place.run(replica)
    await run.append(event())
    codes: set[str] = set()
    async with place.admin() as admin:
        for _ in range(20):
            request = run.request(event())
            async with asyncio.TaskGroup() as group:
                group.create_task(_sent(replica, request, codes))
                group.create_task(_disconnected(admin))
    assert codes <= {"UNAVAILABLE"}
    assert [each.seq for each in await whole(replica, run.user_id)] == list(range(1, 22))


async def _sent(replica: Replica, request: events_pb2.AppendRequest, codes: set[str]) -> None:
    """Append as its own client does: again while it is refused."""
    for _ in range(20):
        refused = (await replica.submit(request)).refused
        if refused is None:
            return
        codes.add(refused.code)


async def _disconnected(admin: postgres.Transaction) -> None:
    await admin.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'netra_events_system'")


@pytest.mark.parametrize("held", ["cursors", "heads"])
async def test_what_others_hold_holds_up_nobody_else(place: Place, held: str) -> None:
    replica = await place.replica()
    victim = ids.uuid7()
    runs = [await place.run(replica, victim if number % 8 == 0 else "") for number in range(64)]
    requests = [run.request(event()) for run in runs]
    async with place.admin() as admin:
        await admin.execute("BEGIN")
        await admin.fetch(f"SELECT user_id FROM events.{held} WHERE user_id = $1 FOR UPDATE", victim)  # noqa: S608
        # while it is held
        outcomes = await asyncio.gather(*(replica.submit(request) for request in requests))
        await admin.execute("ROLLBACK")
    refused = {number: outcome.refused.code for number, outcome in enumerate(outcomes) if outcome.refused is not None}
    assert refused == dict.fromkeys(range(0, 64, 8), "UNAVAILABLE")
    for number in refused:
        assert (await replica.submit(requests[number])).refused is None


async def test_a_table_that_is_held_refuses_what_waits_as_a_whole_and_for_a_while(place: Place) -> None:
    replica = await place.replica()
    requests = [(await place.run(replica)).request(event()) for _ in range(16)]
    async with place.admin() as admin:
        await admin.execute("BEGIN")
        await admin.execute("LOCK TABLE events.events_free IN ACCESS EXCLUSIVE MODE")
        outcomes = await asyncio.gather(*(replica.submit(request) for request in requests))
        await admin.execute("ROLLBACK")
    assert [outcome.refused.code for outcome in outcomes if outcome.refused is not None] == ["UNAVAILABLE"] * 16
    assert [(await replica.submit(request)).refused for request in requests] == [None] * 16
