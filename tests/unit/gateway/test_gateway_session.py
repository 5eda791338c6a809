"""A socket ends whatever its client does, and every frame of it is answered under its id."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from typing import Any

import pytest

from chassis import audit, identity, limits, trust
from gateway import close_codes, delivery, entitlements, pump, session, sockets
from gateway.settings import GatewaySettings
from netra import errors, ids
from netra.auth.v1 import auth_pb2
from tests.fixtures import ready

_BURST = 100


class _Tail:
    async def follow(self, principal: identity.Principal) -> pump.Feed:
        return pump.Feed(principal.user_id, epoch="e1", joined=True)

    def give_up(self, feed: pump.Feed, principal: identity.Principal) -> None:
        """Nothing is followed here."""

    def attach(self, feed: pump.Feed, sink: session.Session) -> None:
        """Nothing is followed here."""

    def detach(self, sink: session.Session) -> None:
        """Nothing is followed here."""


class _Line:
    """A connection whose peer takes `room` frames."""

    def __init__(self, room: int = 1_000_000) -> None:
        self.room, self.gone, self.blocked = room, False, False
        self.taken: list[dict[str, Any]] = []
        self.refused = asyncio.Event()
        self.closed: list[close_codes.Close] = []
        self.messages: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.scope = {"state": {"wire": self}}

    def moved(self, told: Callable[[], None]) -> None:
        """There is never more room than there was."""

    def put(self, frames: bytes) -> bool:
        if not self.gone:
            for frame in ready.payloads(frames):
                self.taken.append(json.loads(frame))
                if self.taken[-1]["type"] == "error":
                    self.refused.set()
            self.blocked = len(self.taken) >= self.room
        return not self.gone

    def unwritten(self) -> int:
        return 1

    def end(self, close: close_codes.Close) -> None:
        self.closed.append(close)
        self.messages.put_nowait({"type": "websocket.disconnect"})

    async def receive(self) -> dict[str, Any]:
        return await self.messages.get()

    def hear(self, **frame: Any) -> None:
        self.messages.put_nowait({"type": "websocket.receive", "text": json.dumps(frame)})


class _Record:
    """A record that reaches further than the tail has told."""

    def __init__(self, last: int, epoch: str = "e1") -> None:
        self.found = delivery.Page((), last, 1, epoch)

    async def page(self, who: identity.Principal, after: int, size: int) -> delivery.Page:
        return self.found

    async def feed(self, *_: object) -> None:
        """It is not read here."""


async def _opened(
    frames_per_minute: int = 1000, reader: _Record | None = None, resume: int | None = None
) -> tuple[session.Session, sockets.UnifiedWebSocketManager]:
    known, counted = trust.Trust(), limits.Limits("redis://127.0.0.1:1/0", "gateway")
    tier = auth_pb2.TierLimits(tier="free", sockets=3, frames_per_minute=frames_per_minute)
    await known.apply(auth_pb2.WatchTrustResponse(policy=auth_pb2.Policy(limits=[tier])))
    entitled = entitlements.Entitlements(known, counted, audit.Refusals(None), 1)  # type: ignore[arg-type]
    manager = sockets.UnifiedWebSocketManager(entitled.sockets)
    edge = session.Edge(GatewaySettings(stall_s=0.05), None, _Tail(), reader, None, manager, None, entitled)  # type: ignore[arg-type]
    who = identity.Principal(ids.UserId.new(), ids.TenantId.new(), ids.SessionId.new(), ("user",), "free", time.time() + 600, "t")
    one = session.Session(edge, who, "")
    await manager.admit(one)
    await one.join(resume)
    return one, manager


async def _served(line: _Line) -> None:
    one, manager = await _opened()
    async with asyncio.timeout(5):
        await one.run(line)  # type: ignore[arg-type]
    assert len(manager) == 0


async def test_a_client_that_is_gone_after_a_burst_leaves_nothing_behind() -> None:
    line = _Line()
    line.gone = True
    for _ in range(_BURST):
        line.hear(type="PING")
    line.messages.put_nowait({"type": "websocket.disconnect"})
    await _served(line)


async def test_a_client_that_closes_after_a_burst_has_its_answers() -> None:
    line = _Line()
    for index in range(_BURST):
        line.hear(type="PING", id=f"p{index}")
    line.messages.put_nowait({"type": "websocket.disconnect"})
    await _served(line)
    pongs = [frame["id"] for frame in line.taken if frame["type"] == "pong"]
    # the reader waits for the writer in between: at least that part was sent, in order
    assert pongs == [f"p{index}" for index in range(len(pongs))]
    assert len(pongs) > _BURST // 2


async def test_a_client_that_never_reads_is_sent_away() -> None:
    line = _Line(room=3)
    for _ in range(_BURST):
        line.hear(type="PING")
    await _served(line)
    assert line.closed == [close_codes.SLOW_READER]


async def test_nothing_is_kept_for_a_writer_that_has_ended() -> None:
    one, _ = await _opened()
    one.delivery.end()
    for _ in range(_BURST):
        one.delivery.say(b"{}")
    assert one.delivery.unsaid == 0
    async with asyncio.timeout(1):
        await one.delivery.quiet()


@pytest.mark.parametrize(("frame_id", "named"), [("m1", "m1"), (7, None)])
async def test_a_frame_too_many_is_answered_under_its_id(frame_id: object, named: str | None) -> None:
    line = _Line()
    one, _ = await _opened(frames_per_minute=1)
    async with asyncio.timeout(5), asyncio.TaskGroup() as group:
        group.create_task(one.run(line))  # type: ignore[arg-type]
        line.hear(type="PING", id="first")
        line.hear(type="PING", id=frame_id)
        await line.refused.wait()
        one.end(close_codes.DRAINING)
    assert (line.taken[-1]["code"], line.taken[-1]["id"]) == ("RATE_LIMITED", named)


async def test_a_policy_that_allows_more_frames_counts_for_sockets_that_are_open() -> None:
    line = _Line()
    one, _ = await _opened(frames_per_minute=1)
    known = one._edge.entitled._trust
    async with asyncio.timeout(5), asyncio.TaskGroup() as group:
        group.create_task(one.run(line))  # type: ignore[arg-type]
        line.hear(type="PING", id="first")
        line.hear(type="PING", id="second")
        await line.refused.wait()
        more = auth_pb2.Policy(limits=[auth_pb2.TierLimits(tier="free", frames_per_minute=60_000_000)])
        await known.apply(auth_pb2.WatchTrustResponse(policy=more))
        line.refused.clear()
        for number in range(10):
            line.hear(type="PING", id=f"later{number}")
        line.hear(type="NONSENSE", id="last")
        await line.refused.wait()
        one.end(close_codes.DRAINING)
    answers = {frame.get("id"): frame["type"] for frame in line.taken}
    assert (answers["first"], answers["second"], answers["later9"]) == ("pong", "error", "pong")


async def test_a_client_that_has_seen_more_than_this_gateway_goes_on_where_it_is() -> None:
    one, _ = await _opened(reader=_Record(9), resume=7)
    assert (one.delivery.last, one.delivery.tail, one.delivery.behind) == (7, 9, True)
    # one that has seen more than there is has seen another record
    one, _ = await _opened(reader=_Record(9), resume=11)
    assert (one.delivery.last, one.delivery.tail) == (9, 9)


async def test_a_resume_past_what_this_gateway_knows_is_looked_up() -> None:
    line = _Line()
    one, _ = await _opened(reader=_Record(9))
    async with asyncio.timeout(5), asyncio.TaskGroup() as group:
        group.create_task(one.run(line))  # type: ignore[arg-type]
        line.hear(type="RESUME", id="r1", payload={"after": 8})
        line.hear(type="RESUME", id="r2", payload={"after": 10})
        await line.refused.wait()
        one.end(close_codes.DRAINING)
    assert [(frame.get("id"), frame["type"]) for frame in line.taken[1:]] == [("r1", "ack"), ("r2", "error")]
    assert line.taken[1]["data"] == {"from": 8, "to": 9}


async def test_the_end_of_another_record_is_not_the_end_of_this_one() -> None:
    with pytest.raises(errors.Unavailable):
        await _opened(reader=_Record(9, "e2"), resume=7)
