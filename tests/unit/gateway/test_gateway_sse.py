"""Server-sent events: what cannot be resumed is refused, a peer that takes nothing is cut."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from grpc_status import rpc_status

from chassis import identity, replicas, status
from gateway import delivery, sse
from netra import errors, ids
from netra.events.v1 import events_pb2

_WHO = identity.Principal(ids.UserId.new(), ids.TenantId.new(), ids.SessionId.new(), ("user",), "free", time.time() + 600, "t")
_OLDEST, _LAST = 10, 20


class _Batches:
    async def __aiter__(self) -> AsyncIterator[events_pb2.SubscribeResponse]:
        for cursor in range(_OLDEST, _LAST + 1):
            yield events_pb2.SubscribeResponse(events=[events_pb2.Event(cursor=cursor, type="x", frame=b"{}")])

    def cancel(self) -> None:
        """Nothing to stop."""


class _Record:
    """The events service, for one user; `opened` is whether the run is known there."""

    def __init__(self, opened: bool = True) -> None:
        self.opened = opened

    async def ListEvents(self, request: events_pb2.ListEventsRequest, metadata: Any, timeout: float) -> events_pb2.ListEventsResponse:
        if not self.opened:
            raise errors.NotFound
        return events_pb2.ListEventsResponse(last=_LAST, oldest=_OLDEST)

    async def GetRun(self, request: Any, metadata: Any) -> None:
        """The dispatcher knows the run."""

    async def page(self, who: identity.Principal, after: int, size: int) -> delivery.Page:
        return delivery.Page((), _LAST, _OLDEST)

    def Subscribe(self, request: events_pb2.SubscribeRequest, metadata: Any) -> _Batches:
        return _Batches()


def _events(record: _Record) -> sse.Events:
    trust = SimpleNamespace(revoked=lambda who: False)
    settings = SimpleNamespace(stall_s=0.05, token_grace_s=25.0)
    open_ = SimpleNamespace(draining=asyncio.Event())
    edge = SimpleNamespace(settings=settings, reader=record, open=open_, verifier=SimpleNamespace(trust=trust))
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
        yield events_pb2.SubscribeResponse(events=[events_pb2.Event(cursor=20, type="x", frame=b"{}")])

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
    assert found == [b"id: 12", gone, b"id: 13", event, b"id: 19", gone, b"id: 20", event]
    assert record.asked == [0, 13, 19]


def test_a_page_says_what_retention_took() -> None:
    page = events_pb2.ListEventsResponse(last=_LAST, oldest=_OLDEST)
    sse.check_kept(0, page)
    sse.check_kept(_OLDEST - 1, page)
    with pytest.raises(errors.FailedPrecondition) as refused:
        sse.check_kept(_OLDEST - 2, page)
    assert refused.value.details["oldest"] == str(_OLDEST)
