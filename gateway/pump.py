"""The one tail stream of this gateway -> sockets: order, reconnection, joins in each user's own name."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Protocol

import grpc

from chassis import identity, log, telemetry
from gateway import delivery
from netra import errors, ids
from netra.events.v1 import events_pb2, events_pb2_grpc

_log = log.get(__name__)
_delivered = telemetry.meter.create_counter("netra.gateway.events", description="Events taken from the tail.")
_RETRY_S = 0.1
_MEND_S = 1.0
_PATIENCE_S = 5.0
_REFUSED_S = 5.0


class Sink(Protocol):
    """A socket, as the pump knows it."""

    principal: identity.Principal
    delivery: delivery.Delivery

    def resync(self, epoch: str, cursor: int) -> None:
        """The record is another one now."""


@dataclass(slots=True)
class Feed:
    """One followed user: where their stream stands, and who listens."""

    user_id: ids.UserId
    cursor: int = 0
    oldest: int = 1
    epoch: str = ""
    joined: bool = False
    refusal: str = ""
    refused: dict[str, float] = field(default_factory=dict)
    token: str = ""
    token_ends: float = 0.0
    asked_at: float = 0.0
    waiting: list[identity.Principal] = field(default_factory=list)
    sinks: list[Sink] = field(default_factory=list)

    def refuses(self, token: str) -> bool:
        """Whether the token was refused just now; what was said earlier is asked again."""
        return self.refused.get(token, 0.0) >= time.time() - _REFUSED_S

    def credential(self) -> identity.Principal | None:
        """The longest-lived token of a listener that was not refused just now."""
        now = time.time()
        known = [sink.principal for sink in self.sinks] + self.waiting
        usable = [one for one in known if one.expires_at > now and not self.refuses(one.token)]
        return max(usable, key=lambda one: one.expires_at, default=None)


class Pump:
    """Follows the users whose sockets are here."""

    def __init__(self, stub: events_pb2_grpc.EventsServiceAsyncStub) -> None:
        self._stub = stub
        self._feeds: dict[str, Feed] = {}
        self._requests: asyncio.Queue[events_pb2.TailRequest | None] = asyncio.Queue()
        self._moved = asyncio.Condition()
        self.connected = False

    async def follow(self, principal: identity.Principal) -> Feed:
        """The user's feed, joined; `attach` must follow. Raises `Unavailable` or `Unauthenticated`."""
        feed = self._feeds.setdefault(principal.user_id, Feed(principal.user_id))
        feed.waiting.append(principal)
        try:
            if not feed.joined or principal.expires_at > feed.token_ends + 1:
                self._ask(feed)
            async with asyncio.timeout(_PATIENCE_S), self._moved:
                await self._moved.wait_for(lambda: feed.joined or feed.refuses(principal.token))
            if not feed.joined:
                raise errors.Unauthenticated(f"The token was refused: {feed.refusal or 'it has ended'}.")
        except TimeoutError:
            self.give_up(feed, principal)
            raise errors.Unavailable("The record is not reachable just now.", retry_after_ms=1000) from None
        except BaseException:
            self.give_up(feed, principal)
            raise
        return feed

    def give_up(self, feed: Feed, principal: identity.Principal) -> None:
        """Do not attach after all."""
        feed.waiting.remove(principal)
        self._tidy(feed)

    def attach(self, feed: Feed, sink: Sink) -> None:
        """Give the sink every event after the feed's cursor."""
        feed.waiting.remove(sink.principal)
        feed.sinks.append(sink)

    def detach(self, sink: Sink) -> None:
        """Give the sink nothing more; leave the user when nobody else listens."""
        feed = self._feeds.get(sink.principal.user_id)
        if feed is not None and sink in feed.sinks:
            feed.sinks.remove(sink)
            self._tidy(feed)

    def renewed(self, user_id: ids.UserId) -> None:
        """A listener has a fresh token: follow the user under it."""
        feed = self._feeds.get(user_id)
        if feed is not None:
            self._ask(feed)

    async def run(self) -> None:
        """Keep the stream up, for ever."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._mend())
            while True:
                reason = "it was ended"
                try:
                    await self._stream()
                except grpc.aio.AioRpcError as error:
                    reason = error.code().name
                except errors.NetraError as error:
                    reason = error.code
                self._lost(reason)
                await asyncio.sleep(_RETRY_S)

    async def _stream(self) -> None:
        requests = self._requests = asyncio.Queue()
        call = self._stub.Tail(_drawn_from(requests))
        for feed in self._feeds.values():
            feed.refused.clear()
            self._ask(feed)
        try:
            async for batch in call:
                self.connected = True
                await self._take(batch)
        finally:
            call.cancel()
            # grpc waits for the next request for as long as there may be one
            requests.put_nowait(None)

    def _lost(self, reason: str) -> None:
        if self.connected:
            _log.warning("the tail broke; opening it again", reason=reason)
        self.connected = False
        for feed in self._feeds.values():
            feed.joined = False

    async def _mend(self) -> None:
        """Asks again for every user who is not followed although a token is there."""
        while True:
            await asyncio.sleep(_MEND_S)
            for feed in list(self._feeds.values()):
                if not feed.joined and time.monotonic() - feed.asked_at > _MEND_S:
                    self._ask(feed)

    def _ask(self, feed: Feed) -> None:
        credential = feed.credential()
        if credential is None:
            return
        feed.token, feed.token_ends, feed.asked_at = credential.token, credential.expires_at, time.monotonic()
        self._requests.put_nowait(events_pb2.TailRequest(join=events_pb2.JoinUser(access_token=credential.token)))

    def _tidy(self, feed: Feed) -> None:
        if not feed.sinks and not feed.waiting and self._feeds.get(feed.user_id) is feed:
            del self._feeds[feed.user_id]
            self._requests.put_nowait(events_pb2.TailRequest(leave=events_pb2.LeaveUser(user_id=feed.user_id)))

    async def _take(self, batch: events_pb2.TailResponse) -> None:
        for position in batch.positions:
            self._place(position)
        if batch.positions:
            async with self._moved:
                self._moved.notify_all()
        for event in batch.events:
            feed = self._feeds.get(event.user_id)
            if feed is not None and feed.joined:
                feed.cursor = max(feed.cursor, event.cursor)
                for sink in feed.sinks:
                    sink.delivery.offer(event.cursor, event.frame)
        if batch.events:
            _delivered.add(len(batch.events))

    def _place(self, position: events_pb2.TailPosition) -> None:
        feed = self._feeds.get(position.user_id)
        if feed is None:
            return
        feed.joined = position.joined
        if position.reason or not position.joined:
            # joined with a reason: one token was refused, the user is followed under another
            self._refused(feed, position.reason)
            return
        if feed.epoch and feed.epoch != position.epoch:
            feed.cursor = 0
            for sink in list(feed.sinks):
                sink.resync(position.epoch, position.cursor)
        feed.epoch, feed.oldest = position.epoch, position.oldest
        feed.cursor = max(feed.cursor, position.cursor)
        for sink in feed.sinks:
            sink.delivery.notice(position.cursor)

    def _refused(self, feed: Feed, reason: str) -> None:
        feed.refusal = reason
        feed.refused[feed.token] = time.time()
        if not feed.joined:
            _log.info("not following a user", user_id=feed.user_id, reason=reason)
            self._ask(feed)


async def _drawn_from(requests: asyncio.Queue[events_pb2.TailRequest | None]) -> AsyncIterator[events_pb2.TailRequest]:
    while (request := await requests.get()) is not None:
        yield request
