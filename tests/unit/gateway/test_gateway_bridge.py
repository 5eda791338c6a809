"""Streams go no faster than they are read, end once whatever ends them, and subscriptions are checked before they count."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import grpc
import pytest

from chassis import channel, identity, replicas
from gateway import bridge, delivery, frames, rpc
from netra import errors, ids
from netra.events.v1 import events_pb2
from tests.fixtures import ready

_SUBSCRIBE = "netra.events.v1.EventsService/Subscribe"
_MESSAGES, _FRAME = 200, b"x" * 64 * 1024


class _Events:
    """A record that has `_MESSAGES` large events, and one that refuses."""

    def __init__(self) -> None:
        self.gone, self.written = asyncio.Event(), 0
        self.tokens: list[str] = []

    def handler(self) -> grpc.GenericRpcHandler:
        """The one RPC it has."""
        call = grpc.unary_stream_rpc_method_handler(
            self.subscribe, events_pb2.SubscribeRequest.FromString, events_pb2.SubscribeResponse.SerializeToString
        )
        return grpc.method_handlers_generic_handler("netra.events.v1.EventsService", {"Subscribe": call})

    async def subscribe(self, request: events_pb2.SubscribeRequest, context: Any) -> AsyncIterator[events_pb2.SubscribeResponse]:
        self.tokens += [value for key, value in context.invocation_metadata() if key == "authorization"]
        if request.after == 7:
            await context.abort(grpc.StatusCode.NOT_FOUND, "no such run")
        try:
            for cursor in range(1, _MESSAGES + 1):
                yield events_pb2.SubscribeResponse(events=[events_pb2.Event(cursor=cursor, frame=_FRAME)])
                self.written += 1
            if request.after:
                await asyncio.Event().wait()
        finally:
            self.gone.set()


class _Place:
    """One socket's bridge on a real channel."""

    def __init__(self, group: asyncio.TaskGroup, streams: bridge.Streams, events: _Events, refuse: bool = False) -> None:
        self.events, self.owed = events, delivery.Delivery(0, 0, 256, 1 << 20)
        entitled: Any = SimpleNamespace(require=self._require)
        self.bridge = bridge.Bridge(streams, entitled, lambda name, work: self._started(group, name, work))
        self.who = identity.Principal(ids.UserId.new(), ids.TenantId.new(), ids.SessionId.new(), ("user",), "free", time.time() + 600, "t")
        self.refuse, self.tasks = refuse, list[asyncio.Task[None]]()
        self.woken = asyncio.Event()
        self.owed.woken = self.woken.set

    def _require(self, what: str, permission: str, who: identity.Principal) -> None:
        assert (what, permission) == (_SUBSCRIBE, "events:read")
        if self.refuse:
            raise errors.PermissionDenied("no")

    def _started(self, group: asyncio.TaskGroup, name: str, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        self.tasks.append(group.create_task(work, name=name))
        return self.tasks[-1]

    def ask(self, kind: str, **payload: Any) -> dict[str, Any]:
        return self.bridge.answer(self.who, frames.Frame(kind, "f", "", payload), self.owed)

    def opened(self, after: int = 0) -> str:
        return str(self.ask("STREAM", method=_SUBSCRIBE, request={"after": str(after)})["stream_id"])

    async def next(self) -> dict[str, Any]:
        while (event := self.owed.take()) is None:
            self.woken.clear()
            await self.woken.wait()
        return dict(json.loads(ready.payloads(event.wire)[0]))


@contextlib.asynccontextmanager
async def _place(**more: Any) -> AsyncIterator[_Place]:
    server, events = grpc.aio.server(), _Events()
    server.add_generic_rpc_handlers((events.handler(),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    to = channel.connect(f"127.0.0.1:{port}")
    streams = bridge.Streams(rpc.streamed({}, replicas.Each(replicas.Replicas("a:1"), lambda target: to)))
    try:
        async with asyncio.timeout(20), asyncio.TaskGroup() as group:
            place = _Place(group, streams, events, **more)
            yield place
            for task in place.tasks:
                task.cancel()
    finally:
        await to.close()
        await server.stop(None)


async def test_a_stream_waits_for_its_reader_and_is_complete() -> None:
    async with _place() as place:
        stream_id = place.opened()
        assert await _stalled(place.events) < _MESSAGES // 4
        found = [await place.next() for _ in range(_MESSAGES + 1)]
        assert {frame["stream_id"] for frame in found} == {stream_id}
        assert [frame["seq"] for frame in found[:-1]] == list(range(1, _MESSAGES + 1))
        assert [frame["data"]["events"][0]["cursor"] for frame in found[:-1]] == [str(seq) for seq in range(1, _MESSAGES + 1)]
        assert found[-1] == {"type": "stream_end", "stream_id": stream_id, "code": "OK", "message": ""}
        assert place.events.tokens == ["Bearer t"]
        with pytest.raises(errors.NotFound):
            place.ask("STREAM_CANCEL", stream_id=stream_id)


async def _stalled(events: _Events) -> int:
    """How many messages were written when no more are."""
    before = -1
    while not events.written or events.written > before:
        before = events.written
        await asyncio.sleep(0.3)
    return before


async def _ends(place: _Place, end: Callable[[str], object]) -> tuple[int, dict[str, Any]]:
    """How many frames came after the first, and the last one, of a stream that is ended after its first frame."""
    stream_id, frames_ = place.opened(after=1), list[dict[str, Any]]()
    await place.next()
    end(stream_id)
    while not frames_ or frames_[-1]["type"] != "stream_end":
        frames_.append(await place.next())
    await place.events.gone.wait()
    assert place.owed.take() is None
    return len(frames_), frames_[-1]


async def test_a_stream_of_the_record_comes_from_the_replica_of_its_user() -> None:
    found = replicas.Replicas("a:1,b:1,c:1")
    asked: list[str] = []

    class _To:
        def __init__(self, target: str) -> None:
            self.target = target

        def unary_stream(self, *_: object) -> Any:
            return lambda wanted, metadata: asked.append(self.target)

    each: Any = replicas.Each(found, _To)
    methods = rpc.streamed({}, each)
    for _ in range(20):
        who = identity.Principal(ids.UserId.new(), ids.TenantId.new(), ids.SessionId.new(), ("user",), "free", time.time() + 600, "t")
        methods[_SUBSCRIBE].call(who, events_pb2.SubscribeRequest())
        assert asked.pop() == found.first(who.user_id)


async def test_a_stream_that_is_cancelled_ends_the_call() -> None:
    async with _place() as place:
        count, end = await _ends(place, lambda stream_id: place.ask("STREAM_CANCEL", stream_id=stream_id))
        assert (end["code"], count <= 5) == ("CANCELLED", True)


async def test_streams_end_when_the_gateway_stops_and_none_is_opened_any_more() -> None:
    async with _place() as place:
        _, end = await _ends(place, lambda _: place.bridge.close(errors.Unavailable("stopping", retry_after_ms=100)))
        assert (end["code"], end["retryable"], end["retry_after_ms"]) == ("UNAVAILABLE", True, 100)
        with pytest.raises(errors.Unavailable):
            place.opened()


async def test_a_stream_ends_with_the_token_that_opened_it() -> None:
    async with _place() as place:
        place.who = replace(place.who, expires_at=time.time() + 0.3)
        place.opened(after=1)
        while (frame := await place.next())["type"] != "stream_end":
            pass
        assert frame["code"] == "UNAUTHENTICATED"


async def test_what_the_service_refuses_is_the_end_of_the_stream() -> None:
    async with _place() as place:
        place.opened(after=7)
        assert (await place.next())["code"] == "NOT_FOUND"


async def test_a_socket_has_a_few_streams() -> None:
    async with _place() as place:
        first, *_ = [place.opened() for _ in range(bridge.MAX_STREAMS)]
        with pytest.raises(errors.QuotaExceeded):
            place.opened()
        place.ask("STREAM_CANCEL", stream_id=first)
        place.opened()


async def test_nobody_reads_what_their_permissions_do_not_allow() -> None:
    async with _place(refuse=True) as place:
        with pytest.raises(errors.PermissionDenied):
            place.opened()
        assert place.tasks == []


@pytest.mark.parametrize(
    ("payload", "error"),
    [
        ({}, errors.InvalidPayload),
        ({"method": 7}, errors.InvalidPayload),
        ({"method": "netra.events.v1.EventsService/Tail"}, errors.NotFound),
        ({"method": "netra.auth.v1.AuthService/WatchTrust"}, errors.NotFound),
        ({"method": "/" + _SUBSCRIBE}, errors.NotFound),
        ({"method": _SUBSCRIBE, "request": []}, errors.InvalidPayload),
        ({"method": _SUBSCRIBE, "request": {"nobody": 1}}, errors.InvalidPayload),
        ({"method": _SUBSCRIBE, "request": {"runId": "a", "run_id": "a"}}, errors.DuplicateKey),
    ],
)
async def test_a_stream_that_cannot_be_opened_is_refused(payload: dict[str, Any], error: type[errors.NetraError]) -> None:
    async with _place() as place:
        with pytest.raises(error):
            place.ask("STREAM", **payload)
        assert place.tasks == []


_RUN = ids.uuid7()


@pytest.mark.parametrize(
    ("payload", "field"),
    [
        ({"run_id": "x"}, "payload.run_id"),
        ({"thread_id": 7}, "payload.thread_id"),
        ({"types": "agent_started"}, "payload.types"),
        ({"types": [7]}, "payload.types"),
        ({"types": ["Agent Started"]}, "payload.types"),
        ({"types": ["x"] * 33}, "payload.types"),
    ],
)
async def test_a_wrong_subscription_is_refused_and_changes_nothing(payload: dict[str, Any], field: str) -> None:
    async with _place() as place:
        with pytest.raises(errors.InvalidPayload) as caught:
            place.ask("SUBSCRIBE", **payload)
        assert (caught.value.details["field"], len(place.owed.filter)) == (field, 0)


async def test_subscriptions_are_a_union_and_the_last_one_restores_everything() -> None:
    async with _place() as place:
        one = place.ask("SUBSCRIBE", run_id=_RUN)["subscription_id"]
        two = place.ask("SUBSCRIBE", types=["agent_completed"])["subscription_id"]
        wants = place.owed.filter.wants
        assert (wants(_RUN, "t", "x"), wants("other", "t", "agent_completed"), wants("other", "t", "x")) == (True, True, False)
        assert place.ask("UNSUBSCRIBE", subscription_id=one) == {"subscription_id": one}
        assert not place.owed.filter.wants(_RUN, "t", "x")
        with pytest.raises(errors.NotFound):
            place.ask("UNSUBSCRIBE", subscription_id=one)
        place.ask("UNSUBSCRIBE", subscription_id=two)
        assert place.owed.filter.wants("other", "t", "x")
        with pytest.raises(errors.InvalidPayload):
            place.ask("UNSUBSCRIBE")
