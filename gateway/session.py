"""One WebSocket from accept to close: one reader, one writer, one owner."""

from __future__ import annotations

import asyncio
import contextvars
import datetime
import time
from collections import deque
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any

from starlette.websockets import WebSocket

from chassis import identity, lifecycle, log, status, telemetry
from gateway import bridge, callers, close_codes, delivery, entitlements, envelope, frames, pump, record, router, sockets, wire, writer
from gateway import stages as stages_
from gateway import statistics as statistics_
from gateway.settings import GatewaySettings
from netra import errors, ids

_frames = telemetry.meter.create_counter("netra.gateway.frames", description="Frames of clients by type and outcome.")
_MAX_WAITING = 32
_MAX_UNSAID = 64
_INLINE = frozenset({"PING", "AUTH", "RESUME"}) | bridge.TYPES


@dataclass(frozen=True, slots=True)
class Edge:
    """What every session works with."""

    settings: GatewaySettings
    verifier: identity.Verifier
    tail: pump.Pump
    reader: record.Record
    calls: router.Router
    open: sockets.UnifiedWebSocketManager
    callers: callers.Callers
    entitled: entitlements.Entitlements
    streams: bridge.Streams = field(default_factory=bridge.Streams)
    statistics: statistics_.Statistics = field(default_factory=statistics_.Statistics)
    stages: stages_.Stages = field(default_factory=stages_.Stages)


class Session:
    """One socket of one user."""

    def __init__(self, edge: Edge, principal: identity.Principal, client_id: str, address: str = "") -> None:
        self._address = address
        self.connection_id = ids.ConnectionId.new()
        self.principal = principal
        self.client_id = client_id
        self._edge = edge
        self._refusals = 0
        self._inbox: deque[frames.Frame] = deque()
        self._room = asyncio.Semaphore(_MAX_WAITING)
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._timers: list[asyncio.TimerHandle] = []
        self._departure: asyncio.TimerHandle | None = None
        self._wire: wire.Wire | None = None
        self._writer: writer.Writer | None = None
        self._closing: close_codes.Close | None = None
        self._draining = self._over = False
        self._bridge = bridge.Bridge(edge.streams, edge.entitled, self._start)
        self.delivery = self._owed(0, 0)

    def _owed(self, last: int, tail: int) -> delivery.Delivery:
        return delivery.Delivery(last, tail, self._edge.settings.queue_events, self._edge.settings.queue_bytes)

    async def join(self, resume: int | None) -> None:
        """Follow the user; from here on nothing is missed. Raises `NetraError`."""
        feed = self._feed = await self._edge.tail.follow(self.principal)
        try:
            end = await self._end_of_record(resume or 0)
        except BaseException:
            self._edge.tail.give_up(feed, self.principal)
            raise
        tail = max(end, feed.cursor)
        self.delivery = self._owed(tail if resume is None else min(resume, tail), tail)
        self._edge.tail.attach(feed, self)
        self.delivery.say(self._greeting(feed))
        if resume is not None and resume > tail:
            self.delivery.say(frames.dump({"type": "resync", "epoch": feed.epoch, "cursor": tail}))

    async def _end_of_record(self, wanted: int) -> int:
        """The last cursor known; the record itself is asked when a client has seen more than this gateway."""
        if wanted <= self._feed.cursor:
            return self._feed.cursor
        page = await self._edge.reader.page(self.principal, wanted, 1)
        if page.epoch != self._feed.epoch:
            raise errors.Unavailable("The record is just being replaced. Connect again.", retry_after_ms=1000)
        return page.last

    def _greeting(self, feed: pump.Feed) -> bytes:
        limits, entitled = self._edge.settings, self._edge.entitled
        return frames.dump(
            {
                "type": "connected",
                "connection_id": self.connection_id,
                "user_id": self.principal.user_id,
                "cursor": self.delivery.tail,
                "epoch": feed.epoch,
                "heartbeat_s": limits.heartbeat_s,
                "limits": {
                    "max_frame_bytes": entitled.max_frame_bytes(self.principal, limits.max_frame_bytes),
                    "frames_per_minute": entitled.frames_per_minute(self.principal),
                },
                "server_time": _iso(time.time()),
            }
        )

    async def run(self, websocket: WebSocket) -> None:
        """Serve the accepted socket until it closes."""
        line: wire.Wire = websocket.scope["state"]["wire"]
        self._wire, line.heard = line, self._heard
        log.bind(user_id=self.principal.user_id, connection_id=self.connection_id)
        try:
            async with asyncio.TaskGroup() as group:
                self._group = group
                self._writer = writer.Writer(self.delivery, line, self, self._edge.settings.stall_s)
                self._watch_token()
                if self._closing is not None:
                    self.end(self._closing)
                if self._draining:
                    self._depart()
                await self._read(websocket)
                self._over = True
                for task in self._tasks.values():
                    task.cancel()
        finally:
            self.leave()

    def leave(self) -> None:
        """Forget everything about the socket; once is enough."""
        for timer in (*self._timers, self._departure):
            if timer is not None:
                timer.cancel()
        if self._writer is not None:
            self._writer.close()
        self._edge.tail.detach(self)
        self._edge.open.remove(self)

    def end(self, close: close_codes.Close) -> None:
        """Close it now."""
        self._closing = self._closing or close
        if self._wire is not None:
            self._wire.end(close)

    def drain(self) -> None:
        """Answer what was asked, send what is queued, say where to resume, close."""
        self._draining = True
        self._bridge.close(errors.Unavailable("This gateway is stopping. Open it again at another.", retry_after_ms=100))
        self.delivery.stop()
        loop, patience_s = asyncio.get_running_loop(), self._edge.settings.drain_s / 2
        self._departure = loop.call_later(patience_s, self._depart, True)
        self._depart()

    def _depart(self, late: bool = False) -> None:
        if self._writer is not None and (late or not ("worker" in self._tasks or self._inbox)):
            self._writer.finish()

    def resync(self, epoch: str, cursor: int) -> None:
        """The record is another one now: say so and let the client come again."""
        self.delivery.stop()
        if self._wire is not None:
            self._wire.put(envelope.text(frames.dump({"type": "resync", "epoch": epoch, "cursor": cursor})))
        self.end(close_codes.RESYNC)

    def _start(self, name: str, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        # a context of its own: what it does later belongs to no frame's trace
        task = self._group.create_task(work, name=name, context=contextvars.Context())
        self._tasks[name] = task
        task.add_done_callback(lambda _: self._finished(name))
        return task

    def _finished(self, name: str) -> None:
        self._tasks.pop(name, None)
        self.delivery.woken()
        # a frame may have come between the worker's last look and its end
        if name == "worker" and self._inbox and not self._over:
            self._start("worker", self._work())
        elif name == "worker" and self._draining:
            self._depart()

    # the reader

    async def _read(self, websocket: WebSocket) -> None:
        while True:
            message = await websocket.receive()
            if message["type"] == "websocket.disconnect":
                return
            if self._closing is None:
                await self._hear(message.get("text"))
            if self.delivery.unsaid > _MAX_UNSAID:
                await self.delivery.quiet()

    async def _hear(self, text: str | None) -> None:
        now = time.time()
        per_minute = self._edge.entitled.frames_per_minute(self.principal)
        wait_ms = self._edge.entitled.take_frame(self.principal)
        self._refusals = self._refusals + 1 if wait_ms else 0
        if wait_ms:
            self._slow_down(wait_ms, per_minute, frames.id_in(text or ""))
            return
        try:
            if text is None:
                raise frames.Refused(errors.BinaryNotSupported(), None)
            frame = frames.parse(text, self._edge.entitled.max_frame_bytes(self.principal, self._edge.settings.max_frame_bytes), now)
        except frames.Refused as refused:
            self._refuse(refused.error, refused.frame_id)
            return
        self._edge.statistics.received(self.principal.user_id, frame)
        if frame.type in _INLINE:
            await self._answer(frame)
            return
        await self._room.acquire()
        self._inbox.append(frame)
        if "worker" not in self._tasks:
            self._start("worker", self._work())

    def _heard(self) -> None:
        """Count a frame that is no message: a ping, a further part of one. There is no answer that could refuse it."""
        if self._edge.entitled.take_frame(self.principal):
            self._refusals += 1
            self._end_abuse()

    def _slow_down(self, wait_ms: int, per_minute: int, frame_id: str | None) -> None:
        self._refuse(errors.RateLimited("Too many frames in a minute.", retry_after_ms=wait_ms), frame_id)
        self._end_abuse()

    def _end_abuse(self) -> None:
        if self._refusals > self._edge.entitled.frames_per_minute(self.principal):
            self.end(close_codes.ABUSE)

    def _refuse(self, error: errors.NetraError, frame_id: str | None) -> None:
        with telemetry.span("ws refused", {}, "SERVER") as span:
            telemetry.failed(span, error.code)
            _frames.add(1, {"type": "refused", "code": error.code})
            self._edge.statistics.refused(self.principal.user_id)
            self.delivery.say(frames.error(frame_id, error, telemetry.correlation_id()))

    # frames, in the order they came

    async def _work(self) -> None:
        log.bind(user_id=self.principal.user_id, connection_id=self.connection_id)
        while self._inbox:
            await self._answer(self._inbox.popleft())
            self._room.release()

    async def _answer(self, frame: frames.Frame) -> None:
        with telemetry.span(f"ws {frame.type}", {}, "SERVER") as span:
            correlation_id, code = telemetry.correlation_id(), "OK"
            if frame.alias:
                self.delivery.say(frames.deprecated(frame, correlation_id))
            try:
                await self._handle(frame, correlation_id)
            except (Exception, asyncio.CancelledError) as error:
                if isinstance(error, asyncio.CancelledError) and lifecycle.told_to_stop():
                    raise
                known = status.as_netra(error)
                code = known.code
                telemetry.failed(span, code)
                self._edge.statistics.refused(self.principal.user_id)
                self.delivery.say(frames.error(frame.id or None, known, correlation_id))
            _frames.add(1, {"type": frame.type, "code": code})

    async def _handle(self, frame: frames.Frame, correlation_id: str) -> None:
        request_id = frame.id or ids.RequestId.new()
        if frame.type == "PING":
            self.delivery.say(frames.dump({"type": "pong", "id": request_id, "payload": frame.payload}))
        elif frame.type == "RESUME":
            await self._resume(frame, request_id, correlation_id)
        elif frame.type in bridge.TYPES:
            data = self._bridge.answer(self.principal, frame, self.delivery)
            self.delivery.say(frames.ack(request_id, data, correlation_id))
        else:
            data = await self._renew(frame) if frame.type == "AUTH" else await self._call(frame, request_id)
            self._edge.statistics.processed(self.principal.user_id, frame)
            self.delivery.say(frames.ack(request_id, data, correlation_id))

    async def _call(self, frame: frames.Frame, request_id: str) -> dict[str, Any]:
        if self._draining:
            raise errors.Unavailable("This gateway is stopping. Reconnect and send it again.", retry_after_ms=100)
        return await self._edge.calls.call(self.principal, frame, request_id, self.connection_id)

    async def _resume(self, frame: frames.Frame, request_id: str, correlation_id: str) -> None:
        after = frames.cursor_of(frame.fields, "after")
        epoch = frame.fields.get("epoch")
        if epoch is not None and epoch != self._feed.epoch:
            self.delivery.say(frames.dump({"type": "resync", "epoch": self._feed.epoch, "cursor": self.delivery.tail}))
            raise errors.FailedPrecondition("The record is another one now. Start from its epoch and cursor.", epoch=self._feed.epoch)
        self.delivery.tail = max(self.delivery.tail, await self._end_of_record(after))
        if after > self.delivery.tail:
            raise frames.wrong("payload.after", f"is ahead of the record, which ends at {self.delivery.tail}")
        self.delivery.rewind(after)
        self.delivery.say(frames.ack(request_id, {"from": after, "to": self.delivery.tail}, correlation_id))

    async def _renew(self, frame: frames.Frame) -> dict[str, Any]:
        token = frame.fields.get("access_token")
        if not isinstance(token, str) or not token:
            raise frames.wrong("payload.access_token", "is required and must not be empty")
        fresh = await self._edge.callers.known(token, self._address)
        if fresh.user_id != self.principal.user_id:
            raise errors.PermissionDenied("The token names another user. Open a socket of their own for them.")
        self.principal = fresh
        self._edge.tail.renewed(fresh.user_id)
        self._watch_token()
        return {"expires_at": _iso(fresh.expires_at)}

    # the life of the token

    def _watch_token(self) -> None:
        for timer in self._timers:
            timer.cancel()
        loop, limits = asyncio.get_running_loop(), self._edge.settings
        left = self.principal.expires_at - time.time()
        self._timers = [
            loop.call_later(max(left - limits.expiring_s, 0), self._announce_expiry),
            loop.call_later(max(left + limits.token_grace_s, 0), self.end, close_codes.TOKEN_EXPIRED),
        ]

    def _announce_expiry(self) -> None:
        self.delivery.say(frames.dump({"type": "auth_expiring", "expires_at": _iso(self.principal.expires_at)}))

    # what the writer asks for

    def feed(self) -> None:
        """Read on from the record."""
        if "feeder" not in self._tasks and not self._over:
            size = min(self._edge.settings.queue_events, 1000)
            self._start("feeder", self._edge.reader.feed(self.delivery, self._feed.epoch, lambda: self.principal, size))

    def notified(self, event: delivery.Event) -> None:
        """The last event of a run was sent."""
        self._edge.stages.note(event.run_id)


def _iso(at: float) -> str:
    return datetime.datetime.fromtimestamp(at, datetime.UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
