"""Calls go round the replicas of a service, and on to the next when one is away; nothing is done twice that may be done once only."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest

from chassis import channel, replicas, spread, status
from netra import errors
from netra.dispatcher.v1 import dispatcher_pb2 as pb
from netra.dispatcher.v1 import dispatcher_pb2_grpc

_AGAIN, _ONCE = "GetRun", "CancelRun"


class Replica(dispatcher_pb2_grpc.DispatcherServiceServicer):
    """One of them: counts, and fails as it is told to."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.says: errors.NetraError | None = None
        self.breaks = False
        self._server = grpc.aio.server()
        dispatcher_pb2_grpc.add_DispatcherServiceServicer_to_server(self, self._server)
        self.port = self._server.add_insecure_port("127.0.0.1:0")

    async def start(self) -> None:
        """Listen."""
        await self._server.start()

    async def stop(self) -> None:
        """Gone."""
        await self._server.stop(None)

    async def _called(self, name: str, context: Any) -> None:
        self.calls[name] += 1
        if self.says is not None:
            await status.abort(context, self.says)
        if self.breaks:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "broken off")

    async def GetRun(self, request: pb.GetRunRequest, context: Any) -> pb.GetRunResponse:
        await self._called("GetRun", context)
        return pb.GetRunResponse(run=pb.Run(agent=str(self.port)))

    async def CancelRun(self, request: pb.CancelRunRequest, context: Any) -> pb.CancelRunResponse:
        await self._called("CancelRun", context)
        return pb.CancelRunResponse()


@dataclass(slots=True)
class Place:
    """Three replicas and a channel to them."""

    replicas: list[Replica]
    to: spread.Spread
    requests: dict[str, Any] = field(default_factory=lambda: {"GetRun": pb.GetRunRequest(), "CancelRun": pb.CancelRunRequest()})

    async def ask(self, name: str) -> Any:
        """A call of a method."""
        stub: Any = dispatcher_pb2_grpc.DispatcherServiceStub(self.to)
        with status.translated():
            return await getattr(stub, name)(self.requests[name], timeout=20.0)

    def calls(self, name: str) -> list[int]:
        """How many each had."""
        return [one.calls[name] for one in self.replicas]


@pytest.fixture
async def place() -> AsyncIterator[Place]:
    # the other methods are not called
    made = [Replica() for _ in range(3)]  # type: ignore[abstract]
    for one in made:
        await one.start()
    known = replicas.Replicas(",".join(f"127.0.0.1:{one.port}" for one in made))
    async with spread.Spread(known, lambda target: channel.connect(target, name="dispatcher"), "dispatcher") as to:
        yield Place(made, to)
    await asyncio.gather(*(one.stop() for one in made))


@pytest.mark.parametrize("name", [_AGAIN, _ONCE])
async def test_calls_go_round(place: Place, name: str) -> None:
    for _ in range(9):
        await place.ask(name)
    assert place.calls(name) == [3, 3, 3]


@pytest.mark.parametrize("name", [_AGAIN, _ONCE])
async def test_the_others_are_asked_while_one_is_away(place: Place, name: str) -> None:
    await place.ask(name)
    await place.replicas[1].stop()
    before = sum(place.calls(name))
    for _ in range(9):
        await place.ask(name)
    assert sum(place.calls(name)) == before + 9


@pytest.mark.parametrize("name", [_AGAIN, _ONCE])
async def test_one_that_nobody_listens_at_is_passed_over_from_the_first_call_on(place: Place, name: str) -> None:
    await place.replicas[0].stop()
    for _ in range(6):
        await place.ask(name)
    assert place.calls(name)[0] == 0
    assert sum(place.calls(name)) == 6


async def test_a_call_that_may_come_twice_goes_on_to_the_next(place: Place) -> None:
    place.replicas[0].breaks = place.replicas[1].breaks = True
    answers = {(await place.ask(_AGAIN)).run.agent for _ in range(6)}
    assert answers == {str(place.replicas[2].port)}


async def test_a_call_that_may_have_been_made_is_not_made_again(place: Place) -> None:
    for one in place.replicas:
        one.breaks = True
    with pytest.raises(errors.Unavailable):
        await place.ask(_ONCE)
    assert sum(place.calls(_ONCE)) == 1


async def test_what_a_replica_refuses_is_refused(place: Place) -> None:
    for one in place.replicas:
        one.says = errors.NotFound("There is no such run.", field="run_id")
    with pytest.raises(errors.NotFound):
        await place.ask(_AGAIN)
    assert sum(place.calls(_AGAIN)) == 1


async def test_one_that_says_that_something_is_away_is_asked_again_in_its_turn(place: Place) -> None:
    place.replicas[0].says = errors.Unavailable("The database is away.")
    for _ in range(3):
        await place.ask(_AGAIN)
    assert place.to.replicas.ranked("x") == replicas.Replicas(",".join(place.to.replicas.targets)).ranked("x")


async def test_where_none_is_left_the_caller_is_told(place: Place) -> None:
    await asyncio.gather(*(one.stop() for one in place.replicas))
    for name in (_AGAIN, _ONCE):
        with pytest.raises(errors.Unavailable):
            await place.ask(name)


async def test_one_that_came_back_is_asked_again(place: Place) -> None:
    gone = place.replicas[0]
    await gone.stop()
    for _ in range(3):
        await place.ask(_AGAIN)
    server = grpc.aio.server()
    dispatcher_pb2_grpc.add_DispatcherServiceServicer_to_server(gone, server)
    assert server.add_insecure_port(f"127.0.0.1:{gone.port}") == gone.port
    await server.start()
    before = gone.calls[_AGAIN]
    async with asyncio.timeout(30):
        while True:
            await place.ask(_AGAIN)
            if gone.calls[_AGAIN] > before:
                break
    await server.stop(None)
