"""A user's whole record, read out and erased: by its user, or by an administrator of the tenant; nobody else."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from datetime import timedelta

import jwt
import pytest

from netra import errors, ids
from netra.auth.v1 import auth_pb2
from netra.events.v1 import events_pb2, events_pb2_grpc
from services.events import exports, heads, log, store_retention
from tests.fixtures.accounts import refused
from tests.fixtures.policies import Administrator
from tests.fixtures.storage import Services
from tests.fixtures.users import User
from tests.integration.events.conftest import Place, Replica, Run, context_of, event, now, whole


async def test_an_erased_record_is_gone_and_goes_on_with_the_next_cursor(place: Place) -> None:
    replica = await place.replica()
    run, other = await place.run(replica), await place.run(replica)
    for _ in range(30):
        await run.append(event(), event(), steps={ids.uuid7(): b"1"})
    await run.append(event(), end=True)
    await other.append(event())
    await place.prepared(replica, "free", now().date(), 5)
    await place.spread(run.user_id, 4)
    erased = await replica.erasures.erase(run.user_id, "e1", run.user_id)
    assert (erased.events, erased.runs, erased.upto, erased.done) == (61, 1, 61, True)
    assert await replica.erasures.erase(run.user_id, "e1", run.user_id) == erased
    async with place.admin() as admin:
        left = {
            table: await admin.value(f"SELECT count(*) FROM events.{table} WHERE user_id = $1", run.user_id)  # noqa: S608
            for table in ("events", "steps", "heads", "days")
        }
    # of days only today is left: what comes now is found by it
    assert left == {"events": 0, "steps": 0, "heads": 1, "days": 1}
    with pytest.raises(errors.FailedPrecondition):
        await run.append(event())
    again = await place.run(replica, run.user_id)
    assert await again.append(event()) == 62
    assert [each.cursor for each in await whole(replica, run.user_id)] == [62]
    assert [each.cursor for each in await whole(replica, other.user_id)] == [1]


async def test_a_run_that_has_not_ended_is_named_and_nothing_is_erased(place: Place) -> None:
    replica = await place.replica()
    run = await place.run(replica)
    await run.append(event())
    with pytest.raises(errors.FailedPrecondition, match=run.run_id):
        await replica.erasures.erase(run.user_id, "e1", run.user_id)
    await run.append(event(), end=True)
    assert (await replica.erasures.erase(run.user_id, "e1", run.user_id)).events == 2


async def test_a_run_whose_record_was_erased_has_ended_for_whoever_takes_it_over(place: Place) -> None:
    replica = await place.replica()
    run = await place.run(replica)
    await run.append(event(), steps={"1:tool": b"1"})
    await run.append(event("agent_completed"), end=True)
    await replica.erasures.erase(run.user_id, "e1", run.user_id)
    # the dispatcher had not noted the end yet
    opened = await replica.record.open(heads.new(run.context, ids.RunId(run.run_id), ""), 2)
    assert (opened.ended, opened.terminal_type) == (True, "agent_completed")
    with pytest.raises(errors.NotFound):
        await replica.record.end_of(run.user_id, run.run_id)
    query = "SELECT thread_id, request_id || correlation_id || trace_id AS told, next_seq, last_digest FROM events.heads WHERE run_id = $1"
    async with place.admin() as admin:
        row = await admin.row(query, run.run_id)
        assert row is not None
        assert (str(row["thread_id"]), *row[1:]) == ("00000000-0000-0000-0000-000000000000", "", 1, None)
        await replica.sweep({"free": 7}).once(now() + timedelta(days=9))
        assert await admin.row(query, run.run_id) is None


async def test_a_run_that_begins_beside_an_erasure_is_not_touched(place: Place) -> None:
    replica = await place.replica()
    old = await place.run(replica)
    await old.append(event(), steps={"k": b"1"}, end=True)
    context = context_of(old.user_id)
    async with place.admin() as admin:
        # the erasure waits in the middle
        await admin.execute("BEGIN")
        await admin.fetch("SELECT key FROM events.steps WHERE run_id = $1 FOR UPDATE", old.run_id)
        async with asyncio.TaskGroup() as group:
            erasing = group.create_task(replica.erasures.erase(old.user_id, "e1", old.user_id))
            await place.somebody_waits()
            await replica.record.open(heads.new(context, ids.RunId(context.run_id), ""), 1)
            await admin.execute("ROLLBACK")
    assert erasing.result().runs == 1
    assert await Run(replica, context).append(event()) == 2


async def test_an_erasure_is_done_when_nothing_is_left_whoever_else_works_on_it(place: Place) -> None:
    replica = await place.replica()
    run = await place.run(replica)
    for _ in range(5):
        await run.append(*[event() for _ in range(900)])
    await run.append(event(), end=True)
    kept = store_retention.Erasures(replica.own)
    begun = await kept.begin_erasure(run.user_id, "e1", run.user_id)
    async with place.admin() as admin:
        # another worker, that dies after this
        await admin.execute("BEGIN")
        await admin.execute("DELETE FROM events.events WHERE user_id = $1 AND cursor <= 2000", run.user_id)
        async with asyncio.TaskGroup() as group:
            finishing = group.create_task(replica.erasures.finish(begun))
            await place.somebody_waits()
            await admin.execute("COMMIT")
        assert finishing.result().done
        assert await admin.value("SELECT count(*) FROM events.events WHERE user_id = $1", run.user_id) == 0


async def test_two_who_carry_an_erasure_on_take_turns(place: Place) -> None:
    replicas = [await place.replica() for _ in range(2)]
    run = await place.run(replicas[0])
    for _ in range(5):
        await run.append(*[event() for _ in range(900)])
    await run.append(event(), end=True)
    begun = await store_retention.Erasures(replicas[0].own).begin_erasure(run.user_id, "e1", run.user_id)
    async with place.admin() as admin:
        await admin.execute("BEGIN")
        await admin.fetch("SELECT request_id FROM events.erasures WHERE user_id = $1 FOR UPDATE", run.user_id)
        async with asyncio.TaskGroup() as group:
            group.create_task(replicas[0].erasures.finish(begun))
            await place.somebody_waits()
            # it has touched none of them
            free = "SELECT cursor FROM events.events WHERE user_id = $1 FOR UPDATE SKIP LOCKED"
            assert len(await admin.fetch(free, run.user_id)) == 4501
            await admin.execute("ROLLBACK")
    assert sorted({done.events for done in await asyncio.gather(*(each.erasures.finish(begun) for each in replicas))}) == [4501]


async def test_a_run_that_nobody_ended_does_not_keep_a_record_for_ever(place: Place) -> None:
    replica = await place.replica()
    user_id = ids.uuid7()
    silent, late = [await place.run(replica, user_id) for _ in range(2)]
    for run in (silent, late):
        await run.append(event(), steps={"k": b"1"})
    async with place.admin() as admin:
        await admin.execute("UPDATE events.heads SET last_at = last_at - interval '25 hours'")
        await admin.execute("UPDATE events.heads SET deadline = now() - interval '1 hour' WHERE run_id = $1", late.run_id)
        with pytest.raises(errors.FailedPrecondition) as refused:
            await replica.erasures.erase(user_id, "e1", user_id)
        assert (silent.run_id in refused.value.message, late.run_id in refused.value.message) == (False, True)
        await replica.sweep({}).once(now())
        assert [str(row["run_id"]) for row in await admin.fetch("SELECT run_id FROM events.steps")] == [late.run_id]
        await late.append(event(), end=True)
        assert (await replica.erasures.erase(user_id, "e1", user_id)).runs == 2
    opened = await replica.record.open(heads.new(silent.context, ids.RunId(silent.run_id), ""), 2)
    assert (opened.ended, opened.terminal_type) == (True, "agent_failed")


async def test_an_erasure_that_a_crash_interrupted_is_carried_on(place: Place) -> None:
    replica = await place.replica()
    run = await place.run(replica)
    for _ in range(5):
        await run.append(event())
    await run.append(event(), end=True)
    begun = await store_retention.Erasures(replica.own).begin_erasure(run.user_id, "e1", run.user_id)
    assert not begun.done
    # nothing of it is shown any more, though it is there
    assert await whole(replica, run.user_id) == []
    async with place.admin() as admin:
        assert await admin.value("SELECT count(*) FROM events.events WHERE user_id = $1", run.user_id) == 6
        await admin.execute("UPDATE events.erasures SET asked_at = asked_at - interval '10 minutes'")
        await replica.sweep({"free": 7}).once(now())
        assert await admin.value("SELECT count(*) FROM events.events WHERE user_id = $1", run.user_id) == 0
    done = await replica.erasures.erase(run.user_id, "e1", run.user_id)
    assert (done.events, done.runs, done.done) == (6, 1, True)


async def test_an_erasure_beside_events_without_a_run_leaves_what_came_after_it(place: Place) -> None:
    replicas = [await place.replica() for _ in range(2)]
    old = await place.run(replicas[0])
    await old.append(*[event() for _ in range(50)], end=True)
    context = context_of(old.user_id)

    async def write() -> list[int]:
        requests = [events_pb2.AppendRequest(context_token="of the user", events=[event()]) for _ in range(40)]
        return [(await replicas[1].submit(request, context)).last_cursor for request in requests]

    erased, written = await asyncio.gather(replicas[0].erasures.erase(old.user_id, "e1", old.user_id), write())
    assert written == list(range(51, 91))
    assert [each.cursor for each in await whole(replicas[0], old.user_id)] == [cursor for cursor in written if cursor > erased.upto]
    assert erased.events == erased.upto >= 50


async def test_an_export_ends_where_the_record_ended_when_it_began(place: Place) -> None:
    replica = await place.replica()
    run = await place.run(replica)
    for _ in range(60):
        await run.append(*[event() for _ in range(20)])
    before = await whole(replica, run.user_id)
    seen: list[log.Recorded] = []
    async for page in exports.Exports(replica.record, 1).pages(run.user_id):
        seen += page.events
        assert (page.position.last, page.position.oldest) == (1200, 1)
        await run.append(event())
    assert [each.frame for each in seen] == [each.frame for each in before]


async def test_an_export_says_so_when_the_rest_is_taken_away(place: Place) -> None:
    replica = await place.replica()
    run = await place.run(replica)
    for _ in range(60):
        await run.append(*[event() for _ in range(20)])
    await run.append(event(), end=True)
    pages = exports.Exports(replica.record, 1).pages(run.user_id)
    await anext(pages)
    await replica.erasures.erase(run.user_id, "e1", run.user_id)
    with pytest.raises(errors.FailedPrecondition, match="Begin again"):
        await anext(pages)


@dataclass
class _Served:
    """Auth and events over gRPC, and a writer beside them."""

    services: Services
    replica: Replica
    stub: events_pb2_grpc.EventsServiceAsyncStub
    place: Place

    async def recorded(self, user: User, events: int = 3) -> None:
        """Give a user a record."""
        tenant = jwt.decode(user.token, options={"verify_signature": False})["tid"]
        run = await self.place.run(self.replica, user.user_id, tenant_id=tenant)
        for number in range(events):
            await run.append(event(), end=number == events - 1)

    async def export(self, caller: User, user_id: str = "") -> list[int]:
        """Cursors of an export."""
        stream = self.stub.ExportEvents(events_pb2.ExportEventsRequest(user_id=user_id), metadata=caller.bearer, timeout=10)
        return [each.cursor async for page in stream for each in page.events]

    async def erase(self, caller: User, user_id: str = "", request_id: str = "e1") -> events_pb2.EraseEventsResponse:
        """An erasure."""
        request = events_pb2.EraseEventsRequest(request_id=request_id, user_id=user_id)
        return await self.stub.EraseEvents(request, metadata=caller.bearer, timeout=10)


@pytest.fixture
async def served(services: Services, place: Place) -> _Served:
    """The services of this test."""
    await services.auth()
    await services.events()
    stub: events_pb2_grpc.EventsServiceAsyncStub = events_pb2_grpc.EventsServiceStub(services.channel("events"))
    replica = await place.replica()
    await stub.ListEvents(events_pb2.ListEventsRequest(), metadata=(await services.user()).bearer, wait_for_ready=True)
    return _Served(services, replica, stub, place)


async def test_users_export_and_erase_their_own_record(served: _Served) -> None:
    user, other, reader = await served.services.user(), await served.services.user(), await served.services.user("readonly")
    for each in (user, other, reader):
        await served.recorded(each)
    assert await served.export(user) == await served.export(user, user.user_id) == [1, 2, 3]
    answer = await served.erase(user)
    assert (answer.events, answer.runs, answer.next_cursor) == (3, 1, 4)
    assert await served.export(user) == []
    assert await served.export(other) == [1, 2, 3]
    assert (await refused(served.erase(reader))).code == "PERMISSION_DENIED"
    assert await served.export(reader) == [1, 2, 3]
    for request_id in ("", "x" * 65):
        assert (await refused(served.erase(user, request_id=request_id))).code == "INVALID_PAYLOAD"


async def test_an_administrator_reaches_users_of_the_tenant_on_record_and_nobody_else(served: _Served) -> None:
    user, other, admin = await served.services.user(), await served.services.user(), await served.services.user("admin")
    await served.recorded(user)
    assert (await refused(served.erase(other, user.user_id))).code == "PERMISSION_DENIED"
    assert (await refused(served.export(other, user.user_id))).details["permission"] == "users:read"
    assert await served.export(admin, user.user_id) == [1, 2, 3]
    assert (await served.erase(admin, user.user_id)).events == 3
    # of another tenant, and nobody at all: both the same
    stranger = await served.place.run(served.replica)
    await stranger.append(event(), end=True)
    for user_id in (stranger.user_id, ids.uuid7()):
        assert (await refused(served.erase(admin, user_id))).code == "NOT_FOUND"
    assert len(await whole(served.replica, stranger.user_id)) == 1
    operator = await Administrator(served.services).signed_in()
    about = auth_pb2.QueryAuditRequest(user_id=user.user_id)
    told = (await operator.stub.QueryAudit(about, metadata=operator.bearer)).entries
    assert [(entry.action, entry.outcome, entry.actor) for entry in told[:2]] == [
        ("erase_events", "asked", f"user:{admin.user_id}"),
        ("export_events", "ok", f"user:{admin.user_id}"),
    ]
