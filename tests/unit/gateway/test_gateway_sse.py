"""Server-sent events: what cannot be resumed is refused, a peer that takes nothing is cut."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest

from chassis import identity
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

    async def ListEvents(self, request: events_pb2.ListEventsRequest, metadata: Any) -> events_pb2.ListEventsResponse:
        if not self.opened:
            raise errors.NotFound
        return events_pb2.ListEventsResponse(last=_LAST, oldest=_OLDEST)

    async def GetRun(self, request: Any, metadata: Any) -> None:
        """The dispatcher knows the run."""

    async def page(self, token: str, after: int, size: int) -> delivery.Page:
        return delivery.Page((), _LAST, _OLDEST)

    def Subscribe(self, request: events_pb2.SubscribeRequest, metadata: Any) -> _Batches:
        return _Batches()


def _events(record: _Record) -> sse.Events:
    trust = SimpleNamespace(revoked=lambda who: False)
    settings = SimpleNamespace(stall_s=0.05, token_grace_s=25.0)
    open_ = SimpleNamespace(draining=asyncio.Event())
    edge = SimpleNamespace(settings=settings, reader=record, open=open_, verifier=SimpleNamespace(trust=trust))
    return sse.Events(edge, SimpleNamespace(events=record, dispatcher=record))  # type: ignore[arg-type]


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
