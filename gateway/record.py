"""Pages of the record, read in the name of their user."""

from __future__ import annotations

from chassis import channel, status
from gateway import delivery
from netra.events.v1 import events_pb2, events_pb2_grpc


class Record:
    """Pages of one user's record, in that user's name."""

    def __init__(self, stub: events_pb2_grpc.EventsServiceAsyncStub) -> None:
        self._stub = stub

    async def page(self, token: str, after: int, size: int) -> delivery.Page:
        """What follows a cursor. Raises `NetraError`."""
        with status.translated():
            wanted = events_pb2.ListEventsRequest(after=after, page_size=size)
            answer = await self._stub.ListEvents(wanted, metadata=channel.bearer(token))
        events = tuple((event.cursor, event.frame) for event in answer.events)
        return delivery.Page(events, answer.last, max(answer.oldest, 1))
