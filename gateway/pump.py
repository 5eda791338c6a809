"""The one tail stream of this gateway -> sockets: order, reconnection, joins in each user's own name."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Protocol

import grpc

from chassis import identity, log, replicas, telemetry
from gateway import delivery, upstreams
from netra import errors, ids
from netra.events.v1 import events_pb2

_log = log.get(__name__)
_delivered = telemetry.meter.create_counter("netra.gateway.events", description="Events taken from the tail.")
_degraded = telemetry.meter.create_gauge("netra.gateway.degraded", description="1 while events come late, or not at all.")
_RETRY_S = 0.1
_MEND_S = 1.0
_PATIENCE_S = 5.0
_REFUSED_S = 5.0
_TICK_S = 5.0


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
    token_ends: float = 0.0
    asked_at: float = 0.0
    asking: bool = False
    waiting: list[identity.Principal] = field(default_factory=list)
    sinks: list[Sink] = field(default_factory=list)
    changed: asyncio.Event | None = None

    def refuses(self, token: str) -> bool:
        """Whether the token was refused just now; what was said earlier is asked again."""
        return self.refused.get(token, 0.0) >= time.time() - _REFUSED_S

    def credential(self) -> identity.Principal | None:
        """The longest-lived token of a listener that was not refused just now."""
        now = time.time()
        usable = [one for one in self._listeners() if one.expires_at > now and not self.refuses(one.token)]
        return max(usable, key=lambda one: one.expires_at, default=None)

    def refuse(self, join_id: str, reason: str) -> None:
        """A join was refused: the token that it was made with is not used for a while."""
        self.refusal = reason
        self.refused |= {one.token: time.time() for one in self._listeners() if _join_id(one.token) == join_id}

    def _listeners(self) -> list[identity.Principal]:
        return [sink.principal for sink in self.sinks] + self.waiting

    async def answered(self, token: str) -> None:
        """Returns when the user is followed, or the token was refused."""
        while not (self.joined or self.refuses(token)):
            self.changed = self.changed or asyncio.Event()
            await self.changed.wait()

    def wake(self) -> None:
        """Something about it is known now."""
        if self.changed is not None:
            self.changed.set()
            self.changed = None


class Pump:
    """Follows the users whose sockets are here."""

    def __init__(self, tails: upstreams.Events, gateway_id: str) -> None:
        self._tails, self._gateway_id = tails, gateway_id
        self._feeds: dict[str, Feed] = {}
        self._requests: asyncio.Queue[events_pb2.TailRequest | None] = asyncio.Queue()
        self.connected = False
        self._late = False

    @property
    def live(self) -> bool:
        """Whether events come as soon as they can."""
        return self.connected and not self._late

    async def follow(self, principal: identity.Principal) -> Feed:
        """The user's feed, joined; `attach` must follow. Raises `Unavailable` or `Unauthenticated`."""
        feed = self._feeds.setdefault(principal.user_id, Feed(principal.user_id))
        feed.waiting.append(principal)
        try:
            if not feed.joined or principal.expires_at > feed.token_ends + 1:
                self._ask(feed)
            async with asyncio.timeout(_PATIENCE_S):
                await feed.answered(principal.token)
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
        """Keep the stream up, for ever: to the first replica in this gateway's order that can be reached and is not silent."""
        async with asyncio.TaskGroup() as group:
            for work in (self._mend(), self._tick(), self._tails.replicas.follow()):
                group.create_task(work)
            while True:
                target, reason = self._tails.replicas.first(self._gateway_id), "it was ended"
                try:
                    await self._stream(target)
                except grpc.aio.AioRpcError as error:
                    reason = error.code().name
                except errors.NetraError as error:
                    reason = error.code
                except TimeoutError:
                    reason = "it was silent"
                self._tails.replicas.away(target)
                self._lost(target, reason)
                await asyncio.sleep(_RETRY_S)

    async def _stream(self, target: str) -> None:
        requests = self._requests = asyncio.Queue()
        call = self._tails.of(target).Tail(_drawn_from(requests))
        for feed in self._feeds.values():
            feed.refused.clear()
            self._ask(feed)
        loop = asyncio.get_running_loop()
        try:
            # something comes at least every 2 s, if only that nothing happened
            async with asyncio.timeout(replicas.SILENCE_S) as silence:
                async for batch in call:
                    silence.reschedule(loop.time() + replicas.SILENCE_S)
                    self._heard(target, batch.degraded)
                    self._take(batch)
        finally:
            call.cancel()
            # grpc waits for the next request for as long as there may be one
            requests.put_nowait(None)

    def _heard(self, target: str, late: bool) -> None:
        if not self.connected or late != self._late:
            self._tails.replicas.heard(target)
            self.connected, self._late = True, late
            _degraded.set(int(late))

    def _lost(self, target: str, reason: str) -> None:
        if self.connected:
            _log.warning("the tail broke; opening it again", replica=target, reason=reason)
        self.connected = False
        _degraded.set(1)
        for feed in self._feeds.values():
            feed.joined = feed.asking = False

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(_TICK_S)
            for feed in self._feeds.values():
                for sink in feed.sinks:
                    sink.delivery.tick()

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
        feed.token_ends, feed.asked_at, feed.asking = credential.expires_at, time.monotonic(), True
        join = events_pb2.JoinUser(access_token=credential.token, join_id=_join_id(credential.token))
        self._requests.put_nowait(events_pb2.TailRequest(join=join))

    def _tidy(self, feed: Feed) -> None:
        if not feed.sinks and not feed.waiting and self._feeds.get(feed.user_id) is feed:
            del self._feeds[feed.user_id]
            self._requests.put_nowait(events_pb2.TailRequest(leave=events_pb2.LeaveUser(user_id=feed.user_id)))

    def _take(self, batch: events_pb2.TailResponse) -> None:
        for position in batch.positions:
            self._place(position)
        for found in batch.events:
            feed = self._feeds.get(found.user_id)
            if feed is not None and feed.joined:
                event = delivery.event(found)
                feed.cursor = max(feed.cursor, event.cursor)
                for sink in feed.sinks:
                    sink.delivery.offer(event)
        for passing in batch.transients:
            feed = self._feeds.get(passing.user_id)
            if feed is not None and feed.joined:
                event = delivery.transient(passing)
                for sink in feed.sinks:
                    sink.delivery.hint(event, passing.after_cursor)
        if batch.events:
            _delivered.add(len(batch.events))

    def _place(self, position: events_pb2.TailPosition) -> None:
        feed = self._feeds.get(position.user_id)
        if feed is None:
            return
        feed.joined = position.joined
        if position.joined or position.join_id:
            feed.asking = False
        self._placed(feed, position)
        feed.wake()

    def _placed(self, feed: Feed, position: events_pb2.TailPosition) -> None:
        if position.reason or not position.joined:
            # joined with a reason: one token was refused, the user is followed under another
            self._refused(feed, position)
            return
        if feed.epoch and feed.epoch != position.epoch:
            feed.cursor = 0
            for sink in list(feed.sinks):
                sink.resync(position.epoch, position.cursor)
        feed.epoch, feed.oldest = position.epoch, position.oldest
        feed.cursor = max(feed.cursor, position.cursor)
        for sink in feed.sinks:
            sink.delivery.notice(position.cursor)

    def _refused(self, feed: Feed, position: events_pb2.TailPosition) -> None:
        if position.join_id:
            feed.refuse(position.join_id, position.reason)
        if not feed.joined:
            _log.info("not following a user", user_id=feed.user_id, reason=position.reason)
            # what comes by itself is about tokens of before: a join that is on its way is answered on its own
            if not feed.asking:
                self._ask(feed)


def _join_id(token: str) -> str:
    return hashlib.blake2b(token.encode(), digest_size=16).hexdigest()


async def _drawn_from(requests: asyncio.Queue[events_pb2.TailRequest | None]) -> AsyncIterator[events_pb2.TailRequest]:
    while (request := await requests.get()) is not None:
        yield request
