"""The WebSocket protocol of uvicorn with our heartbeat code, bytes passed through, and an end that needs no reader."""

from __future__ import annotations

import asyncio
from typing import Any, Protocol

from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from gateway import close_codes

_LINGER_S = 2.0


class Wire(Protocol):
    """What a session needs of its connection."""

    writable: asyncio.Event

    def put(self, frame: bytes) -> bool:
        """Write one text frame; false when the connection is gone."""

    def unwritten(self) -> int:
        """How many bytes the peer has not taken."""

    def end(self, close: close_codes.Close) -> None:
        """Close, also when nobody reads at the other end."""


class WireProtocol(WebSocketsSansIOProtocol):
    """One connection. Puts itself under `wire` into the state of the ASGI scope."""

    def handle_connect(self, event: Any) -> None:
        """Make the scope, then lay the wire in it."""
        super().handle_connect(event)
        if not self.close_sent:
            self.scope["state"]["wire"] = self

    async def send(self, message: Any) -> None:
        """Pass on what the application says; a refused handshake is a complete one."""
        await super().send(message)
        if message["type"] == "websocket.http.response.body" and not message.get("more_body", False):
            self.handshake_complete = True

    def put(self, frame: bytes) -> bool:
        """Write one text frame; false when the connection is gone."""
        if self.close_sent or self.disconnected or self.transport.is_closing():
            return False
        self.conn.send_text(frame)
        self.transport.write(b"".join(self.conn.data_to_send()))
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
        self.conn.send_close(close.code, close.reason)
        self.transport.write(b"".join(self.conn.data_to_send()))
        self.close_sent = True
        if self.read_paused:
            self.read_paused = False
            self.transport.resume_reading()
        self.close_timer = self.loop.call_later(_LINGER_S, self.transport.abort)

    def keepalive_timeout(self) -> None:
        """No pong came in time."""
        self.pong_timer = None
        self.pending_ping_payload = None
        self.end(close_codes.NO_PONG)
