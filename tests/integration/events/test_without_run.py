"""Events without a run: of the user of a signed context, once, in the same record."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import orjson

from netra import ids
from netra.context.v1 import context_pb2, context_pb2_grpc
from netra.events.v1 import events_pb2, events_pb2_grpc
from tests.fixtures.storage import Services
from tests.integration.events.conftest import Place, context_of, event, whole


def _noted(*events: events_pb2.NewEvent) -> events_pb2.AppendRequest:
    return events_pb2.AppendRequest(append_id=1, context_token="verified elsewhere", events=events)


async def test_they_share_the_users_cursors_with_runs(place: Place) -> None:
    replicas = [await place.replica() for _ in range(2)]
    user = ids.uuid7()
    context = context_of(user)
    # the first event of all of a user, from both replicas at once
    outcomes = await asyncio.gather(*(replicas[number % 2].submit(_noted(event("quality_alert")), context) for number in range(10)))
    assert sorted(outcome.last_cursor for outcome in outcomes) == list(range(1, 11))
    run = await place.run(replicas[0], user)
    assert await run.append(event()) == 11
    recorded = await whole(replicas[1], user)
    assert [(each.cursor, each.seq, each.run_id) for each in recorded] == [(n, 0, "") for n in range(1, 11)] + [(11, 1, run.run_id)]
    assert {orjson.loads(each.frame)["run_id"] for each in recorded[:10]} == {None}


async def test_the_same_again_is_acknowledged_again_by_any_replica_at_any_time(place: Place) -> None:
    replicas = [await place.replica() for _ in range(2)]
    user = ids.uuid7()
    context, request = context_of(user), _noted(event("quality_alert"), event("security_violation"))
    first = await asyncio.gather(*(replica.submit(request, context) for replica in replicas))
    assert [outcome.last_cursor for outcome in first] == [2, 2]
    partly = _noted(request.events[1], event("quality_alert"))
    assert (await replicas[0].submit(partly, context)).last_cursor == 3
    changed = _noted(events_pb2.NewEvent(event_id=request.events[0].event_id, type="quality_alert", data=b"{}"))
    refused = (await replicas[1].submit(changed, context)).refused
    assert refused is not None
    assert refused.code == "ALREADY_EXISTS"
    # the id of an event is one of its user
    assert (await replicas[1].submit(request, context_of(ids.uuid7()))).last_cursor == 2
    assert [each.cursor for each in await whole(replicas[0], user)] == [1, 2, 3]


async def test_whose_they_are_is_in_the_token_and_nowhere_else(services: Services) -> None:
    await services.auth()
    await services.context()
    await services.events()
    user = await services.user()
    dispatcher = await services.service_token("dispatcher")
    contexts: context_pb2_grpc.ContextServiceAsyncStub = context_pb2_grpc.ContextServiceStub(services.channel("context"))
    stub: events_pb2_grpc.EventsServiceAsyncStub = events_pb2_grpc.EventsServiceStub(services.channel("events"))
    wanted = context_pb2.OpenContextRequest(request_id="m1", run_id=ids.uuid7(), access_token=user.token, agent_context=b"{}")
    token = (await contexts.OpenContext(wanted, metadata=dispatcher, wait_for_ready=True)).context_token
    good, forged = _noted(event("quality_alert")), _noted(event("quality_alert"))
    good.context_token, forged.context_token, forged.append_id = token, token[:-4] + "AAAA", 2
    both = _noted(event("quality_alert"))
    both.context_token, both.run_id, both.append_id = token, ids.uuid7(), 3

    async def requests() -> AsyncIterator[events_pb2.AppendRequest]:
        for request in (good, forged, both):
            yield request

    answers = {answer.append_id: answer async for answer in stub.Append(requests(), metadata=dispatcher, wait_for_ready=True, timeout=15)}
    assert answers[1].last_cursor == 1
    assert {number: answers[number].error_code for number in (2, 3)} == {2: "UNAUTHENTICATED", 3: "INVALID_PAYLOAD"}
    page = await stub.ListEvents(events_pb2.ListEventsRequest(), metadata=user.bearer)
    assert [(each.cursor, each.run_id, each.type) for each in page.events] == [(1, "", "quality_alert")]
