"""Several appends in one message: each is taken and answered by itself, and the answers come together to a writer that takes that."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest

from netra import ids
from netra.context.v1 import context_pb2, context_pb2_grpc
from netra.events.v1 import events_pb2, events_pb2_grpc
from tests.fixtures.storage import Services
from tests.integration.events.conftest import event


class Writer:
    """A dispatcher, and runs that a user has asked it for."""

    def __init__(
        self, stub: events_pb2_grpc.EventsServiceAsyncStub, contexts: context_pb2_grpc.ContextServiceAsyncStub, metadata: Any
    ) -> None:
        self.stub, self._contexts, self.metadata = stub, contexts, metadata

    async def first(self, user: Any, append_id: int) -> events_pb2.AppendRequest:
        """The append that opens a new run."""
        run_id = ids.uuid7()
        wanted = context_pb2.OpenContextRequest(request_id=ids.uuid7(), run_id=run_id, access_token=user.token, agent_context=b"{}")
        opened = await self._contexts.OpenContext(wanted, metadata=self.metadata, wait_for_ready=True)
        request = events_pb2.AppendRequest(append_id=append_id, run_id=run_id, epoch=1, first_seq=1, events=[event()])
        request.open.context_token, request.open.trace_id = opened.context_token, "0" * 31 + "1"
        return request

    async def answers(self, *requests: events_pb2.AppendRequest) -> list[events_pb2.AppendResponse]:
        """What they are answered, message by message."""

        async def sent() -> AsyncIterator[events_pb2.AppendRequest]:
            for request in requests:
                yield request

        return [answer async for answer in self.stub.Append(sent(), metadata=self.metadata, wait_for_ready=True, timeout=15)]


@pytest.fixture
async def writer(services: Services) -> Writer:
    """One, of the services that it needs."""
    await services.auth()
    await services.context()
    await services.events()
    for trust in services.trusts:
        await trust.awaited()
    contexts: context_pb2_grpc.ContextServiceAsyncStub = context_pb2_grpc.ContextServiceStub(services.channel("context"))
    stub: events_pb2_grpc.EventsServiceAsyncStub = events_pb2_grpc.EventsServiceStub(services.channel("events"))
    return Writer(stub, contexts, await services.service_token("dispatcher"))


@pytest.mark.parametrize("takes_more", [True, False])
async def test_each_is_taken_and_answered_by_itself(writer: Writer, services: Services, takes_more: bool) -> None:
    users = [await services.user() for _ in range(3)]
    good = [await writer.first(user, number) for number, user in enumerate(users, 1)]
    forged = await writer.first(users[0], 4)
    forged.open.context_token = good[1].open.context_token
    unknown = events_pb2.AppendRequest(append_id=5, run_id=ids.uuid7(), epoch=1, first_seq=1, events=[event()])
    messages = await writer.answers(events_pb2.AppendRequest(more=[*good, forged, unknown], takes_more=takes_more))
    assert all(message.takes_more for message in messages)
    answers = {answer.append_id: answer for message in messages for answer in (message.more or [message])}
    assert [(answers[number].last_cursor, answers[number].error_code) for number in (1, 2, 3)] == [(1, "")] * 3
    # the token of another user's run opens nothing, in whosever company it comes
    assert [answers[number].error_code for number in (4, 5)] == ["PERMISSION_DENIED", "NOT_FOUND"]
    # those that are committed together are answered together, to a writer that said it takes that
    assert (max(len(message.more) for message in messages) >= 3) is takes_more
    for user in users:
        page = await writer.stub.ListEvents(events_pb2.ListEventsRequest(), metadata=user.bearer)
        assert [each.cursor for each in page.events] == [1]


@pytest.mark.parametrize("beside", [True, False])
async def test_nothing_stands_beside_them_and_none_holds_others(writer: Writer, beside: bool) -> None:
    inner = events_pb2.AppendRequest(append_id=1, run_id=ids.uuid7(), epoch=1, first_seq=1, events=[event()])
    request = events_pb2.AppendRequest(more=[inner if beside else events_pb2.AppendRequest(more=[inner])])
    if beside:
        request.run_id = ids.uuid7()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await writer.answers(request)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "come together" in (caught.value.details() or "")
