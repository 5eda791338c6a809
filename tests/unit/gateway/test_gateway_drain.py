"""A gateway that stops answers what it was asked, sends what is queued, and says where to go on."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from google.protobuf.message import Message

from chassis import identity
from gateway import bridge, close_codes, delivery, envelope, frames, pump, session, sockets, subscriptions
from gateway.settings import GatewaySettings
from netra import ids
from tests.fixtures import ready


class _Tail:
    async def follow(self, principal: identity.Principal) -> pump.Feed:
        return pump.Feed(principal.user_id, epoch="e1", joined=True)

    def attach(self, feed: pump.Feed, sink: session.Session) -> None:
        """Nothing is followed here."""

    def detach(self, sink: session.Session) -> None:
        """Nothing is followed here."""


class _Calls:
    """The services: an answer comes when it is let go."""

    def __init__(self) -> None:
        self.begun, self.go = asyncio.Event(), asyncio.Event()

    async def call(self, who: identity.Principal, frame: frames.Frame, *_: object) -> dict[str, Any]:
        self.begun.set()
        await self.go.wait()
        return {"run_id": frame.id}


class _Line:
    def __init__(self) -> None:
        self.blocked = False
        self.taken: list[dict[str, Any]] = []
        self.closed: list[close_codes.Close] = []
        self.messages: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.scope = {"state": {"wire": self}}

    def moved(self, told: Callable[[], None]) -> None:
        """It always takes everything."""

    def put(self, written: bytes) -> bool:
        if not self.closed:
            self.taken += map(json.loads, ready.payloads(written))
        return not self.closed

    def unwritten(self) -> int:
        return 0

    def end(self, close: close_codes.Close) -> None:
        self.closed.append(close)
        self.messages.put_nowait({"type": "websocket.disconnect"})

    async def receive(self) -> dict[str, Any]:
        return await self.messages.get()

    def hear(self, **frame: Any) -> None:
        self.messages.put_nowait({"type": "websocket.receive", "text": json.dumps(frame)})


def _entitled() -> Any:
    return SimpleNamespace(
        frames_per_minute=lambda who: 1000, take_frame=lambda who: 0, max_frame_bytes=lambda who, most: most, sockets=lambda who: 3,
        require=lambda what, permission, who: None,
    )  # fmt: skip


async def _opened(calls: _Calls, **settings: Any) -> tuple[session.Session, sockets.UnifiedWebSocketManager]:
    entitled = _entitled()
    manager = sockets.UnifiedWebSocketManager(entitled.sockets)
    without = [field.name for field in dataclasses.fields(session.Edge) if field.default_factory is dataclasses.MISSING]
    told: dict[str, Any] = dict.fromkeys(without)
    told |= {"settings": GatewaySettings(**settings), "tail": _Tail(), "calls": calls, "open": manager, "entitled": entitled}
    edge = session.Edge(**told)
    who = identity.Principal(ids.UserId.new(), ids.TenantId.new(), ids.SessionId.new(), ("user",), "free", time.time() + 600, "t")
    one = session.Session(edge, who, "")
    await manager.admit(one)
    await one.join(None)
    return one, manager


def _event(cursor: int) -> delivery.Event:
    return delivery.Event(cursor, cursor, "r", "t", "x", envelope.text(b'{"type":"x","cursor":%d}' % cursor))


async def test_what_was_asked_is_answered_before_the_last_word() -> None:
    calls, line = _Calls(), _Line()
    one, manager = await _opened(calls, drain_s=60)
    async with asyncio.timeout(5), asyncio.TaskGroup() as group:
        group.create_task(one.run(line))  # type: ignore[arg-type]
        line.hear(type="START_AGENT", id="m1", payload={"user_request": "x"})
        line.hear(type="START_AGENT", id="m2", payload={"user_request": "x"})
        await calls.begun.wait()
        one.delivery.offer(_event(1))
        draining = group.create_task(manager.drain(60))
        await asyncio.sleep(0)
        one.delivery.offer(_event(2))
        assert line.closed == []
        calls.go.set()
        await draining
    assert line.closed == [close_codes.DRAINING]
    told = [(frame["type"], frame.get("id") or frame.get("cursor")) for frame in line.taken]
    # what came after the word to stop is not begun; the client sends it again elsewhere, under the same id
    assert sorted(told[1:-1]) == [("ack", "m1"), ("error", "m2"), ("x", 1)]
    assert told[-1] == ("draining", 1)


class _Endless:
    """A stream of which nothing comes."""

    def __init__(self) -> None:
        self.begun, self.cancelled = asyncio.Event(), False

    def __aiter__(self) -> _Endless:
        return self

    async def __anext__(self) -> Any:
        self.begun.set()
        await asyncio.Event().wait()

    def cancel(self) -> None:
        self.cancelled = True


@pytest.mark.parametrize("drained", [True, False])
async def test_a_stream_ends_with_its_socket(drained: bool) -> None:
    line, endless = _Line(), _Endless()
    one, manager = await _opened(_Calls(), drain_s=60)
    method = bridge.Method("p", lambda fields: Message(), lambda who, request: endless, lambda message: {})
    one._bridge._streams = bridge.Streams({"s/S": method})
    async with asyncio.timeout(5), asyncio.TaskGroup() as group:
        group.create_task(one.run(line))  # type: ignore[arg-type]
        line.hear(type="STREAM", id="m1", payload={"method": "s/S"})
        await endless.begun.wait()
        if drained:
            await manager.drain(60)
        else:
            line.messages.put_nowait({"type": "websocket.disconnect"})
    assert endless.cancelled
    told = [(frame["type"], frame.get("id") or frame.get("code")) for frame in line.taken[1:]]
    assert told == [("ack", "m1"), *([("stream_end", "UNAVAILABLE"), ("draining", None)] if drained else [])]


async def test_a_call_that_takes_too_long_is_not_waited_for() -> None:
    calls, line = _Calls(), _Line()
    one, manager = await _opened(calls, drain_s=0.1)
    async with asyncio.timeout(5), asyncio.TaskGroup() as group:
        group.create_task(one.run(line))  # type: ignore[arg-type]
        line.hear(type="START_AGENT", id="m1", payload={"user_request": "x"})
        await calls.begun.wait()
        await manager.drain(60)
    assert (line.closed, line.taken[-1]["type"]) == ([close_codes.DRAINING], "draining")


async def test_a_fresh_token_does_not_put_the_end_off() -> None:
    calls, line = _Calls(), _Line()
    one, manager = await _opened(calls, drain_s=0.1)

    async def known(*_: object) -> identity.Principal:
        return one.principal

    edge: Any = one._edge
    one._edge = dataclasses.replace(edge, callers=SimpleNamespace(known=known))
    edge.tail.renewed = lambda user_id: None
    async with asyncio.timeout(5), asyncio.TaskGroup() as group:
        group.create_task(one.run(line))  # type: ignore[arg-type]
        line.hear(type="START_AGENT", id="m1", payload={"user_request": "x"})
        await calls.begun.wait()
        draining = group.create_task(manager.drain(60))
        await asyncio.sleep(0)
        line.hear(type="AUTH", id="a1", payload={"access_token": "t2"})
        await draining
    assert (line.closed, line.taken[-1]["type"]) == ([close_codes.DRAINING], "draining")


async def test_a_stream_whose_socket_is_gone_before_it_begins_calls_nobody_for_long() -> None:
    line, endless = _Line(), _Endless()
    one, _ = await _opened(_Calls(), drain_s=60)
    method = bridge.Method("p", lambda fields: Message(), lambda who, request: endless, lambda message: {})
    one._bridge._streams = bridge.Streams({"s/S": method})
    line.hear(type="STREAM", id="m1", payload={"method": "s/S"})
    line.messages.put_nowait({"type": "websocket.disconnect"})
    async with asyncio.timeout(5):
        await one.run(line)  # type: ignore[arg-type]
    assert endless.cancelled
    assert not endless.begun.is_set()


async def test_a_socket_that_is_just_being_opened_drains_too() -> None:
    line = _Line()
    one, manager = await _opened(_Calls(), drain_s=60)
    async with asyncio.timeout(5), asyncio.TaskGroup() as group:
        draining = group.create_task(manager.drain(60))
        await asyncio.sleep(0)
        await one.run(line)  # type: ignore[arg-type]
        await draining
    assert [frame["type"] for frame in line.taken] == ["connected", "draining"]


@pytest.mark.parametrize("skipped", [0, 3])
async def test_the_last_word_says_how_far_the_client_is(skipped: int) -> None:
    line = _Line()
    one, manager = await _opened(_Calls(), drain_s=60)
    wanted = frozenset({"x"})
    async with asyncio.timeout(5), asyncio.TaskGroup() as group:
        group.create_task(one.run(line))  # type: ignore[arg-type]
        await asyncio.sleep(0)
        one.delivery.filter.add(subscriptions.Subscription("s", types=wanted))
        one.delivery.offer(_event(1))
        for cursor in range(2, 2 + skipped):
            one.delivery.offer(_event(cursor)._replace(type="y"))
        await manager.drain(60)
    assert line.taken[-1] == {"type": "draining", "cursor": 1 + skipped}
    assert [frame["cursor"] for frame in line.taken[1:]] == ([1, 4, 4] if skipped else [1, 1])
