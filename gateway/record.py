"""Pages of the record, read in the name of their user; a few at a time, so that many who resume do not hold up those who watch."""

from __future__ import annotations

import asyncio
import weakref
from collections import defaultdict
from collections.abc import Callable

from chassis import channel, identity, log, replicas, status
from gateway import delivery, upstreams
from netra import errors
from netra.events.v1 import events_pb2, events_pb2_grpc

_log = log.get(__name__)
# of one replica: those who wait for one that is silent hold up nobody who asks another
_AT_ONCE = 8
_RETRY_S, _LONGEST_S = 0.2, 2.0


class Record:
    """Pages of one user's record, in that user's name: one at a time for each, users in the order in which they came."""

    def __init__(self, events: upstreams.Events) -> None:
        self._events = events
        self._rooms: defaultdict[str, asyncio.Semaphore] = defaultdict(lambda: asyncio.Semaphore(_AT_ONCE))
        self._turns: weakref.WeakValueDictionary[str, asyncio.Lock] = weakref.WeakValueDictionary()

    async def page(self, who: identity.Principal, after: int, size: int) -> delivery.Page:
        """What follows a cursor. Raises `NetraError`."""
        wanted = events_pb2.ListEventsRequest(after=after, page_size=size)

        async def ask(stub: events_pb2_grpc.EventsServiceAsyncStub) -> events_pb2.ListEventsResponse:
            with status.translated():
                return await stub.ListEvents(wanted, metadata=channel.bearer(who.token), timeout=replicas.SILENCE_S)

        turn = self._turns.setdefault(who.user_id, asyncio.Lock())
        async with turn:
            answer = await self._events.ask(who.user_id, ask, self._rooms)
        return delivery.Page(tuple(map(delivery.event, answer.events)), answer.last, max(answer.oldest, 1), answer.epoch)

    async def feed(self, owed: delivery.Delivery, epoch: str, who: Callable[[], identity.Principal], size: int) -> None:
        """Bring a socket that is behind on by one page, however long that takes; by none of another generation of the record."""
        pause_s = _RETRY_S
        while not owed.closed:
            generation = owed.generation
            try:
                page = await self.page(who(), owed.last, size)
                if page.epoch == epoch and owed.fill(generation, page):
                    return
                pause_s = _RETRY_S
            except errors.NetraError as error:
                _log.info("the record cannot be read just now", code=error.code)
                pause_s = min(pause_s * 2, _LONGEST_S)
            await asyncio.sleep(pause_s)
