"""Server-sent events: what cannot be resumed is refused, a peer that takes nothing is cut."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from grpc_status import rpc_status

from chassis import identity, replicas, status
from gateway import delivery, sockets, sse
from netra import errors, ids
from netra.auth.v1 import auth_pb2
from netra.events.v1 import events_pb2

_WHO = identity.Principal(ids.UserId.new(), ids.TenantId.new(), ids.SessionId.new(), ("user",), "free", time.time() + 86_400, "t")
_OLDEST, _LAST = 10, 20


class _Batches:
    """The events there are; then the run goes on for ever, if it is `running`."""

    def __init__(self, running: bool = False) -> None:
        self.running = running

    async def __aiter__(self) -> AsyncIterator[events_pb2.SubscribeResponse]:
        for cursor in range(_OLDEST, _LAST + 1):
            yield events_pb2.SubscribeResponse(events=[events_pb2.Event(cursor=cursor, type="x", frame=b"{}")])
        while self.running:
            await asyncio.Event().wait()

    def cancel(self) -> None:
        """Nothing to stop."""


class _Record:
    """The events service, for one user; `opened` is whether the run is known there."""

    def __init__(self, opened: bool = True, running: bool = False) -> None:
        self.opened, self.running = opened, running

    async def ListEvents(self, request: events_pb2.ListEventsRequest, metadata: Any, timeout: float) -> events_pb2.ListEventsResponse:
        if not self.opened:
            raise errors.NotFound
        return events_pb2.ListEventsResponse(last=_LAST, oldest=_OLDEST)

    async def GetRun(self, request: Any, metadata: Any) -> None:
        """The dispatcher knows the run."""

    async def page(self, who: identity.Principal, after: int, size: int) -> delivery.Page:
        return delivery.Page((), _LAST, _OLDEST)

    def Subscribe(self, request: events_pb2.SubscribeRequest, metadata: Any) -> _Batches:
        return _Batches(self.running)


def _events(record: _Record, *, allowed: int = 3, revoked: bool = False, grace_s: float = 25.0) -> sse.Events:
    trust = SimpleNamespace(revoked=lambda who: revoked)
    settings = SimpleNamespace(stall_s=0.05, token_grace_s=grace_s)
    edge = SimpleNamespace(
        settings=settings, reader=record, open=sockets.UnifiedWebSocketManager(lambda _: allowed),
        verifier=SimpleNamespace(trust=trust), entitled=SimpleNamespace(sockets=lambda _: allowed),
    )  # fmt: skip
    records = replicas.Each(replicas.Replicas("127.0.0.1:1"), lambda target: record)
    return sse.Events(edge, SimpleNamespace(records=records, dispatcher=record))  # type: ignore[arg-type]


@pytest.mark.parametrize("opened", [True, False])
@pytest.mark.parametrize("after", [_OLDEST - 2, _LAST + 1])
async def test_a_cursor_out_of_range_is_refused_before_anything_is_sent(after: int, opened: bool) -> None:
    with pytest.raises(errors.FailedPrecondition):
        await _events(_Record(opened)).stream(_WHO, ids.RunId.new(), after)


@pytest.mark.parametrize("after", [0, _OLDEST - 1, _LAST])
async def test_a_cursor_in_range_is_not(after: int) -> None:
    await _events(_Record()).stream(_WHO, ids.RunId.new(), after)


@pytest.mark.parametrize("room", [1, 3, 1000])
async def test_a_peer_that_takes_nothing_is_cut(room: int) -> None:
    sent: list[bytes] = []
    cut = asyncio.Event()

    async def send(message: Any) -> None:
        if len(sent) >= room:
            await asyncio.Event().wait()
        sent.append(message.get("body", b""))

    async def receive() -> Any:
        await cut.wait()
        return {"type": "http.disconnect"}

    answer = await _events(_Record()).stream(_WHO, ids.RunId.new(), 0)
    async with asyncio.timeout(5):
        await answer({"type": "http", "state": {"cut": cut.set}}, receive, send)
    assert cut.is_set() == (room < 1000)
    assert len(sent) == min(room, 3 + _LAST - _OLDEST + 1)


class _Cancellable:
    def __init__(self, batches: AsyncIterator[events_pb2.SubscribeResponse]) -> None:
        self._batches = batches

    def __aiter__(self) -> AsyncIterator[events_pb2.SubscribeResponse]:
        return self._batches

    def cancel(self) -> None:
        """Nothing to stop."""


def _raised(error: errors.NetraError) -> grpc.aio.AioRpcError:
    rich = rpc_status.to_status(status.to_proto(error))
    return grpc.aio.AioRpcError(rich.code, grpc.aio.Metadata(), grpc.aio.Metadata(*rich.trailing_metadata), rich.details)


class _Truncating(_Record):
    """Retention takes events while they are streamed, and while no stream is open."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[int] = []

    async def _batches(self, after: int) -> AsyncIterator[events_pb2.SubscribeResponse]:
        self.asked.append(after)
        if len(self.asked) == 1:
            yield events_pb2.SubscribeResponse(truncated_to=13, events=[events_pb2.Event(cursor=13, type="x", frame=b"{}")])
            raise _raised(errors.Unavailable())
        if len(self.asked) == 2:
            raise _raised(errors.FailedPrecondition("The record begins later.", oldest=20))
        shown = events_pb2.TransientEvent(type="agent_delta", frame=b'{"a":1}', after_cursor=20)
        yield events_pb2.SubscribeResponse(events=[events_pb2.Event(cursor=20, type="x", frame=b"{}")], transients=[shown])

    def Subscribe(self, request: events_pb2.SubscribeRequest, metadata: Any) -> Any:
        return _Cancellable(self._batches(request.after))


async def test_what_retention_takes_meanwhile_is_said() -> None:
    record, sent = _Truncating(), []

    async def send(message: Any) -> None:
        sent.append(message.get("body", b""))

    answer = await _events(record).stream(_WHO, ids.RunId.new(), 0)
    async with asyncio.timeout(5):
        await answer({"type": "http", "state": {}}, asyncio.Event().wait, send)  # type: ignore[arg-type]
    found = [line for line in b"".join(sent).splitlines() if line.startswith((b"id", b"event"))]
    gone, event = b"event: history_truncated", b"event: x"
    # what is not recorded has no id: whoever comes back goes on from the last event
    assert found == [b"id: 12", gone, b"id: 13", event, b"id: 19", gone, b"id: 20", event, b"event: agent_delta"]
    assert b'\n\nevent: agent_delta\ndata: {"a":1}\n\n' in b"".join(sent)
    assert record.asked == [0, 13, 19]


def test_a_page_says_what_retention_took() -> None:
    page = events_pb2.ListEventsResponse(last=_LAST, oldest=_OLDEST)
    sse.check_kept(0, page)
    sse.check_kept(_OLDEST - 1, page)
    with pytest.raises(errors.FailedPrecondition) as refused:
        sse.check_kept(_OLDEST - 2, page)
    assert refused.value.details["oldest"] == str(_OLDEST)


class _Reader:
    """A peer that takes everything."""

    def __init__(self) -> None:
        self.sent: list[Any] = []
        self.began = asyncio.Event()

    async def send(self, message: Any) -> None:
        self.sent.append(message)
        if b"data:" in message.get("body", b""):
            self.began.set()

    async def receive(self) -> Any:
        await asyncio.Event().wait()

    async def read(self, events: sse.Events) -> None:
        answer = await events.stream(_WHO, ids.RunId.new(), 0)
        async with asyncio.timeout(5):
            await answer({"type": "http", "state": {}}, self.receive, self.send)
        assert self.sent[-1] == {"type": "http.response.body", "body": b"", "more_body": False}


async def test_a_stream_ends_with_its_token() -> None:
    peer, left_s = _Reader(), _WHO.expires_at - time.time()
    await peer.read(_events(_Record(running=True), grace_s=0.2 - left_s))
    assert peer.began.is_set()


async def test_a_stream_ends_when_its_session_does_whatever_the_record_says() -> None:
    peer, events = _Reader(), _events(_Record(running=True))
    async with asyncio.timeout(5), asyncio.TaskGroup() as group:
        group.create_task(peer.read(events))
        await peer.began.wait()
        events._edge.open.revoked(auth_pb2.Revocation(session_id=_WHO.session_id))
    assert len(events._edge.open) == 0


async def test_a_gateway_that_drains_ends_its_streams_and_waits_for_them() -> None:
    peer, events = _Reader(), _events(_Record(running=True))
    async with asyncio.timeout(5), asyncio.TaskGroup() as group:
        group.create_task(peer.read(events))
        await peer.began.wait()
        await events._edge.open.drain(60)
    with pytest.raises(errors.Unavailable):
        await peer.read(events)


async def test_a_session_that_ended_meanwhile_gets_no_stream_and_a_user_has_a_few() -> None:
    for events, error in (
        (_events(_Record(), revoked=True), errors.Unauthenticated),
        (_events(_Record(), allowed=0), errors.QuotaExceeded),
    ):
        with pytest.raises(error):
            await _Reader().read(events)
        assert len(events._edge.open) == 0


def test_the_record_is_asked_again_more_and_more_seldom() -> None:
    assert list(itertools.islice(sse._pauses(), 6)) == [0.2, 0.4, 0.8, 1.6, 3.0, 3.0]
