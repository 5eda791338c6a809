"""A user's whole record, as one replica of events tells it."""

from __future__ import annotations

import json
from typing import Any

import grpc
import stamina

from netra.events.v1 import events_pb2, events_pb2_grpc
from tests.prove import people

_PAGE = 1000


def away(error: Exception) -> bool:
    """Whether a fault may still be felt."""
    return isinstance(error, grpc.aio.AioRpcError) and error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)


@stamina.retry(on=away, attempts=None, timeout=60.0, wait_initial=0.1, wait_max=1.0)
async def whole(target: str, user: people.Person) -> list[dict[str, Any]]:
    """All of it, page by page; through outages of a minute."""
    found: list[dict[str, Any]] = []
    async with grpc.aio.insecure_channel(target) as channel:
        stub: events_pb2_grpc.EventsServiceAsyncStub = events_pb2_grpc.EventsServiceStub(channel)
        after = 0
        while True:
            request = events_pb2.ListEventsRequest(after=after, page_size=_PAGE)
            page = await stub.ListEvents(request, metadata=user.bearer, timeout=20)
            found.extend(json.loads(event.frame) for event in page.events)
            if page.next_after >= page.last:
                return found
            after = page.next_after
