"""Who may open a run with its first append: the dispatcher, with the signed context of that run."""

from __future__ import annotations

from collections.abc import AsyncIterator

import grpc
import pytest

from netra import ids
from netra.context.v1 import context_pb2, context_pb2_grpc
from netra.events.v1 import events_pb2, events_pb2_grpc
from tests.fixtures.storage import Services
from tests.fixtures.users import User
from tests.integration.events.conftest import event

_TRACE = "0123456789abcdef" * 2


class Opening:
    """Runs of a user that are not in the record yet, and the stream of appends."""

    def __init__(self, services: Services, user: User) -> None:
        self.services, self.user = services, user
        self._contexts: context_pb2_grpc.ContextServiceAsyncStub = context_pb2_grpc.ContextServiceStub(services.channel("context"))
        self._events: events_pb2_grpc.EventsServiceAsyncStub = events_pb2_grpc.EventsServiceStub(services.channel("events"))

    async def run(self) -> tuple[str, str]:
        """A run, and its context token."""
        run_id, dispatcher = ids.uuid7(), await self.services.service_token("dispatcher")
        wanted = context_pb2.OpenContextRequest(request_id=run_id, run_id=run_id, access_token=self.user.token, agent_context=b"{}")
        return run_id, (await self._contexts.OpenContext(wanted, metadata=dispatcher, wait_for_ready=True)).context_token

    async def append(
        self, run_id: str, token: str, trace_id: str = _TRACE, service: str = "dispatcher", parent_id: str = ""
    ) -> events_pb2.AppendResponse:
        """The first append of a run, by this token."""
        opens = events_pb2.RunToOpen(context_token=token, trace_id=trace_id, parent_id=parent_id)

        async def sent() -> AsyncIterator[events_pb2.AppendRequest]:
            yield events_pb2.AppendRequest(append_id=1, run_id=run_id, epoch=1, first_seq=1, events=[event()], open=opens)

        caller = await self.services.service_token(service)
        async for answer in self._events.Append(sent(), metadata=caller, wait_for_ready=True, timeout=20):
            return answer
        raise AssertionError("no answer")

    async def recorded(self) -> list[events_pb2.Event]:
        """All of the user's events."""
        page = await self._events.ListEvents(events_pb2.ListEventsRequest(), metadata=self.user.bearer)
        return list(page.events)


@pytest.fixture
async def opening(services: Services) -> Opening:
    """One user's."""
    await services.auth()
    await services.context()
    await services.events()
    return Opening(services, await services.user())


async def test_a_run_is_opened_by_its_own_token(opening: Opening) -> None:
    for number in (1, 2):
        run_id, token = await opening.run()
        answer = await opening.append(run_id, token)
        assert (answer.error_code, answer.last_cursor) == ("", number)
    one = (await opening.recorded())[-1]
    assert (one.run_id, one.user_id, one.cursor, one.seq) == (run_id, opening.user.user_id, 2, 1)
    assert f'"trace_id":"{_TRACE}"'.encode() in one.frame


async def test_a_run_is_not_opened_by_another_token(opening: Opening) -> None:
    # so that a run of the user's would be opened by the statement that writes
    await opening.append(*await opening.run())
    (run_id, token), (other, theirs) = await opening.run(), await opening.run()
    foreign = await Opening(opening.services, await opening.services.user()).run()
    header, claims, signature = token.split(".")
    flipped = f"{header}.{claims}.{('B' if signature[0] == 'A' else 'A') + signature[1:]}"
    for wrong, code in {
        theirs: "PERMISSION_DENIED", foreign[1]: "PERMISSION_DENIED", flipped: "UNAUTHENTICATED", "": "UNAUTHENTICATED",
        opening.user.token: "UNAUTHENTICATED",
    }.items():  # fmt: skip
        answer = await opening.append(run_id, wrong)
        assert (answer.error_code, answer.last_cursor) == (code, 0)
    assert (await opening.append(run_id, token, trace_id="no trace")).error_code == "INVALID_PAYLOAD"
    assert (await opening.append(run_id, token, parent_id="no span")).error_code == "INVALID_PAYLOAD"
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await opening.append(run_id, token, service="gateway")
    assert refused.value.code() == grpc.StatusCode.PERMISSION_DENIED
    assert len(await opening.recorded()) == 1
    assert (await opening.append(other, theirs)).error_code == ""
