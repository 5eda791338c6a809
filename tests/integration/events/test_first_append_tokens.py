"""Who may open a run with its first append: the dispatcher, with the signed context of that run, or that of its session's calls."""

from __future__ import annotations

import json
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

    async def run(self, agent_context: bytes = b"{}") -> tuple[str, str]:
        """A run, and its context token."""
        run_id, dispatcher = ids.uuid7(), await self.services.service_token("dispatcher")
        wanted = context_pb2.OpenContextRequest(
            request_id=run_id, run_id=run_id, access_token=self.user.token, agent_context=agent_context
        )  # fmt: skip
        return run_id, (await self._contexts.OpenContext(wanted, metadata=dispatcher, wait_for_ready=True)).context_token

    async def append(
        self, run_id: str, token: str, trace_id: str = _TRACE, service: str = "dispatcher", parent_id: str = "",
        call: events_pb2.Call | None = None,
    ) -> events_pb2.AppendResponse:  # fmt: skip
        """The first append of a run, by this token."""
        opens = events_pb2.RunToOpen(context_token=token, trace_id=trace_id, parent_id=parent_id)

        async def sent() -> AsyncIterator[events_pb2.AppendRequest]:
            yield events_pb2.AppendRequest(append_id=1, run_id=run_id, epoch=1, first_seq=1, events=[event()], open=opens, call=call)

        caller = await self.services.service_token(service)
        async for answer in self._events.Append(sent(), metadata=caller, wait_for_ready=True, timeout=20):
            return answer
        raise AssertionError("no answer")

    async def beside(self, token: str, call: events_pb2.Call | None = None) -> events_pb2.AppendResponse:
        """An event of no run, by this token."""

        async def sent() -> AsyncIterator[events_pb2.AppendRequest]:
            yield events_pb2.AppendRequest(append_id=1, events=[event()], context_token=token, call=call)

        caller = await self.services.service_token("dispatcher")
        async for answer in self._events.Append(sent(), metadata=caller, wait_for_ready=True, timeout=20):
            return answer
        raise AssertionError("no answer")

    async def take(self, run_id: str, token: str, call: events_pb2.Call | None, epoch: int = 2) -> events_pb2.OpenRunResponse:
        """Own a run, by this token."""
        request = events_pb2.OpenRunRequest(run_id=run_id, epoch=epoch, context_token=token, call=call)
        return await self._events.OpenRun(request, metadata=await self.services.service_token("dispatcher"))

    async def steps(self, run_id: str, token: str, epoch: int) -> events_pb2.ListStepsResponse:
        """What a run's owners did, by this token."""
        request = events_pb2.ListStepsRequest(run_id=run_id, epoch=epoch, context_token=token)
        return await self._events.ListSteps(request, metadata=await self.services.service_token("dispatcher"))

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


_CALLS = b'{"kind":"calls"}'


def _call(request_id: str = "m7", correlation_id: str = "") -> events_pb2.Call:
    return events_pb2.Call(request_id=request_id, correlation_id=correlation_id or ids.CorrelationId.new())


async def test_each_of_a_sessions_calls_is_opened_by_the_token_of_all_of_them(opening: Opening) -> None:
    _, token = await opening.run(_CALLS)
    runs = [(ids.uuid7(), _call(f"m{number}")) for number in range(3)]
    for run_id, call in runs:
        assert (await opening.append(run_id, token, call=call)).error_code == ""
    assert (await opening.beside(token, told := _call("m9"))).error_code == ""
    frames = [json.loads(one.frame) for one in await opening.recorded()]
    named = [(frame["run_id"], frame["request_id"], frame["correlation_id"]) for frame in frames]
    assert named == [*((run_id, call.request_id, call.correlation_id) for run_id, call in runs), (None, "m9", told.correlation_id)]
    assert len({frame["thread_id"] for frame in frames}) == 1
    # and the next owner of one of them goes on by it
    assert (await opening.take(runs[0][0], token, runs[0][1])).next_seq == 2
    assert list((await opening.steps(runs[0][0], token, 2)).steps) == []


async def test_a_call_is_told_of_with_the_context_of_calls_and_with_no_other(opening: Opening) -> None:
    (run_id, token), (_, calls) = await opening.run(), await opening.run(_CALLS)
    wrong = _call("m1", "no correlation id"), _call("", "")
    refused = [
        await opening.append(run_id, token, call=_call()), await opening.append(ids.uuid7(), calls),
        *[await opening.append(ids.uuid7(), calls, call=call) for call in wrong], await opening.beside(token, _call()),
        await opening.beside(calls),
    ]  # fmt: skip
    assert {answer.error_code for answer in refused} == {"INVALID_PAYLOAD"}
    for asked in (opening.take(run_id, token, _call(), 1), opening.take(ids.uuid7(), calls, None, 1)):
        with pytest.raises(grpc.aio.AioRpcError) as unfit:
            await asked
        assert unfit.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert await opening.recorded() == []


async def test_the_context_of_calls_is_of_no_run_in_another_thread_and_of_nobody_else(opening: Opening) -> None:
    (run_id, token), (_, calls), (_, others) = await opening.run(), await opening.run(_CALLS), await opening.run(_CALLS)
    theirs = Opening(opening.services, await opening.services.user())
    foreign, foreign_token = await theirs.run()
    called = ids.uuid7()
    await opening.append(run_id, token)
    await opening.append(called, others, call=_call())
    await theirs.append(foreign, foreign_token)
    for other in (run_id, called, foreign):
        assert (await opening.append(other, calls, call=_call())).error_code == "NOT_FOUND"
        for asked in (opening.take(other, calls, _call()), opening.steps(other, calls, 1)):
            with pytest.raises(grpc.aio.AioRpcError) as unknown:
                await asked
            assert unknown.value.code() == grpc.StatusCode.NOT_FOUND
    # nothing was taken from its owner
    assert (await opening.take(run_id, token, None, epoch=1)).next_seq == 2
