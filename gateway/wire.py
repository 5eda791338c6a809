"""The protocols of uvicorn with our heartbeat code, bytes passed through, and an end that needs no reader."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Protocol

import h11
from starlette.types import Receive, Send
from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from uvicorn.server import ServerState
from websockets.frames import Frame
from websockets.protocol import State

from gateway import close_codes, frames
from netra import errors

_CREDENTIALS = frozenset({b"authorization", b"sec-websocket-protocol"})
_MAX_CREDENTIAL = 8 * 1024 - 64
_LINGER_S = 2.0
_TRIFLE_S = 0.05
# of RFC 6455: the one there is
_ASKED, _VERSION = b"sec-websocket-version", b"13"
_PATH = b"/ws"
# of one message
_MAX_PARTS = 64
# how long the head of a request may take; how long the rest of one that was answered already may
_HEAD_S, _REST_S = 10.0, 30.0


class Wire(Protocol):
    """What a session needs of its connection."""

    # called for each frame that is no message: a ping, a further part of a message
    heard: Callable[[], None]

    @property
    def blocked(self) -> bool:
        """Whether the peer has to take something before more is written."""

    def moved(self, told: Callable[[], None]) -> None:
        """Call this whenever the peer has made room, or the connection is gone."""

    def put(self, ready: bytes) -> bool:
        """Write frames that are ready for the line; false when the connection is gone."""

    def unwritten(self) -> int:
        """How many bytes the peer has not taken."""

    def end(self, close: close_codes.Close) -> None:
        """Close, also when nobody reads at the other end."""


async def gone(receive: Receive) -> None:
    """Returns when the peer of an HTTP request is gone, or its answer is complete."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def put(send: Send, data: bytes, within_s: float, *, more: bool) -> None:
    """Send a part of an answer. Raises `TimeoutError` when the peer takes nothing for so long of what was sent before."""
    async with asyncio.timeout(within_s):
        await send({"type": "http.response.body", "body": data, "more_body": more})


class HttpProtocol(H11Protocol):
    """HTTP; puts its end that needs no reader under `cut` into the state of the ASGI scope. A peer that keeps us waiting is cut."""

    # how many connections there may be, of either protocol; how long a peer may take nothing
    most = 10_000
    stall_s = 10.0
    _due: asyncio.TimerHandle | None = None
    _stalled: asyncio.TimerHandle | None = None

    def __init__(
        self, config: Config, server_state: ServerState, app_state: dict[str, Any], _loop: asyncio.AbstractEventLoop | None = None
    ) -> None:
        super().__init__(config, server_state, {**app_state, "cut": self.cut}, _loop)

    def cut(self) -> None:
        """End the connection now; what was not taken is dropped."""
        self.transport.abort()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take a connection, or say that there are too many."""
        super().connection_made(transport)
        if len(self.connections) > self.most:
            self.connections.discard(self)
            message = "This gateway has as many connections as it may have. Try again."
            self._refuse(503, errors.Unavailable(message, retry_after_ms=1000, limit=self.most))
        else:
            self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget what was waited for."""
        for timer in (self._due, self._stalled):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take bytes, which may be the last of what was waited for."""
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        """Go on to the next request."""
        super().on_response_complete()
        self._watch()

    def _watch(self) -> None:
        """Time what the peer owes: the head of a request, or the rest of one whose answer it has. Bytes that trickle in move nothing."""
        theirs = self.conn.their_state
        owed = theirs is h11.IDLE or (theirs is h11.SEND_BODY and self.conn.our_state is h11.DONE)
        if owed and self._due is None:
            self._due = self.loop.call_later(_HEAD_S if theirs is h11.IDLE else _REST_S, self._late)
        elif not owed and self._due is not None:
            self._due.cancel()
            self._due = None

    def _late(self) -> None:
        # one that is closing has only to take what it was sent
        if not self.transport.is_closing():
            self.cut()

    def pause_writing(self) -> None:
        """The peer is slower than we are."""
        super().pause_writing()
        self._time_taking()

    def resume_writing(self) -> None:
        """The peer has taken enough."""
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None
        super().resume_writing()

    def _time_taking(self) -> None:
        self._stalled = self.loop.call_later(self.stall_s, self._taken, self.transport.get_write_buffer_size())

    def _taken(self, before: int) -> None:
        if self.transport.get_write_buffer_size() >= before:
            self.cut()
        else:
            self._time_taking()

    def handle_websocket_upgrade(self, event: h11.Request) -> None:
        """Hand over to the other protocol, which would not read lines as long as these."""
        if any(name.lower() in _CREDENTIALS and len(value) > _MAX_CREDENTIAL for name, value in self.headers):
            self._refuse(401, errors.Unauthenticated("The token is refused: it is too long."), (b"www-authenticate", b"Bearer"))
        elif event.http_version != b"1.1":
            self._refuse(400, errors.InvalidPayload("A WebSocket takes HTTP/1.1.", field="version"))
        elif event.target.partition(b"?")[0] != _PATH:
            self._refuse(404, errors.NotFound("There is no WebSocket at this address. Connect to /ws."))
        elif event.method == b"GET" and [value for name, value in self.headers if name == _ASKED] != [_VERSION]:
            error = errors.InvalidPayload("Only version 13 of the WebSocket protocol is spoken here.", field="Sec-WebSocket-Version")
            self._refuse(426, error, (_ASKED, _VERSION))
        else:
            super().handle_websocket_upgrade(event)

    def _refuse(self, code: int, error: errors.NetraError, *more: tuple[bytes, bytes]) -> None:
        body = frames.dump({"status": code, "detail": error.message, **frames.described(error, "")})
        kind = b"application/problem+json"
        if error.retry_after_ms is not None:
            more = (*more, (b"retry-after", b"%d" % -(-error.retry_after_ms // 1000)))
        headers = [
            (b"content-type", kind),
            (b"content-length", b"%d" % len(body)),
            *more,
            (b"connection", b"close"),
        ]
        for part in (h11.Response(status_code=code, headers=headers), h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(part) or b"")
        self.transport.close()


def bounded(connections: int, stall_s: float) -> type[HttpProtocol]:
    """HTTP for so many connections, to peers that may take nothing for so long."""

    class Bounded(HttpProtocol):
        pass

    Bounded.most, Bounded.stall_s = connections, stall_s
    return Bounded


class WireProtocol(WebSocketsSansIOProtocol):
    """One connection. Puts itself under `wire` into the state of the ASGI scope."""

    heard: Callable[[], None] = staticmethod(lambda: None)
    # the answer that a peer has to wait for, and how much it had not taken when it asked
    _pong = b""
    _untaken = 0
    # since when nothing is read because the session has not taken what was; how long that was since the last ping
    _unread_since: float | None = None
    _unread_s = 0.0
    _told: Callable[[], None] | None = None

    def data_received(self, data: bytes) -> None:
        """Take bytes; a handshake that cannot be read is answered and ended, not left open."""
        super().data_received(data)
        if self.conn.handshake_exc is not None and not self.handshake_initiated and not self.transport.is_closing():
            self.transport.write(b"".join(self.conn.data_to_send()))
            self.transport.close()

    def handle_connect(self, event: Any) -> None:
        """Make the scope, then lay the wire in it."""
        super().handle_connect(event)
        if not self.close_sent:
            self.scope["state"]["wire"] = self

    def handle_cont(self, event: Frame) -> None:
        """Take a further part of a message, of which there may be a few."""
        if self.close_sent:
            return
        if len(self.frames) >= _MAX_PARTS:
            self.frames = []
            self.end(close_codes.TOO_MANY_PARTS)
            return
        super().handle_cont(event)
        self.heard()

    def handle_ping(self) -> None:
        """Answer as long as the peer takes the answers. While it does not, the last ping alone will be answered (RFC 6455, 5.5.3)."""
        pongs = self.conn.data_to_send()
        if self.close_sent:
            return
        if self.writable.is_set() or self.conn.state is not State.OPEN:
            self.transport.write(b"".join(pongs))
        elif pongs and self._pong and self.unwritten() >= self._untaken:
            self.end(close_codes.SLOW_READER)
            return
        elif pongs:
            self._pong, self._untaken = pongs[-1], self.unwritten()
        self.heard()

    def handle_close(self, event: Frame) -> None:
        """Take the peer's word that it is done, and end, also when it takes nothing more."""
        super().handle_close(event)
        self._linger()

    def handle_parser_exception(self) -> None:
        """Say what cannot be read, and end, also when the peer takes nothing more."""
        super().handle_parser_exception()
        self._linger()

    def _linger(self) -> None:
        # a transport that closes waits until everything was taken, for ever
        if self.close_timer is None and not self.disconnected and self.transport.get_write_buffer_size():
            self.stop_keepalive()
            self.close_timer = self.loop.call_later(_LINGER_S, self.transport.abort)

    def handle_pong(self, event: Frame) -> None:
        """Take an answer; one that nobody asked for is a frame like others."""
        if self.pending_ping_payload is None or bytes(event.data) != self.pending_ping_payload:
            self.heard()
        super().handle_pong(event)

    def resume_writing(self) -> None:
        """The peer has taken enough."""
        super().resume_writing()
        pong, self._pong = self._pong, b""
        if pong and not self.close_sent and not self.transport.is_closing():
            self.transport.write(pong)
        if self._told is not None:
            self._told()

    def send_receive_event_to_app(self) -> None:
        """Hand a message on, and read no further until it was taken."""
        super().send_receive_event_to_app()
        if self.read_paused and self._unread_since is None:
            self._unread_since = self.loop.time()

    async def receive(self) -> Any:
        """The next message."""
        message = await super().receive()
        if not self.read_paused:
            self._count_unread()
        return message

    def _count_unread(self) -> None:
        now = self.loop.time()
        if self._unread_since is not None:
            self._unread_s += now - self._unread_since
        self._unread_since = now if self.read_paused else None

    async def send(self, message: Any) -> None:
        """Pass on what the application says; a refused handshake is a complete one."""
        await super().send(message)
        if message["type"] == "websocket.accept":
            # who came was looked at; an idle socket needs none of it
            self.scope["headers"].clear()  # type: ignore[attr-defined]
            self.scope["subprotocols"] = []
            del self.request, self.response
        if message["type"] == "websocket.http.response.body" and not message.get("more_body", False):
            self.handshake_complete = True

    @property
    def blocked(self) -> bool:
        """Whether the peer has to take something before more is written."""
        return not self.writable.is_set()

    def moved(self, told: Callable[[], None]) -> None:
        """Call this whenever the peer has made room, or the connection is gone."""
        self._told = told

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is gone."""
        super().connection_lost(exc)
        if self._told is not None:
            self._told()
            self._told = None

    def put(self, ready: bytes) -> bool:
        """Write frames that are ready for the line; false when the connection is gone."""
        # past `conn`, which would make each frame anew for each socket; what it has to say itself is written at once, so nothing of
        # it can come in between
        if self.close_sent or self.disconnected or self.conn.state is not State.OPEN or self.transport.is_closing():
            return False
        self.transport.write(ready)
        return True

    def unwritten(self) -> int:
        """How many bytes the peer has not taken."""
        return self.transport.get_write_buffer_size()

    def end(self, close: close_codes.Close) -> None:
        """Close, also when nobody reads at the other end; what is not taken within two seconds is dropped."""
        if self.close_sent or self.disconnected or self.transport.is_closing():
            return
        self.stop_keepalive()
        self.queue.put_nowait({"type": "websocket.disconnect", "code": close.code, "reason": close.reason})
        if self.conn.state is not State.OPEN:
            # frames that came before the handshake was answered
            self.transport.abort()
            return
        self.conn.send_close(close.code, close.reason)
        self.transport.write(b"".join(self.conn.data_to_send()))
        self.close_sent = True
        if self.read_paused:
            self.read_paused = False
            self.transport.resume_reading()
        self.close_timer = self.loop.call_later(_LINGER_S, self.transport.abort)

    def send_keepalive_ping(self) -> None:
        """Ask for a pong."""
        self._count_unread()
        self._unread_s = 0.0
        super().send_keepalive_ping()

    def keepalive_timeout(self) -> None:
        """No pong came in time; the time in which nothing was read here does not count."""
        self._count_unread()
        unread_s, self._unread_s = self._unread_s, 0.0
        if unread_s > _TRIFLE_S:
            self.pong_timer = self.loop.call_later(unread_s, self.keepalive_timeout)
            return
        self.pong_timer = None
        self.pending_ping_payload = None
        self.end(close_codes.NO_PONG)
