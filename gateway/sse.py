"""The record of one run over HTTP: a page, or server-sent events that survive an outage of the record."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import grpc
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from chassis import channel, identity, log, replicas, status
from gateway import close_codes, session, sockets, upstreams, wire
from netra import errors, ids
from netra.dispatcher.v1 import dispatcher_pb2
from netra.events.v1 import events_pb2, events_pb2_grpc

if TYPE_CHECKING:
    _Call = grpc.aio.UnaryStreamCall[events_pb2.SubscribeRequest, events_pb2.SubscribeResponse]

_log = log.get(__name__)
_KEEPALIVE_S = 15.0
# until the record is asked again; twice as long each time that nothing came
_RETRY_S, _MAX_RETRY_S = 0.2, 3.0


class Events:
    """Reads in the caller's name."""

    def __init__(self, edge: session.Edge, services: upstreams.Upstreams) -> None:
        self._edge = edge
        self._services = services

    async def page(self, who: identity.Principal, run_id: ids.RunId, after: int, size: int) -> events_pb2.ListEventsResponse:
        """What follows a cursor in one run. Raises `NotFound` when the run is not the caller's."""
        wanted = events_pb2.ListEventsRequest(after=after, page_size=size, run_id=run_id)
        try:
            return await self._services.records.ask(who.user_id, lambda stub: _listed(stub, wanted, who))
        except errors.NotFound:
            # a run that was accepted a moment ago has no record yet; whose it is, the dispatcher knows
            with status.translated():
                await self._services.dispatcher.GetRun(dispatcher_pb2.GetRunRequest(run_id=run_id), metadata=channel.bearer(who.token))
            bounds = await self._edge.reader.page(who, after, 1)
            return events_pb2.ListEventsResponse(next_after=after, last=bounds.last, oldest=bounds.oldest)

    async def stream(self, who: identity.Principal, run_id: ids.RunId, after: int) -> Response:
        """Everything after a cursor, then live, until the run has ended. Raises `NotFound`, `FailedPrecondition` at first."""
        _check_range(after, await self.page(who, run_id, after, 1))
        return _Stream(self._edge, who, _Source(self._services.records, who, run_id), after)


async def _listed(
    stub: events_pb2_grpc.EventsServiceAsyncStub, wanted: events_pb2.ListEventsRequest, who: identity.Principal
) -> events_pb2.ListEventsResponse:
    with status.translated():
        return await stub.ListEvents(wanted, metadata=channel.bearer(who.token), timeout=replicas.SILENCE_S)


class _Source:
    """One run's events from whichever replica can be reached."""

    def __init__(self, events: upstreams.Events, who: identity.Principal, run_id: ids.RunId) -> None:
        self._events, self._who, self._run_id = events, who, run_id
        self._target = ""

    def subscribe(self, after: int) -> _Call:
        """A stream of what follows a cursor."""
        self._target = self._events.replicas.first(self._who.user_id)
        wanted = events_pb2.SubscribeRequest(after=after, run_id=self._run_id)
        return self._events.of(self._target).Subscribe(wanted, metadata=channel.bearer(self._who.token))

    def broke(self) -> None:
        """The next one comes from another, if there is one."""
        self._events.replicas.away(self._target)


def _check_range(after: int, found: events_pb2.ListEventsResponse) -> None:
    if after > found.last:
        message = f"The record ends at cursor {found.last}; nothing can be after {after}."
        raise errors.FailedPrecondition(message, last=found.last)
    check_kept(after, found)


def check_kept(after: int, found: events_pb2.ListEventsResponse) -> None:
    """Raises `FailedPrecondition` when retention took something that follows a cursor."""
    if 0 < after < found.oldest - 1:
        message = f"The record begins at cursor {found.oldest}; what was between {after} and it is gone."
        raise errors.FailedPrecondition(message, oldest=found.oldest)


class _Stream(Response):
    """One text/event-stream: until the run has ended, the client is gone or stalls, the token has ended, or the gateway stops.

    It counts as a socket of its user, and ends with their session as sockets do.
    """

    media_type = "text/event-stream"
    client_id = ""

    def __init__(self, edge: session.Edge, principal: identity.Principal, source: _Source, after: int) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self.principal, self.connection_id = principal, ids.ConnectionId.new()
        self._edge, self._source, self._after = edge, source, after
        self._stopped = asyncio.Event()

    def end(self, _close: close_codes.Close) -> None:
        """Send nothing more."""
        self._stopped.set()

    def drain(self) -> None:
        """Send nothing more: where to go on, the client knows from the last event."""
        self._stopped.set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream; cut the connection of a peer that takes nothing. Raises `QuotaExceeded`, `Unauthenticated` at first."""
        await self._enter()
        try:
            await self._serve(receive, send)
        except* TimeoutError:
            scope["state"]["cut"]()
            await wire.gone(receive)
        finally:
            self._edge.open.remove(self)

    async def _enter(self) -> None:
        try:
            await self._edge.open.admit(self)
        except sockets.TooMany:
            most = self._edge.entitled.sockets(self.principal)
            message = f"You may have {most} sockets and streams of events at a time. Close one."
            raise errors.QuotaExceeded(message, limit=most, kind="sockets") from None
        if self._edge.verifier.trust.revoked(self.principal):
            self._edge.open.remove(self)
            raise errors.Unauthenticated("The session has ended. Sign in again.")

    async def _serve(self, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        await self._put(send, b"retry: 500\n\n")
        async with asyncio.TaskGroup() as group:
            work = [group.create_task(one) for one in (self._feed(send), self._watch(send), wire.gone(receive))]
            await asyncio.wait(work, return_when=asyncio.FIRST_COMPLETED)
            for task in work:
                task.cancel()
        await self._put(send, b"", more=False)

    async def _put(self, send: Send, body: bytes, *, more: bool = True) -> None:
        await wire.put(send, body, self._edge.settings.stall_s, more=more)

    async def _feed(self, send: Send) -> None:
        pauses = _pauses()
        while True:
            call = self._source.subscribe(self._after)
            try:
                async for batch in call:
                    pauses = _pauses()
                    if batch.truncated_to:
                        await self._put(send, _truncated(batch.truncated_to))
                        self._after = max(self._after, batch.truncated_to - 1)
                    for event in batch.events:
                        await self._put(send, _event(event))
                        self._after = max(self._after, event.cursor)
                    for passing in batch.transients:
                        await self._put(send, _passing(passing))
                return
            except grpc.aio.AioRpcError as error:
                known = status.from_rpc(error)
                if isinstance(known, errors.FailedPrecondition) and (oldest := _oldest(known)) > self._after + 1:
                    # while no stream was open, retention took what was to come
                    await self._put(send, _truncated(oldest))
                    self._after = oldest - 1
                    continue
                if isinstance(known, errors.Unavailable):
                    self._source.broke()
                # a run that waits is not in the record yet
                if not isinstance(known, errors.Unavailable | errors.NotFound | errors.Cancelled):
                    _log.info("a stream of events ends early", code=known.code)
                    return
            finally:
                call.cancel()
            await asyncio.sleep(next(pauses))

    async def _watch(self, send: Send) -> None:
        """Returns when the stream may not go on; keeps it open until then."""
        ends_at = self.principal.expires_at + self._edge.settings.token_grace_s
        while (left_s := ends_at - time.time()) > 0:
            try:
                async with asyncio.timeout(min(left_s, _KEEPALIVE_S)):
                    await self._stopped.wait()
                return
            except TimeoutError:
                await self._put(send, b": keepalive\n\n")


def _oldest(refused: errors.NetraError) -> int:
    found = str(refused.details.get("oldest", ""))
    return int(found) if found.isdigit() else 0


def _truncated(oldest: int) -> bytes:
    """What was before is gone. Its id is where the client stands now."""
    return b'id: %d\nevent: history_truncated\ndata: {"oldest":%d}\n\n' % (oldest - 1, oldest)


def _pauses() -> Iterator[float]:
    """How long to wait before each further attempt."""
    pause_s = _RETRY_S
    while True:
        yield pause_s
        pause_s = min(pause_s * 2, _MAX_RETRY_S)


def _event(event: events_pb2.Event) -> bytes:
    return b"id: %d\nevent: %s\ndata: %s\n\n" % (event.cursor, event.type.encode(), event.frame)


def _passing(shown: events_pb2.TransientEvent) -> bytes:
    """What is not in the record: without an id, the client stands where it stood."""
    return b"event: %s\ndata: %s\n\n" % (shown.type.encode(), shown.frame)
